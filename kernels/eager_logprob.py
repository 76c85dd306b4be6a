"""The LM head without Triton: what a CPU runs, and CUDA where Triton is missing.

Logits exist for one tile at a time, so memory is bounded by two tiles or three whatever N and V are.
fp32 products take nineteen twentieths of the time, the log-sum-exp the rest.

Processors with bf16 instructions multiply bf16 about twice as fast, but torch gives such products rounded to bf16. The
logits that weigh most, each target's and the largest of every tile, are therefore computed again in fp32; the rest
enter the sum rounded. The error is under that of a plain bf16 head followed by an fp32 softmax.

Shapes: N positions, H hidden width, V vocabulary. The oracle is `reference.linear_logprob`.
"""

import functools

import torch
from torch import Tensor

from .cpu_products import linear, serves
from .reference import check_shapes, check_targets

POSITIONS = 1024  # rows of one tile of logits
VOCABULARY = 2048  # columns of one tile: with 1024 rows 8 MiB of fp32, which stay in a processor's last cache


@torch.no_grad()
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The natural log-probability of one target a position under softmax(hidden @ weight.T), fp32 [N].

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
    tile = (min(POSITIONS, len(targets)) * min(VOCABULARY, len(weight)),)
    buffers = torch.empty(2 if entropy else 1, *tile, dtype=torch.float32, device=hidden.device)
    rounded = torch.empty(tile, dtype=torch.bfloat16) if _in_bf16(hidden, weight) else None
    for start in range(0, len(targets), POSITIONS):
        rows = slice(start, start + POSITIONS)
        state = _Positions(hidden[rows], weight, targets[rows], entropy)
        for begin in range(0, len(weight), VOCABULARY):
            state.absorb(begin, buffers, rounded)
        logprob[rows], spread[rows] = state.result()
    return (logprob, spread) if entropy else logprob


def _in_bf16(hidden: Tensor, weight: Tensor) -> bool:
    both = hidden.dtype == weight.dtype == torch.bfloat16
    return both and hidden.device.type == "cpu" and _has_bf16_instructions()


@functools.cache
def _has_bf16_instructions() -> bool:
    # torch 2.11 does not tell; fp32 is right everywhere.
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


class _Positions:
    """The running maximum m, sum of exp(l - m) and of exp(l - m) (l - m) over the logits l of a few positions."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> None:
        self.hidden, self.weight, self.targets, self.entropy = hidden, weight, targets, entropy
        self.wide = hidden.float()
        self.maximum = self.wide.new_full((len(hidden),), -torch.inf)
        self.total, self.weighted = self.wide.new_zeros(2, len(hidden))
        self.picked = self.wide.new_full((len(hidden),), torch.nan)

    def absorb(self, begin: int, buffers: Tensor, rounded: Tensor | None) -> None:
        """Takes the tile of logits that starts at row `begin` of the vocabulary into the sums."""
        rows = self.weight[begin : begin + VOCABULARY]
        shape = (len(self.hidden), len(rows))
        tile, *spare = (x[: shape[0] * shape[1]].view(shape) for x in buffers)
        column = self.targets - begin
        here = ((column >= 0) & (column < len(rows))).nonzero()[:, 0]
        column = column[here]
        if rounded is None:
            rows = rows.float()
            if serves(self.wide, rows):
                tile = linear(self.wide, rows)
            else:
                torch.mm(self.wide, rows.T, out=tile)
        else:
            self._product_in_bf16(rows, rounded[: tile.numel()].view(shape), tile)
            tile[here, column] = _exact(self.wide[here], rows[column])
        self.picked[here] = tile[here, column]
        higher = torch.maximum(self.maximum, tile.amax(1))
        # Before the first tile the maximum is -inf and the sum 0, whose product would be NaN.
        drop = torch.where(self.total == 0, 0.0, self.maximum - higher)
        shrink = drop.exp()
        tile.sub_(higher[:, None])
        if self.entropy:
            exponentials = torch.exp(tile, out=spare[0])
            self.weighted = (self.weighted + drop * self.total) * shrink + tile.mul_(exponentials).sum(1)
        else:
            exponentials = tile.exp_()
        self.total = self.total * shrink + exponentials.sum(1)
        self.maximum = higher

    def _product_in_bf16(self, rows: Tensor, rounded: Tensor, tile: Tensor) -> None:
        """The logits of a tile, rounded to bf16 but for the largest of each position."""
        torch.mm(self.hidden, rows.T, out=rounded)
        tile.copy_(rounded)
        largest = tile.argmax(1)
        tile.scatter_(1, largest[:, None], _exact(self.wide, rows[largest])[:, None])

    def result(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the targets and entropies, once the whole vocabulary is in."""
        return (self.picked - self.maximum) - self.total.log(), self.total.log() - self.weighted / self.total


def _exact(hidden: Tensor, rows: Tensor) -> Tensor:
    """The logits of pairs of a position [n, H] and a row of the vocabulary [n, H], in fp32."""
    return torch.linalg.vecdot(hidden, rows.float())
