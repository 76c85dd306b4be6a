"""What the Triton kernels of the LM head share: a tile of logits, the on-line log-sum-exp, and what may enter.

Shapes: N positions, H hidden width, V vocabulary.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import check_shapes

# Triton reads this when a kernel is decorated; with it set, kernels run on CPU tensors in numpy.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def product(
    hidden_rows,  # [BLOCK_N, 1], pointers to rows of hidden
    weight_columns,  # [1, BLOCK_V], pointers to rows of the weight
    real,  # [BLOCK_N], which rows there are
    inside,  # [BLOCK_V], which words there are
    H,
    EVEN_H: tl.constexpr,  # BLOCK_H divides H: no mask along it
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The logits of one tile, fp32 [BLOCK_N, BLOCK_V]; 0 where there is no row or no word."""
    logits = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for start in range(0, H, BLOCK_H):
        inner = start + tl.arange(0, BLOCK_H)
        if EVEN_H:
            a = tl.load(hidden_rows + inner[None, :], mask=real[:, None], other=0.0)
            b = tl.load(weight_columns + inner[:, None], mask=inside[None, :], other=0.0)
        else:
            a = tl.load(hidden_rows + inner[None, :], mask=real[:, None] & (inner < H)[None, :], other=0.0)
            b = tl.load(weight_columns + inner[:, None], mask=inside[None, :] & (inner < H)[:, None], other=0.0)
        logits = tl.dot(a, b, logits, input_precision=PRECISION)
    return logits


@triton.jit
def absorb(logits, maximum, total, weighted, ENTROPY: tl.constexpr):
    """Takes one tile of logits l [BLOCK_N, BLOCK_V] into the running state of its rows, each fp32 [BLOCK_N].

    The state is the maximum m, the sum of exp(l - m), and with ENTROPY the sum of exp(l - m) (l - m): about the
    maximum, since a sum of exp(l - m) l would lose the bits that the size of l takes. Columns at -inf count nothing.
    """
    higher = tl.maximum(maximum, tl.max(logits, 1))
    shrink = tl.exp(maximum - higher)
    shifted = logits - higher[:, None]
    exponentials = tl.exp(shifted)
    if ENTROPY:
        # Before the first tile m is -inf and the sum 0, whose product would be NaN.
        moved = tl.where(total > 0, weighted + (maximum - higher) * total, 0.0)
        weighted = moved * shrink + tl.sum(tl.where(exponentials > 0, exponentials * shifted, 0.0), 1)
    total = total * shrink + tl.sum(exponentials, 1)
    return higher, total, weighted


def check_kernel_inputs(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Raises ValueError where shapes, dtypes or devices are not what a kernel takes."""
    check_shapes(hidden, weight, targets)
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: give both in bf16, fp16 or fp32")
    if not (hidden.device == weight.device == targets.device):
        raise ValueError(f"hidden, weight and targets lie on {hidden.device}, {weight.device} and {targets.device}")
    if not (hidden.is_cuda or INTERPRETED):
        raise ValueError(f"the kernel runs on CUDA, not on {hidden.device}: use slmfast.kernels.reference there")


@contextmanager
def full_fp32() -> Iterator[None]:
    """No TF32 in the products of this block, whatever the process has allowed."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = allowed
