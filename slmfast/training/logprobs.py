"""Log-probabilities of the labelled tokens, differentiable, with the head applied to those positions alone.

In an instruction set about half of the tokens belong to prompts. The LM head is the largest matrix of a small model,
so it is not multiplied where no label asks for it, and its logits exist for one slice of positions at a time.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS_PER_SLICE = 1 << 26  # 256 MiB of fp32 logits alive at once


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences and where their completion tokens are predicted.

    Shapes: B sequences, L tokens in the longest, T completion tokens in all.
    """

    input_ids: Tensor  # int64 [B, L]
    rows: Tensor  # int64 [T]: the sequence a label belongs to
    positions: Tensor  # int64 [T]: where its prediction is read, one before the token itself
    targets: Tensor  # int64 [T]: the completion tokens

    @property
    def size(self) -> int:
        """B, how many sequences there are."""
        return self.input_ids.shape[0]


def make_batch(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device | str = "cpu") -> Batch:
    """Joins (prompt ids, completion ids) pairs into one batch; a prompt must have at least one token."""
    longest = max(len(prompt) + len(completion) for prompt, completion in sequences)
    # Padding stands on the right, where causal attention never lets a real token see it: any id serves.
    input_ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    rows, positions, targets = [], [], []
    for row, (prompt, completion) in enumerate(sequences):
        ids = torch.as_tensor([*prompt, *completion], dtype=torch.int64)
        input_ids[row, : len(ids)] = ids
        rows.append(torch.full((len(completion),), row))
        positions.append(torch.arange(len(prompt) - 1, len(ids) - 1))
        targets.append(ids[len(prompt) :])
    tensors = (input_ids, torch.cat(rows), torch.cat(positions), torch.cat(targets))
    return Batch(*(tensor.to(device) for tensor in tensors))


def token_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """The natural log-probability of every completion token, fp32 [T]."""
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state  # [B, L, H]
    labelled = hidden[batch.rows, batch.positions]  # [T, H]
    head = model.get_output_embeddings()
    step = max(1, LOGITS_PER_SLICE // head.weight.shape[0])
    if len(labelled) <= step or not torch.is_grad_enabled():
        slices = [_logprobs(head, labelled[i : i + step], batch.targets[i : i + step]) for i in _starts(labelled, step)]
    else:
        slices = [
            checkpoint(_logprobs, head, labelled[i : i + step], batch.targets[i : i + step], use_reentrant=False)
            for i in _starts(labelled, step)
        ]
    return torch.cat(slices)


def completion_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """The log-probability of every whole completion, float64 [B].

    Sums are float64: an fp32 sum of hundreds of tokens is coarser than the reward that a step at 1e-8 gives.
    """
    sums = torch.zeros(batch.size, dtype=torch.float64, device=batch.input_ids.device)
    return sums.index_add(0, batch.rows, token_logprobs(model, batch).double())


def forward_precision(forward: str, device: torch.device | str) -> AbstractContextManager[object]:
    """The context of a forward pass: nothing for "fp32", autocast for "bf16". The weights stay fp32 in both."""
    return nullcontext() if forward == "fp32" else torch.autocast(torch.device(device).type, torch.bfloat16)


def _starts(labelled: Tensor, step: int) -> range:
    return range(0, len(labelled), step)


def _logprobs(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """The head and log-softmax in fp32 whatever the forward's precision: a bf16 logit errs by up to 4e-3 of itself."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = head(hidden.to(head.weight.dtype)).float()  # [N, V]
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
