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
from .sums import LogSums

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
    return log_sums(hidden, weight, targets, entropy=entropy).found(entropy)


@torch.no_grad()
def log_sums(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    entropy: bool = False,
    keep: int = 0,
    kept: list[Tensor] | None = None,
) -> LogSums:
    """What `linear_logprob` needs of the logits, in the order of its arguments.

    A backward pass wants the logits again. The first `keep` bytes of them are added to the list `kept`: for each tile
    its exp(l - m), fp32 [rows, columns], and the m that this was computed with, fp32 [rows].
    """
    check_shapes(hidden, weight, targets)
    check_targets(targets, len(weight))
    sums = LogSums(*torch.empty(4, len(targets), dtype=torch.float32, device=hidden.device))
    tile = (min(POSITIONS, len(targets)) * min(VOCABULARY, len(weight)),)
    buffers = torch.empty(2 if entropy else 1, *tile, dtype=torch.float32, device=hidden.device)
    rounded = torch.empty(tile, dtype=torch.bfloat16) if in_bf16(hidden, weight) else None
    shapes = iter(kept_shapes(len(targets), len(weight), keep))
    for start in range(0, len(targets), POSITIONS):
        rows = slice(start, start + POSITIONS)
        state = _Positions(hidden[rows], weight, targets[rows], entropy)
        for begin in range(0, len(weight), VOCABULARY):
            shape = next(shapes, None)
            own = buffers if shape is None else buffers.new_empty(1, shape[0] * shape[1])
            exponentials = state.absorb(begin, own, rounded)
            if shape is not None:
                kept += [exponentials, state.maximum]
        for whole, part in zip(sums, state.sums(), strict=True):
            whole[rows] = part
    return sums


def kept_shapes(count: int, vocabulary: int, keep: int) -> list[tuple[int, int]]:
    """Rows and columns of the first tiles of N x V logits, as many as `keep` bytes hold."""
    shapes = []
    for start in range(0, count, POSITIONS):
        for begin in range(0, vocabulary, VOCABULARY):
            shape = (min(POSITIONS, count - start), min(VOCABULARY, vocabulary - begin))
            keep -= 4 * shape[0] * shape[1]
            if keep < 0:
                return shapes
            shapes.append(shape)
    return shapes


def in_bf16(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the processor multiplies these in bf16."""
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

    def absorb(self, begin: int, buffers: Tensor, rounded: Tensor | None) -> Tensor:
        """Takes the tile of logits that starts at row `begin` of the vocabulary into the sums; returns its exp(l - m).

        `buffers` are memory for it, fp32 [1 or 2, at least its size], and `rounded`, bf16, where products are bf16.
        """
        rows = self.weight[begin : begin + VOCABULARY]
        here, column = hits(self.targets, begin, len(rows))
        tile, *spare = (x[: len(self.hidden) * len(rows)].view(len(self.hidden), len(rows)) for x in buffers)
        if rounded is None:
            rows = rows.float()
            if serves(self.wide, rows):
                tile = linear(self.wide, rows)
            else:
                torch.mm(self.wide, rows.T, out=tile)
        else:
            logits_in_bf16(self.hidden, self.wide, rows, here, column, rounded, tile)
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
        return exponentials

    def sums(self) -> LogSums:
        """What is known once the whole vocabulary is in."""
        return LogSums(self.picked, self.maximum, self.total, self.weighted)


def hits(targets: Tensor, begin: int, width: int) -> tuple[Tensor, Tensor]:
    """Which positions have their target in the tile of `width` words from `begin` on, and in which column of it."""
    column = targets - begin
    here = ((column >= 0) & (column < width)).nonzero()[:, 0]
    return here, column[here]


def logits_in_bf16(
    hidden: Tensor, wide: Tensor, rows: Tensor, here: Tensor, column: Tensor, rounded: Tensor, tile: Tensor
) -> None:
    """The logits of a tile [n, v], rounded to bf16 but for targets' and the largest of each position.

    Args:
        hidden: bf16 [n, H], and `wide` the same in fp32.
        rows: bf16 [v, H], the tile's words.
        here: the positions whose target lies in this tile, and `column` where.
        rounded: bf16, room for the tile.
        tile: fp32 [n, v], the result.
    """
    rounded = rounded[: tile.numel()].view(tile.shape)
    torch.mm(hidden, rows.T, out=rounded)
    tile.copy_(rounded)
    largest = tile.argmax(1)
    tile.scatter_(1, largest[:, None], _exact(wide, rows[largest])[:, None])
    tile[here, column] = _exact(wide[here], rows[column])


def _exact(hidden: Tensor, rows: Tensor) -> Tensor:
    """The logits of pairs of a position [n, H] and a row of the vocabulary [n, H], in fp32."""
    return torch.linalg.vecdot(hidden, rows.float())
