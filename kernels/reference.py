"""Eager fp32 twins of the Triton kernels: the oracle that each is tested against, and the path that a CPU takes.

Shapes: N positions, H hidden width, V vocabulary.
"""

import torch
from torch import Tensor

POSITIONS = 1024  # rows of one tile of logits
VOCABULARY = 4096  # columns of one tile: with 1024 rows 16 MiB of fp32, whatever N and V are


@torch.no_grad()
def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The natural log-probability of one target a position under softmax(hidden @ weight.T), fp32 [N].

    No [N, V] tensor exists: the vocabulary passes in tiles under a running maximum and a running sum of exponentials
    (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"). Everything is computed in fp32,
    whatever the inputs' dtype. The result is (logit - maximum) - log(sum): a difference to the log-sum-exp itself
    would lose the bits that its size takes.

    Args:
        hidden: [N, H], any float dtype.
        weight: [V, H], the LM head, any float dtype.
        targets: int64 [N], each in 0..V-1.

    Raises:
        ValueError: the shapes don't fit, or a target is no row of `weight`.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden [N, H], weight [V, H] and targets [N] don't fit: "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}"
        )
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < weight.shape[0]:
        raise ValueError(
            f"targets go from {int(targets.min())} to {int(targets.max())}, the head has {len(weight)} rows"
        )
    logprob = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(targets), POSITIONS):
        rows = slice(start, start + POSITIONS)
        logprob[rows] = _tile(hidden[rows].float(), weight, targets[rows])
    return logprob


def _tile(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    maximum = hidden.new_full((len(hidden),), -torch.inf)
    total = hidden.new_zeros(len(hidden))
    picked = hidden.new_full((len(hidden),), torch.nan)
    for start in range(0, len(weight), VOCABULARY):
        logits = hidden @ weight[start : start + VOCABULARY].float().T
        column = targets - start
        here = (column >= 0) & (column < logits.shape[1])
        picked[here] = logits[here, column[here]]
        higher = torch.maximum(maximum, logits.amax(1))
        # In place: a tile's exponentials take the tile's own memory.
        total = total * (maximum - higher).exp() + logits.sub_(higher[:, None]).exp_().sum(1)
        maximum = higher
    return (picked - maximum) - total.log()
