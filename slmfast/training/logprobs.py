"""Log-probabilities of completions in packs, to train with; the head is applied where a target asks for it.

In an instruction set about half of the tokens belong to prompts. The LM head is the largest matrix of a small model,
so it is not multiplied where no label asks for it, and no logits of the whole vocabulary exist.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from slmfast.kernels.head_op import accumulating_logprob
from slmfast.scoring.batches import Batch
from slmfast.training.split_weights import fp32_grad, masters_of


def target_logprobs(model: nn.Module, batch: Batch, forward: str) -> Tensor:
    """The natural log-probability of every target of a pack, fp32 [T], with the forward pass in that precision."""
    with forward_precision(forward, batch.input_ids.device):
        hidden = batch.hidden(model)
    weight = model.get_output_embeddings().weight
    buffer = fp32_grad(weight) if weight.requires_grad and torch.is_grad_enabled() else None
    return accumulating_logprob(*head_operands(hidden, seen_head(model, forward), forward), batch.targets, buffer)


def completion_logprobs(model: nn.Module, batch: Batch, forward: str) -> Tensor:
    """The log-probability of every whole completion of a pack, float64 [C].

    Sums are float64: an fp32 sum of hundreds of tokens is coarser than the reward that a step at 1e-8 gives.
    """
    sums = torch.zeros(len(batch.continuations), dtype=torch.float64, device=batch.input_ids.device)
    return sums.index_add(0, batch.owners, target_logprobs(model, batch, forward).double())


def forward_precision(forward: str, device: torch.device | str) -> AbstractContextManager[object]:
    """The context of a forward pass: autocast for "bf16", nothing for the others. The weights stay as they are."""
    return torch.autocast(torch.device(device).type, torch.bfloat16) if forward == "bf16" else nullcontext()


def seen_head(model: nn.Module, forward: str) -> Tensor:
    """The head's weight [V, H] as the forward pass sees it: whole, or of split ones the high half or both merged.

    A merged head is new memory, an fp32 matrix of the vocabulary's size: let it go with its pack.
    """
    weight, masters = model.get_output_embeddings().weight, masters_of(model)
    return weight.detach() if masters is None or forward == "bf16" else masters.merged(weight)


def head_operands(hidden: Tensor, weight: Tensor, forward: str) -> tuple[Tensor, Tensor]:
    """Hidden states [T, H] and the head's weight [V, H] in the dtype that the head's kernel multiplies.

    fp32, whatever the forward's precision, but for a bf16 forward on CUDA, where fp32 products would take longer than
    all the rest. Sums and the softmax are fp32 everywhere: a rounded bf16 logit errs by up to 4e-3 of itself.
    """
    dtype = torch.bfloat16 if forward == "bf16" and hidden.is_cuda else torch.float32
    return hidden.to(dtype), weight.detach().to(dtype)
