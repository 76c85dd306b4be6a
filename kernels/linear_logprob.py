"""The fused LM head in Triton: log-probabilities of targets without logits in memory.

A program takes a tile of positions and a stretch of the vocabulary. It multiplies tile by tile on tensor cores,
accumulates in fp32, and keeps a running maximum and sum of exponentials (Milakov and Gimelshein 2018, "Online
normalizer calculation for softmax"; the layout after Wijmans et al. 2024, "Cut your losses in large-vocabulary
language models"). A stretch leaves three numbers a position, four with the entropy; a small reduction joins them.

Shapes: N positions, H hidden width, V vocabulary, S stretches. The oracle is `reference.linear_logprob`.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import SM86, FusedTiles, fused_tiles
from .online import INTERPRETED, absorb, check_kernel_inputs, product
from .sums import LogSums


@triton.jit
def _stretch_kernel(
    hidden_ptr,  # [N, H]
    weight_ptr,  # [V, H]
    targets_ptr,  # int64 [N]
    maximum_ptr,  # fp32 [S, N]
    total_ptr,  # fp32 [S, N]
    weighted_ptr,  # fp32 [S, N], written with ENTROPY alone
    picked_ptr,  # fp32 [N]
    N,
    V,
    H,
    stride_hidden,
    stride_weight,
    ENTROPY: tl.constexpr,
    EVEN_H: tl.constexpr,  # BLOCK_H divides H: no mask along it
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STRETCH: tl.constexpr,
):
    stretch = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = rows < N
    targets = tl.load(targets_ptr + rows, mask=real, other=-1)
    hidden_rows = hidden_ptr + rows.to(tl.int64)[:, None] * stride_hidden
    maximum = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    weighted = tl.zeros([BLOCK_N], tl.float32)
    picked = tl.zeros([BLOCK_N], tl.float32)
    first = stretch * STRETCH
    for begin in range(first, tl.minimum(first + STRETCH, V), BLOCK_V):
        columns = begin + tl.arange(0, BLOCK_V)
        weight_columns = weight_ptr + columns.to(tl.int64)[None, :] * stride_weight
        logits = product(
            hidden_rows, weight_columns, real, columns < V, H, EVEN_H, PRECISION, BLOCK_N, BLOCK_V, BLOCK_H
        )
        logits = tl.where((columns < V)[None, :], logits, float("-inf"))
        maximum, total, weighted = absorb(logits, maximum, total, weighted, ENTROPY)
        picked += tl.sum(tl.where(columns[None, :] == targets[:, None], logits, 0.0), 1)
    places = stretch.to(tl.int64) * N + rows
    tl.store(maximum_ptr + places, maximum, mask=real)
    tl.store(total_ptr + places, total, mask=real)
    if ENTROPY:
        tl.store(weighted_ptr + places, weighted, mask=real)
    # One stretch alone holds a position's target; the others leave the place untouched.
    mine = (targets >= first) & (targets < tl.minimum(first + STRETCH, V))
    tl.store(picked_ptr + rows, picked, mask=real & mine)


@torch.no_grad()
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool = False, tiles: FusedTiles | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The natural log-probability of one target a position under softmax(hidden @ weight.T), fp32 [N].

    fp32 inputs are multiplied in full fp32, never TF32. A target that is no row of `weight` gives NaN: to raise, the
    host would have to wait for the device.

    Args:
        hidden: [N, H], bf16, fp16 or fp32.
        weight: [V, H], the same dtype.
        targets: int64 [N], each in 0..V-1.
        entropy: also return the entropy of the whole distribution at each position, in nats, fp32 [N].
        tiles: block sizes; by default the first that launch.py names for the device.

    Raises:
        ValueError: shapes, dtypes or devices don't fit.
    """
    return log_sums(hidden, weight, targets, entropy=entropy, tiles=tiles).found(entropy)


@torch.no_grad()
def log_sums(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool = False, tiles: FusedTiles | None = None
) -> LogSums:
    """What `linear_logprob` needs of the logits; it has the same arguments."""
    check_kernel_inputs(hidden, weight, targets)
    tiles = tiles or choices(hidden, weight)[0]
    if INTERPRETED:
        # The interpreter multiplies bf16 as if it were integers. In fp32 the products are what tensor cores give.
        hidden, weight = hidden.float(), weight.float()
    # The kernel walks along H in steps of one element.
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    count, vocabulary = len(hidden), len(weight)
    stretches = triton.cdiv(vocabulary, tiles.stretch)
    maximum, total = (torch.empty(stretches, count, dtype=torch.float32, device=hidden.device) for _ in range(2))
    weighted = torch.empty_like(total) if entropy else total
    picked = torch.full((count,), torch.nan, dtype=torch.float32, device=hidden.device)
    if count:
        _launch(hidden, weight, targets, (maximum, total, weighted, picked), entropy, tiles)
    return _join(maximum, total, weighted, picked)


def choices(hidden: Tensor, weight: Tensor) -> tuple[FusedTiles, ...]:
    """The block sizes worth trying for hidden [N, H] and weight [V, H] on their device."""
    return fused_tiles(*tiling_of(hidden, weight))


def tiling_of(hidden: Tensor, weight: Tensor) -> tuple[tuple[int, int], int, int]:
    """What decides on block sizes: the device's capability, an element's bytes, and what divides H and the strides."""
    capability = torch.cuda.get_device_capability(hidden.device) if hidden.is_cuda else SM86
    # A matrix whose rows are not contiguous is copied first.
    strides = [x.stride(0) for x in (hidden, weight) if x.stride(1) == 1]
    return capability, hidden.element_size(), math.gcd(hidden.shape[1], *strides)


def _launch(
    hidden: Tensor, weight: Tensor, targets: Tensor, results: tuple[Tensor, ...], entropy: bool, tiles: FusedTiles
) -> None:
    count, width = hidden.shape
    vocabulary = len(weight)
    # -1 is "no device" and leaves the current one: what the interpreter needs.
    with torch.cuda.device(hidden.device if hidden.is_cuda else -1):
        _stretch_kernel[(triton.cdiv(count, tiles.block_n), triton.cdiv(vocabulary, tiles.stretch))](
            hidden,
            weight,
            targets.contiguous(),
            *results,
            count,
            vocabulary,
            width,
            hidden.stride(0),
            weight.stride(0),
            ENTROPY=entropy,
            EVEN_H=width % tiles.block_h == 0,
            PRECISION="ieee",
            **tiles.constants,
            **tiles.options,
        )


def _join(maximum: Tensor, total: Tensor, weighted: Tensor, picked: Tensor) -> LogSums:
    """One state of each position [N] from those that the stretches left [S, N]."""
    highest = maximum.amax(0)
    drop = maximum - highest
    whole = (total * drop.exp()).sum(0)
    if weighted is not total:
        # A stretch's sum of exp(l - m) (l - m) about its own maximum m, moved to the highest.
        weighted = ((weighted + drop * total) * drop.exp()).sum(0)
    return LogSums(picked, highest, whole, weighted)
