"""What TRL's trainers take for the same model on a CUDA device: a plan by the same count as ours.

By reading TRL 1.16 (trainer/kto_trainer.py, trainer/sft_trainer.py, trainer/utils.py, kernels/chunked_logprob.py) and
the defaults of its configurations: fp32 weights under bf16 autocast, gradient checkpointing, batches of 8 that we take
as the method's 4, padded to the longest; torch's fused AdamW with fp32 states; a head in tiles of 4,096 positions by
32,768 words. KTO holds a second model unless its log-probabilities are precomputed, and runs both over matched and
mismatched pairs. The model's code, autocast and the checkpointing are run as TRL runs them; its head is our account
of what its kernels allocate. Attention is counted without the padding's mask, in TRL's favour.
"""

import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from slmfast.training.fake_step import ACTIVATIONS, GRADIENTS, KINDS, STATES, WEIGHTS, fake_model, values_refused
from slmfast.training.live_bytes import LiveBytes

VERSION = "1.16"
TOKENS, WORDS = 4096, 32768  # kernels/chunked_logprob.py: TOKEN_CHUNK_SIZE; trainer/utils.py: chunk_size
REFERENCE = "reference model"
PEER_KINDS = (*KINDS, REFERENCE)


def trl_peak(config: Any, method: str, batch_size: int, length: int, *, precomputed: bool = False) -> dict[str, int]:
    """Bytes of each kind at the peak of a step of TRL's trainer, weights of 4 bytes.

    Args:
        config: of a causal language model.
        method: "sft" or "kto".
        batch_size: the sequences of a micro-batch.
        length: tokens to which all of them are padded.
        precomputed: KTO's reference has given its log-probabilities before, and is not in memory.
    """
    live, mode = LiveBytes(), FakeTensorMode(allow_non_fake_inputs=True)
    with values_refused(), mode, live:
        policy, reference = fake_model(config), None
        if method == "kto" and not precomputed:
            reference = fake_model(config).eval()
            live.add([*reference.parameters(), *reference.buffers()], REFERENCE)
        states = [torch.zeros_like(weight) for weight in policy.parameters() for _ in range(2)]
        for weight in policy.parameters():
            weight.grad = torch.zeros_like(weight)
        live.add([*policy.parameters(), *policy.buffers()], WEIGHTS)
        live.add([weight.grad for weight in policy.parameters()], GRADIENTS)
        live.add(states, STATES)
        policy.train()
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # transformers renames it
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        gc.collect()
        live.reset_peak()
        _step(policy, reference, method, (batch_size, length), lambda: live.rename_new(ACTIVATIONS))
    return {kind: live.peak.get(kind, 0) for kind in PEER_KINDS}


def _step(
    policy: nn.Module, reference: nn.Module | None, method: str, shape: tuple[int, int], kept: Callable[[], None]
) -> None:
    """One micro-batch; `kept` is called between the forward and the backward pass."""
    pairs = [torch.zeros(shape, dtype=torch.int64) for _ in range(2 if method == "kto" else 1)]
    if method == "kto":
        with torch.no_grad():
            mismatched = _logprobs(policy, pairs[1])
    gained = _logprobs(policy, pairs[0])
    if reference is not None:
        with torch.no_grad():
            held = [_logprobs(reference, ids) for ids in pairs]
        gained, mismatched = gained - held[0], mismatched - held[1]
    loss = -gained.mean() if method == "sft" else 1 - torch.sigmoid(gained - mismatched.mean()).mean()
    kept()
    loss.backward()


def _logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):  # accelerate wraps each call of a model in it
        return _sequences(model, ids)


def _sequences(model: nn.Module, ids: Tensor) -> Tensor:
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    # The selection of labelled positions copies them.
    chosen = hidden.reshape(-1, hidden.shape[-1])[torch.arange(hidden.shape[0] * hidden.shape[1])]
    return _TiledHead.apply(chosen, model.get_output_embeddings().weight).view(len(ids), -1).sum(-1)


class _TiledHead(torch.autograd.Function):
    """What ChunkedLogProbFunction of TRL allocates on CUDA with its Triton kernels, for hidden [N, H] of bf16 products.

    The weight's gradient [V, H] is one fp32 array of the call, beside the one that it is added to.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        count = len(hidden)
        sums = [torch.zeros(count) for _ in range(7)]
        tile = torch.empty(min(count, TOKENS), WORDS, dtype=torch.bfloat16)
        for start in range(0, count, TOKENS):
            rows = hidden[start : start + TOKENS].to(torch.bfloat16)
            _products(tile[: len(rows)], rows, weight)
        ctx.save_for_backward(hidden, weight, sums[0], sums[1])
        return sums[2] - sums[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight, _, _ = ctx.saved_tensors
        for_hidden, for_weight = torch.zeros_like(hidden, dtype=torch.float32), torch.zeros_like(weight)
        tile = torch.empty(min(len(hidden), TOKENS), WORDS, dtype=torch.bfloat16)
        for start in range(0, len(hidden), TOKENS):
            rows = hidden[start : start + TOKENS].to(torch.bfloat16)
            _products(tile[: len(rows)], rows, weight)
        return for_hidden.to(hidden.dtype), for_weight


def _products(tile: Tensor, rows: Tensor, weight: Tensor) -> None:
    """A bf16 copy of a stretch of the weight at a time, and the tile that it is multiplied into."""
    for start in range(0, len(weight), WORDS):
        words = weight[start : start + WORDS].to(torch.bfloat16)
        torch.mm(rows, words.T, out=tile[:, : len(words)])
