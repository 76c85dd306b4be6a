"""The LM head's gradients without Triton: what a CPU runs, and CUDA where Triton is missing.

With p the softmax of the logits l = hidden @ weight.T and g the gradient of each position's log-probability,

    d logprob / d l = onehot(target) - p
    grad_hidden = -g (p - onehot) @ weight        grad_weight = (p - onehot).T @ (-g hidden)

Logits come again one tile at a time, or from those that the forward kept, so memory is bounded by three tiles. g goes
on the sides that are small, and a tile is touched only to become p. Three matrix products take nearly all of the time,
two where the forward kept the logits.

No tile is left out for being small: its part of a sum may be all that an element of the sum has, so no bound on p
proves it lost in rounding.

bf16, where the processor multiplies it: logits are those of the forward, bit for bit, so that p sums to 1; p - onehot
and -g hidden are rounded to bf16 for the products, as a bf16 model rounds them, and what a tile gives is added in fp32.

Shapes: N positions, H hidden width, V vocabulary. The oracle is autograd through a plain log-softmax.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .cpu_products import linear, serves
from .eager_logprob import POSITIONS, VOCABULARY, hits, in_bf16, logits_in_bf16


@torch.no_grad()
def accumulate(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sum_exp: Tensor,
    grad: Tensor,
    weight_grad: Tensor | None,
    kept: list[Tensor],
) -> Tensor:
    """The gradient of `hidden`, [N, H] in its dtype; the weight's gradient is added to `weight_grad`.

    Args:
        hidden: [N, H], any float dtype.
        weight: [V, H], any float dtype.
        targets: int64 [N], each in 0..V-1.
        log_sum_exp: fp32 [N], of the forward.
        grad: fp32 [N], the gradient of each log-probability.
        weight_grad: fp32 [V, H], or None where the weight learns nothing.
        kept: what `eager_logprob.log_sums` kept.
    """
    result = hidden.new_empty(hidden.shape)
    pairs = iter(zip(kept[::2], kept[1::2], strict=True))
    for start in range(0, len(targets), POSITIONS):
        rows = slice(start, start + POSITIONS)
        part = _Positions(hidden[rows], weight, targets[rows], log_sum_exp[rows], grad[rows])
        for begin in range(0, len(weight), VOCABULARY):
            part.add(begin, next(pairs, None), weight_grad)
        result[rows] = part.result()
    return result


class _Positions:
    """The gradients of a few positions: their own, and what they add to the weight's."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, log_sum_exp: Tensor, grad: Tensor) -> None:
        self.hidden, self.weight, self.targets, self.log_sum_exp = hidden, weight, targets, log_sum_exp
        self.wide = hidden.float().contiguous()
        self.total = self.wide.new_zeros(self.wide.shape)
        self.factor = -grad[:, None]
        self.scaled = self.wide * self.factor
        self.rounded = None
        if in_bf16(hidden, weight):
            self.scaled = self.scaled.bfloat16()
            self.rounded = self.scaled.new_empty(len(hidden) * VOCABULARY)

    def add(self, begin: int, kept: tuple[Tensor, Tensor] | None, weight_grad: Tensor | None) -> None:
        """Takes in the tile of logits that starts at row `begin` of the vocabulary."""
        rows = self.weight[begin : begin + VOCABULARY]
        here, column = hits(self.targets, begin, len(rows))
        if self.rounded is None:
            rows = rows.float()
        if kept is not None:
            exponentials, maximum = kept
            tile = exponentials * (maximum - self.log_sum_exp).exp()[:, None]
        elif self.rounded is None:
            tile = self._shifted_logits(rows).exp_()
        else:
            tile = self.wide.new_empty(len(self.hidden), len(rows))
            logits_in_bf16(self.hidden, self.wide, rows, here, column, self.rounded, tile)
            tile.sub_(self.log_sum_exp[:, None]).exp_()
        tile[here, column] -= 1
        for total, a, b in self._products(tile, rows, None if weight_grad is None else weight_grad[begin:]):
            if self.rounded is None:
                total.addmm_(a, b)
            else:
                total.add_(a @ b)

    def _shifted_logits(self, rows: Tensor) -> Tensor:
        """The logits less the log-sum-exp, [n, v] and contiguous the other way: a bias for each position is free."""
        if serves(rows, self.wide):
            return linear(rows, self.wide, -self.log_sum_exp).T
        return torch.addmm(-self.log_sum_exp, rows, self.wide.T).T

    def _products(
        self, tile: Tensor, rows: Tensor, weight_grad: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What to add where: a sum and the two matrices whose product it wants."""
        tile = tile.to(rows.dtype)
        yield self.total, tile, rows
        if weight_grad is not None:
            yield weight_grad[: len(rows)], tile.T, self.scaled

    def result(self) -> Tensor:
        """The gradient of the positions' hidden states, fp32 [n, H], once the whole vocabulary is in."""
        return self.total.mul_(self.factor)
