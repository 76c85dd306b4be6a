"""Eager fp32 twins of the Triton kernels: the oracle that each is tested against.

Shapes: N positions, H hidden width, V vocabulary.
"""

import torch
from torch import Tensor

POSITIONS = 1024  # rows of one tile of logits
VOCABULARY = 4096  # columns of one tile: with 1024 rows 16 MiB of fp32, whatever N and V are


@torch.no_grad()
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The natural log-probability of one target a position under softmax(hidden @ weight.T), fp32 [N].

    No [N, V] tensor exists: the vocabulary passes in tiles under a running maximum and a running sum of exponentials
    (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"). Everything is computed in fp32,
    whatever the inputs' dtype. The result is (logit - maximum) - log(sum): a difference to the log-sum-exp itself
    would lose the bits that its size takes.

    Args:
        hidden: [N, H], any float dtype.
        weight: [V, H], the LM head, any float dtype.
        targets: int64 [N], each in 0..V-1.
        entropy: also return the entropy of the whole distribution at each position, in nats, fp32 [N].

    Raises:
        ValueError: the shapes don't fit, or a target is no row of `weight`.
    """
    check_shapes(hidden, weight, targets)
    check_targets(targets, len(weight))
    logprob, spread = (torch.empty(len(targets), dtype=torch.float32, device=hidden.device) for _ in range(2))
    for start in range(0, len(targets), POSITIONS):
        rows = slice(start, start + POSITIONS)
        logprob[rows], spread[rows] = _tile(hidden[rows].float(), weight, targets[rows])
    return (logprob, spread) if entropy else logprob


def check_shapes(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Raises ValueError unless hidden is [N, H], weight [V, H] and targets [N]."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden [N, H], weight [V, H] and targets [N] don't fit: "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}"
        )


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """Raises ValueError where a target is no row of the head; waits for the device if the targets lie on one."""
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        raise ValueError(
            f"targets go from {int(targets.min())} to {int(targets.max())}, the head has {vocabulary} rows"
        )


def _tile(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of a few positions, hidden in fp32.

    With l the logits, m the maximum and Z the sum of exp(l - m), the entropy is log Z - sum(exp(l - m) (l - m)) / Z.
    """
    maximum = hidden.new_full((len(hidden),), -torch.inf)
    total, weighted = hidden.new_zeros(2, len(hidden))
    picked = hidden.new_full((len(hidden),), torch.nan)
    for start in range(0, len(weight), VOCABULARY):
        logits = hidden @ weight[start : start + VOCABULARY].float().T
        column = targets - start
        here = (column >= 0) & (column < logits.shape[1])
        picked[here] = logits[here, column[here]]
        higher = torch.maximum(maximum, logits.amax(1))
        # Before the first tile the maximum is -inf and the sum 0, whose product would be NaN.
        drop = torch.where(total == 0, 0.0, maximum - higher)
        # In place: a tile of l - m takes the logits' own memory, and its exponentials one tile more.
        shifted = logits.sub_(higher[:, None])
        exponentials = shifted.exp()
        weighted = (weighted + drop * total) * drop.exp() + shifted.mul_(exponentials).sum(1)
        total = total * drop.exp() + exponentials.sum(1)
        maximum = higher
    return (picked - maximum) - total.log(), total.log() - weighted / total
