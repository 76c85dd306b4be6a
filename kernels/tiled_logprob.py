"""The LM head by cuBLAS: a tile of fp32 logits at a time, folded by Triton into an on-line log-sum-exp.

cuBLAS multiplies faster than the fused kernel on some shapes and devices, at the price of writing and reading every
logit once. The tile's memory is fixed, whatever N and V are (launch.TILED_BYTES).

Shapes: N positions, H hidden width, V vocabulary; T vocabulary rows of a tile. The oracle is
`reference.linear_logprob`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FOLD, TILED_BYTES, tiled_shape
from .online import INTERPRETED, absorb, check_kernel_inputs, full_fp32
from .sums import LogSums


# Begin differs with every tile: specialised for its divisors, the kernel would be compiled several times.
@triton.jit(do_not_specialize=["begin"])
def _fold_kernel(
    logits_ptr,  # fp32 [N, T], contiguous
    targets_ptr,  # int64 [N]
    maximum_ptr,  # fp32 [N]
    total_ptr,  # fp32 [N]
    weighted_ptr,  # fp32 [N], used with ENTROPY alone
    picked_ptr,  # fp32 [N]
    N,
    T,
    begin,  # the tile's first row of the vocabulary
    ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = rows < N
    logit_rows = logits_ptr + rows.to(tl.int64) * T
    maximum = tl.load(maximum_ptr + rows, mask=real, other=0.0)
    total = tl.load(total_ptr + rows, mask=real, other=0.0)
    weighted = tl.zeros([BLOCK_N], tl.float32)
    if ENTROPY:
        weighted = tl.load(weighted_ptr + rows, mask=real, other=0.0)
    for start in range(0, T, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        inside = real[:, None] & (columns < T)[None, :]
        logits = tl.load(logit_rows[:, None] + columns[None, :], mask=inside, other=float("-inf"))
        # Rows past the end hold no logits: 0 keeps (-inf) - (-inf) out of them.
        logits = tl.where(real[:, None], logits, 0.0)
        maximum, total, weighted = absorb(logits, maximum, total, weighted, ENTROPY)
    tl.store(maximum_ptr + rows, maximum, mask=real)
    tl.store(total_ptr + rows, total, mask=real)
    if ENTROPY:
        tl.store(weighted_ptr + rows, weighted, mask=real)
    column = tl.load(targets_ptr + rows, mask=real, other=-1) - begin
    mine = real & (column >= 0) & (column < T)
    tl.store(picked_ptr + rows, tl.load(logit_rows + column, mask=mine, other=0.0), mask=mine)


@torch.no_grad()
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool = False, tile_bytes: int = TILED_BYTES[-1]
) -> Tensor | tuple[Tensor, Tensor]:
    """The natural log-probability of one target a position under softmax(hidden @ weight.T), fp32 [N].

    Logits are fp32 out of inputs of any dtype, never rounded to the inputs' own; fp32 inputs are multiplied in full
    fp32, never TF32. A target that is no row of `weight` gives NaN.

    Args:
        hidden: [N, H], bf16, fp16 or fp32.
        weight: [V, H], the same dtype.
        targets: int64 [N], each in 0..V-1.
        entropy: also return the entropy of the whole distribution at each position, in nats, fp32 [N].
        tile_bytes: how many bytes of logits there are at once.

    Raises:
        ValueError: shapes, dtypes or devices don't fit.
    """
    return log_sums(hidden, weight, targets, entropy=entropy, tile_bytes=tile_bytes).found(entropy)


@torch.no_grad()
def log_sums(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool = False, tile_bytes: int = TILED_BYTES[-1]
) -> LogSums:
    """What `linear_logprob` needs of the logits; it has the same arguments."""
    check_kernel_inputs(hidden, weight, targets)
    if INTERPRETED:
        hidden, weight = hidden.float(), weight.float()
    # Maximum, sum, weighted sum and the target's logit of each position.
    state = hidden.new_zeros(4, len(hidden), dtype=torch.float32)
    state[0], state[3] = -torch.inf, torch.nan
    height, _ = tiled_shape(len(hidden), len(weight), tile_bytes)
    targets = targets.contiguous()
    with torch.cuda.device(hidden.device if hidden.is_cuda else -1), full_fp32():
        for start in range(0, len(hidden), height):
            rows = slice(start, start + height)
            _fold_rows(hidden[rows], weight, targets[rows], [x[rows] for x in state], entropy, tile_bytes)
    maximum, total, weighted, picked = state
    return LogSums(picked, maximum, total, weighted)


def _fold_rows(
    hidden: Tensor, weight: Tensor, targets: Tensor, state: list[Tensor], entropy: bool, tile_bytes: int
) -> None:
    """Takes the whole vocabulary into the state of a few positions, tile by tile through one buffer."""
    count = len(hidden)
    _, width = tiled_shape(count, len(weight), tile_bytes)
    buffer = hidden.new_empty(count * width, dtype=torch.float32)
    for begin in range(0, len(weight), width):
        rows = weight[begin : begin + width]
        logits = buffer[: count * len(rows)].view(count, len(rows))
        if hidden.dtype == torch.float32:
            torch.mm(hidden, rows.T, out=logits)
        else:
            torch.mm(hidden, rows.T, out_dtype=torch.float32, out=logits)
        _fold_kernel[(triton.cdiv(count, FOLD.block_n),)](
            logits, targets, *state, count, len(rows), begin, ENTROPY=entropy, **FOLD.constants, **FOLD.options
        )
