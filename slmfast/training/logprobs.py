"""Log-probabilities of completions in packs, with gradients or without, the head applied where a target asks for it.

In an instruction set about half of the tokens belong to prompts. The LM head is the largest matrix of a small model,
so it is not multiplied where no label asks for it, and its logits exist for one slice of positions at a time.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slmfast.scoring.batches import Batch

LOGITS_PER_SLICE = 1 << 26  # 256 MiB of fp32 logits alive at once


def target_logprobs(model: nn.Module, batch: Batch, forward: str) -> Tensor:
    """The natural log-probability of every target of a pack, fp32 [T], with the forward pass in that precision."""
    with forward_precision(forward, batch.input_ids.device):
        hidden = batch.hidden(model)
    return head_logprobs(hidden, model.get_output_embeddings().weight, batch.targets)


def completion_logprobs(model: nn.Module, batch: Batch, forward: str) -> Tensor:
    """The log-probability of every whole completion of a pack, float64 [C].

    Sums are float64: an fp32 sum of hundreds of tokens is coarser than the reward that a step at 1e-8 gives.
    """
    sums = torch.zeros(len(batch.continuations), dtype=torch.float64, device=batch.input_ids.device)
    return sums.index_add(0, batch.owners, target_logprobs(model, batch, forward).double())


def forward_precision(forward: str, device: torch.device | str) -> AbstractContextManager[object]:
    """The context of a forward pass: autocast for "bf16", nothing for the others. The weights stay fp32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16) if forward == "bf16" else nullcontext()


def head_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of each target, fp32 [T], from hidden [T, H] and the head's weight [V, H]; differentiable.

    The head and the softmax are fp32 whatever the forward's precision: a bf16 logit errs by up to 4e-3 of itself.
    """
    step = max(1, LOGITS_PER_SLICE // len(weight))
    slices = []
    for start in range(0, len(targets), step):
        some = hidden[start : start + step].to(weight.dtype), weight, targets[start : start + step]
        # One slice's logits may stay: they are used right away.
        again = len(targets) > step and torch.is_grad_enabled()
        slices.append(checkpoint(_logprobs, *some, use_reentrant=False) if again else _logprobs(*some))
    return torch.cat(slices)


def _logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = nn.functional.linear(hidden, weight).float()  # [T, V]
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
