"""The LM head's gradients on CUDA: a tile of d logprob / d logits at a time, then two products with it.

With p the softmax of the logits l = hidden @ weight.T and g the gradient of each position's log-probability,

    d = g (onehot(target) - p)    grad_hidden = d @ weight    grad_weight = d.T @ hidden

A tile of d comes from one kernel that multiplies and keeps the logits in registers, or from cuBLAS and a kernel that
goes over the logits; the two products come from a kernel that adds to its fp32 result in place, or from cuBLAS. Each
element of a result belongs to one program, so nothing is atomic and a second run gives the same bits. Kernels that
held no tile in memory (Wijmans et al. 2024, "Cut your losses in large-vocabulary language models") would compute the
logits twice, a fourth product where a tile in 16 bits costs six bytes of traffic a logit.

No tile is left out for being small: its part of a sum may be all that an element of the sum has, so no bound on p
proves it lost in rounding.

Shapes: N positions, H hidden width, V vocabulary; T vocabulary rows of a tile. The oracle is autograd through a plain
log-softmax.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    GRADIENT,
    BackwardTiles,
    FusedTiles,
    Workspace,
    backward_tiles,
    backward_workspace,
    padded,
)
from .linear_logprob import tiling_of
from .online import INTERPRETED, check_kernel_inputs, full_fp32, product


@triton.jit(do_not_specialize=["begin"])
def _recompute_kernel(
    hidden_ptr,  # [N, H]
    weight_ptr,  # [T, H], the tile's words
    targets_ptr,  # int64 [N]
    log_sum_exp_ptr,  # fp32 [N]
    grad_ptr,  # fp32 [N]
    gradient_ptr,  # [N, T]: the result
    N,
    T,
    H,
    begin,  # the tile's first row of the vocabulary
    stride_hidden,
    stride_weight,
    stride_gradient,
    EVEN_H: tl.constexpr,  # BLOCK_H divides H: no mask along it
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """d of a tile, from products that stay in registers."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    real, inside = rows < N, columns < T
    hidden_rows = hidden_ptr + rows.to(tl.int64)[:, None] * stride_hidden
    weight_columns = weight_ptr + columns.to(tl.int64)[None, :] * stride_weight
    logits = product(hidden_rows, weight_columns, real, inside, H, EVEN_H, PRECISION, BLOCK_N, BLOCK_V, BLOCK_H)
    gradient = _gradient(logits, rows, real, begin + columns, targets_ptr, log_sum_exp_ptr, grad_ptr)
    places = gradient_ptr + rows.to(tl.int64)[:, None] * stride_gradient + columns[None, :]
    tl.store(places, gradient.to(gradient_ptr.dtype.element_ty), mask=real[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["begin"])
def _gradient_kernel(
    logits_ptr,  # fp32 [N, T]
    targets_ptr,  # int64 [N]
    log_sum_exp_ptr,  # fp32 [N]
    grad_ptr,  # fp32 [N]
    gradient_ptr,  # [N, T]: the result; in fp32 it may be the logits' own memory
    N,
    T,
    begin,  # the tile's first row of the vocabulary
    stride,  # of a row of the logits and of their gradient
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """d of a tile, from its logits."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    real = rows < N
    places = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    inside = real[:, None] & (columns < T)[None, :]
    logits = tl.load(logits_ptr + places, mask=inside, other=0.0)
    gradient = _gradient(logits, rows, real, begin + columns, targets_ptr, log_sum_exp_ptr, grad_ptr)
    tl.store(gradient_ptr + places, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(logits, rows, real, words, targets_ptr, log_sum_exp_ptr, grad_ptr):
    """g (onehot - p) of logits [n, v] in these rows of the positions and words of the vocabulary."""
    targets = tl.load(targets_ptr + rows, mask=real, other=-1)
    log_sum_exp = tl.load(log_sum_exp_ptr + rows, mask=real, other=0.0)
    grad = tl.load(grad_ptr + rows, mask=real, other=0.0)
    hit = tl.where(words[None, :] == targets[:, None], 1.0, 0.0)
    return grad[:, None] * (hit - tl.exp(logits - log_sum_exp[:, None]))


@triton.jit
def _product_kernel(
    total_ptr,  # fp32 [M, K], contiguous rows: the sum
    a_ptr,  # [M, J], or [J, M] with TRANSPOSED
    b_ptr,  # [J, K]
    factor_ptr,  # fp32 [1]
    M,
    J,
    K,
    stride_total,
    stride_a,
    stride_b,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Adds factor (a @ b) to the sum: grad_hidden with a = d, grad_weight with a = d.T."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    real, inside = rows < M, columns < K
    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, J, BLOCK_J):
        inner = start + tl.arange(0, BLOCK_J)
        there = inner < J
        steps = inner.to(tl.int64)
        if TRANSPOSED:
            a = tl.load(
                a_ptr + steps[:, None] * stride_a + rows[None, :], mask=there[:, None] & real[None, :], other=0.0
            )
            a = tl.trans(a)
        else:
            a = tl.load(
                a_ptr + rows[:, None] * stride_a + inner[None, :], mask=real[:, None] & there[None, :], other=0.0
            )
        b = tl.load(
            b_ptr + steps[:, None] * stride_b + columns[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
    places = total_ptr + rows.to(tl.int64)[:, None] * stride_total + columns[None, :]
    both = real[:, None] & inside[None, :]
    held = tl.load(places, mask=both, other=0.0)
    tl.store(places, held + tl.load(factor_ptr) * total, mask=both)


@torch.no_grad()
def accumulate(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sum_exp: Tensor,
    grad: Tensor,
    weight_grad: Tensor | None,
    workspace: Tensor,
    *,
    tiles: BackwardTiles,
) -> Tensor:
    """The gradient of `hidden`, [N, H] in its dtype; the weight's gradient is added to `weight_grad`.

    d is rounded to the inputs' dtype for the products, which accumulate in fp32. In fp16 the gradients are scaled so
    that the largest is near 2^14 meanwhile.

    Args:
        hidden: [N, H], bf16, fp16 or fp32.
        weight: [V, H], the same dtype.
        targets: int64 [N], each in 0..V-1.
        log_sum_exp: fp32 [N], of the forward.
        grad: fp32 [N], the gradient of each log-probability.
        weight_grad: fp32 [V, H] with contiguous rows, or None where the weight learns nothing.
        workspace: uint8, as many as `launch.backward_workspace` says.
        tiles: one of those that launch.py names.

    Raises:
        ValueError: shapes, dtypes or devices don't fit.
    """
    check_kernel_inputs(hidden, weight, targets)
    result = hidden.new_empty(hidden.shape)
    if INTERPRETED:
        # The interpreter multiplies bf16 as if it were integers. In fp32 the products are what tensor cores give.
        hidden, weight = hidden.float(), weight.float()
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    scale = _scale(grad, hidden.dtype)
    grad, targets, log_sum_exp = (grad * scale).contiguous(), targets.contiguous(), log_sum_exp.contiguous()
    buffers = _Buffers(workspace, backward_workspace(len(hidden), hidden.shape[1], len(weight), hidden.element_size()))
    with torch.cuda.device(hidden.device if hidden.is_cuda else -1), full_fp32():
        for start in range(0, len(hidden), buffers.parts.rows):
            rows = slice(start, start + buffers.parts.rows)
            run = _Rows(hidden[rows], weight, (targets[rows], log_sum_exp[rows], grad[rows]), 1 / scale, buffers, tiles)
            result[rows] = run.gradients(weight_grad)
    return result


def choices(hidden: Tensor, weight: Tensor) -> tuple[BackwardTiles, ...]:
    """The ways worth trying for hidden [N, H] and weight [V, H] on their device."""
    return backward_tiles(*tiling_of(hidden, weight))


class _Buffers:
    """The workspace as tensors. Parts of a smaller tile lie in the memory of a whole one."""

    def __init__(self, workspace: Tensor, parts: Workspace) -> None:
        if workspace.numel() < parts.bytes:
            raise ValueError(f"the workspace has {workspace.numel()} bytes, {parts.bytes} are needed")
        sizes = [parts.logits, parts.gradient, parts.total, parts.product]
        self.parts = parts
        self._logits, gradient, self._total, self._product = workspace[: parts.bytes].split(sizes)
        self._gradient = gradient if parts.gradient else self._logits

    def logits(self, count: int, columns: int) -> Tensor:
        """fp32 [count, columns] with padded rows."""
        return _matrix(self._logits, torch.float32, count, padded(columns))[:, :columns]

    def gradient(self, count: int, columns: int, dtype: torch.dtype) -> Tensor:
        """[count, columns] with padded rows; in fp32 the logits' own memory."""
        return _matrix(self._gradient, dtype, count, padded(columns))[:, :columns]

    def total(self, count: int, width: int) -> Tensor:
        """fp32 [count, width]."""
        return _matrix(self._total, torch.float32, count, width)

    def product(self, count: int, width: int) -> Tensor:
        """fp32 [count, width]."""
        return _matrix(self._product, torch.float32, count, width)


def _matrix(memory: Tensor, dtype: torch.dtype, count: int, columns: int) -> Tensor:
    return memory[: count * columns * dtype.itemsize].view(dtype).view(count, columns)


def _scale(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """A power of two, fp32 [1], that keeps the gradients within fp16: its smallest number is 2^-24."""
    if dtype != torch.float16 or not len(grad):
        return grad.new_ones(1)
    exponent = torch.frexp(grad.abs().max())[1].clamp(-100, 100)
    return torch.ldexp(grad.new_ones(1), 14 - exponent)


class _Rows:
    """The gradients of the positions that one tile has room for."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        position: tuple[Tensor, Tensor, Tensor],
        factor: Tensor,
        buffers: _Buffers,
        tiles: BackwardTiles,
    ) -> None:
        self.hidden, self.weight, self.factor, self.buffers, self.tiles = hidden, weight, factor, buffers, tiles
        self.position = position  # targets, log-sum-exp and gradient of each position

    def gradients(self, weight_grad: Tensor | None) -> Tensor:
        """The hidden states' gradients, fp32 [n, H]; the weight's are added to `weight_grad`."""
        total = self.buffers.total(*self.hidden.shape).zero_()
        for begin in range(0, len(self.weight), self.buffers.parts.columns):
            words = self.weight[begin : begin + self.buffers.parts.columns]
            shape = (len(self.hidden), len(words))
            d = self.buffers.gradient(*shape, self.hidden.dtype)
            if self.tiles.recompute is None:
                logits = self.buffers.logits(*shape)
                _multiply(self.hidden, words.T, logits)
                self._from_logits(logits, begin, d)
            else:
                self._recomputed(words, begin, d, self.tiles.recompute)
            self._add(total, d, words, transposed=False)
            if weight_grad is not None:
                self._add(weight_grad[begin : begin + len(words)], d, self.hidden, transposed=True)
        return total

    def _from_logits(self, logits: Tensor, begin: int, d: Tensor) -> None:
        grid = (triton.cdiv(d.shape[0], GRADIENT.block_n), triton.cdiv(d.shape[1], GRADIENT.block_v))
        _gradient_kernel[grid](
            logits, *self.position, d, *d.shape, begin, d.stride(0), **GRADIENT.constants, **GRADIENT.options
        )

    def _recomputed(self, words: Tensor, begin: int, d: Tensor, tiles: FusedTiles) -> None:
        width = words.shape[1]
        constants = {name: size for name, size in tiles.constants.items() if name != "STRETCH"}
        _recompute_kernel[(triton.cdiv(d.shape[0], tiles.block_n), triton.cdiv(d.shape[1], tiles.block_v))](
            self.hidden,
            words,
            *self.position,
            d,
            *d.shape,
            width,
            begin,
            self.hidden.stride(0),
            words.stride(0),
            d.stride(0),
            EVEN_H=width % tiles.block_h == 0,
            PRECISION="ieee",
            **constants,
            **tiles.options,
        )

    def _add(self, total: Tensor, d: Tensor, other: Tensor, *, transposed: bool) -> None:
        """Adds factor (d @ other), or factor (d.T @ other), to the fp32 sum."""
        a, tiles = d.T if transposed else d, self.tiles.product
        if tiles is None and d.dtype == torch.float32:
            total.addmm_(a, other)  # the factor is 1 but for fp16
        elif tiles is None:
            found = self.buffers.product(*total.shape)
            _multiply(a, other, found)
            total.addcmul_(found, self.factor)
        else:
            _product_kernel[(triton.cdiv(total.shape[0], tiles.block_m), triton.cdiv(total.shape[1], tiles.block_k))](
                total,
                d,
                other,
                self.factor,
                *a.shape,
                other.shape[1],
                total.stride(0),
                d.stride(0),
                other.stride(0),
                TRANSPOSED=transposed,
                PRECISION="ieee",
                **tiles.constants,
                **tiles.options,
            )


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a @ b in fp32, out of inputs of any dtype."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
