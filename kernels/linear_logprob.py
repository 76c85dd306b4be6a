"""The fused LM head in Triton: log-probabilities of targets without logits in memory.

A program takes a tile of positions and a stretch of the vocabulary. It multiplies tile by tile on tensor cores,
accumulates in fp32, and keeps a running maximum and sum of exponentials (Milakov and Gimelshein 2018, "Online
normalizer calculation for softmax"; the layout after Wijmans et al. 2024, "Cut your losses in large-vocabulary
language models"). A stretch leaves three numbers a position; a small reduction joins the stretches.

Shapes: N positions, H hidden width, V vocabulary, S stretches. The oracle is `reference.linear_logprob`.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles per element size in bytes. On sm_86 both stay under 99 KB of shared memory and spill no register; fp32 without
# TF32 leaves the tensor cores idle, and a larger tile of it would spill.
TILES = {
    2: {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_H": 32, "num_warps": 8, "num_stages": 3},
    4: {"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_H": 32, "num_warps": 4, "num_stages": 2},
}
# Vocabulary rows of one program: 3.6 MB of bf16 weight at H = 896, which stay in a 6 MB L2 while all tiles of
# positions (the grid's fast axis) use them.
STRETCH = 2048
# Triton reads this when a kernel is decorated; with it set, kernels run on CPU tensors in numpy.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _stretch_kernel(
    hidden_ptr,  # [N, H]
    weight_ptr,  # [V, H]
    targets_ptr,  # int64 [N]
    maximum_ptr,  # fp32 [S, N]
    total_ptr,  # fp32 [S, N]
    picked_ptr,  # fp32 [N]
    N,
    V,
    H,
    stride_hidden,
    stride_weight,
    STRETCH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    stretch = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = rows < N
    targets = tl.load(targets_ptr + rows, mask=real, other=-1)
    hidden_rows = hidden_ptr + rows.to(tl.int64)[:, None] * stride_hidden
    maximum = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    picked = tl.zeros([BLOCK_N], tl.float32)
    first = stretch * STRETCH
    for begin in range(first, tl.minimum(first + STRETCH, V), BLOCK_V):
        columns = begin + tl.arange(0, BLOCK_V)
        weight_columns = weight_ptr + columns.to(tl.int64)[None, :] * stride_weight
        logits = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for start in range(0, H, BLOCK_H):
            inner = start + tl.arange(0, BLOCK_H)
            a = tl.load(hidden_rows + inner[None, :], mask=real[:, None] & (inner < H)[None, :], other=0.0)
            b = tl.load(weight_columns + inner[:, None], mask=(columns < V)[None, :] & (inner < H)[:, None], other=0.0)
            logits = tl.dot(a, b, logits, input_precision=PRECISION)
        logits = tl.where((columns < V)[None, :], logits, float("-inf"))
        higher = tl.maximum(maximum, tl.max(logits, 1))
        total = total * tl.exp(maximum - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        maximum = higher
        picked += tl.sum(tl.where(columns[None, :] == targets[:, None], logits, 0.0), 1)
    tl.store(maximum_ptr + stretch * N + rows, maximum, mask=real)
    tl.store(total_ptr + stretch * N + rows, total, mask=real)
    # One stretch alone holds a position's target; the others leave the place untouched.
    mine = (targets >= first) & (targets < tl.minimum(first + STRETCH, V))
    tl.store(picked_ptr + rows, picked, mask=real & mine)


@torch.no_grad()
def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The natural log-probability of one target a position under softmax(hidden @ weight.T), fp32 [N].

    fp32 inputs are multiplied in full fp32, never TF32. A target that is no row of `weight` gives NaN: to raise, the
    host would have to wait for the device.

    Args:
        hidden: [N, H], bf16, fp16 or fp32.
        weight: [V, H], the same dtype.
        targets: int64 [N], each in 0..V-1.

    Raises:
        ValueError: shapes, dtypes or devices don't fit.
    """
    _check(hidden, weight, targets)
    count, width = hidden.shape
    vocabulary = weight.shape[0]
    if INTERPRETED:
        # The interpreter multiplies bf16 as if it were integers. In fp32 the products are what tensor cores give.
        hidden, weight = hidden.float(), weight.float()
    # The kernel walks along H in steps of one element.
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    stretches = triton.cdiv(vocabulary, STRETCH)
    maximum, total = (torch.empty(stretches, count, dtype=torch.float32, device=hidden.device) for _ in range(2))
    picked = torch.full((count,), torch.nan, dtype=torch.float32, device=hidden.device)
    if count == 0:
        return picked
    tiles = TILES[hidden.element_size()]
    # -1 is "no device" and leaves the current one: what the interpreter needs.
    with torch.cuda.device(hidden.device if hidden.is_cuda else -1):
        _stretch_kernel[(triton.cdiv(count, tiles["BLOCK_N"]), stretches)](
            hidden,
            weight,
            targets.contiguous(),
            maximum,
            total,
            picked,
            count,
            vocabulary,
            width,
            hidden.stride(0),
            weight.stride(0),
            STRETCH=STRETCH,
            PRECISION="ieee",
            **tiles,
        )
    return _join(maximum, total, picked)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden [N, H], weight [V, H] and targets [N] don't fit: "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}"
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: give both in bf16, fp16 or fp32")
    if not (hidden.device == weight.device == targets.device):
        raise ValueError(f"hidden, weight and targets lie on {hidden.device}, {weight.device} and {targets.device}")
    if not (hidden.is_cuda or INTERPRETED):
        raise ValueError(f"the kernel runs on CUDA, not on {hidden.device}: use slmfast.kernels.reference there")


def _join(maximum: Tensor, total: Tensor, picked: Tensor) -> Tensor:
    """Log-probabilities fp32 [N] from the stretches' maxima and sums [S, N] and the targets' logits [N]."""
    highest = maximum.amax(0)
    return (picked - highest) - (total * (maximum - highest).exp()).sum(0).log()
