"""One step of 8-bit block-wise AdamW on split fp32 weights, in Triton: everything in one pass over memory.

A weight is the fp32 number whose bits are (high << 16) + low: high is a bf16 number, the nearest one, and low a signed
16-bit integer. The states are 8-bit codes with one fp32 scale to 256 weights (see dynamic_codes).

A step at a rate of 1e-8 is about as long as the spacing of fp32 numbers at 0.1, and rounding to the nearest swallows
most of the short ones. In blocks whose weights are the coarsest, `lowest` carries the mantissa 16 bits further (Kahan
summation with a residual of 16 bits). Elsewhere a sum is rounded away from its nearest number where what rounding lost,
in spacings, exceeds a threshold that runs evenly through [0, 1) over the steps: a Weyl sequence of the golden ratio,
which begins elsewhere at each place. So losses are made up for on average, without memory and without chance.

Every operation is one correctly rounded fp32 operation in a fixed order, without contraction to fused multiply-adds:
the twin in eager_adamw8bit.py gives the same bits on a CPU.

Shapes: N weights, B = ceil(N / 256) blocks, C compensated blocks.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adamw8bit_op import PLACE_STRIDE, STEP_STRIDE
from .dynamic_codes import BLOCK, CELLS, FIRST_CELL, LEAST_SCALE, codes
from .launch import ADAMW8BIT, Adamw8bitBlocks
from .online import INTERPRETED

_FIRST_CELL = tl.constexpr(FIRST_CELL)
_LAST_PLACE = tl.constexpr(CELLS - 1)
_LEAST_SCALE = tl.constexpr(LEAST_SCALE)
_UNITS = tl.constexpr(2.0**39)  # of `lowest` in the power of two at or below the weight: 2^16 in its spacing
_UNIT = tl.constexpr(2.0**-39)
_SPACINGS = tl.constexpr(2.0**23)
_PLACE_STRIDE, _STEP_STRIDE = tl.constexpr(PLACE_STRIDE), tl.constexpr(STEP_STRIDE)
_THRESHOLD_UNIT = tl.constexpr(2.0**-24)


@triton.jit
def _magnitude_scale(moment, real):
    """The largest magnitude of each row of moment fp32 [R, 256] and its inverse, both 0 where it is no normal number.

    The largest is found by bits, where NaN is above infinity: a comparison of numbers would pass over it.
    """
    magnitudes = tl.where(real, moment.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    largest = tl.max(magnitudes, 1).to(tl.float32, bitcast=True)
    normal = (largest >= _LEAST_SCALE) | (largest != largest)
    return tl.where(normal, largest, 0.0), tl.where(normal, tl.div_rn(1.0, largest), 0.0)


@triton.jit
def _nearest(relative, edges_ptr, cells_ptr):
    """The codes, int32, of magnitudes relative to their block's largest."""
    # The mask takes the sign off a NaN, which processors set differently.
    place = ((relative.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 16) - _FIRST_CELL
    guess = tl.load(cells_ptr + tl.minimum(tl.maximum(place, 0), _LAST_PLACE)).to(tl.int32)
    return guess + (relative > tl.load(edges_ptr + guess)).to(tl.int32)


# The step's number differs with every call: specialised for its divisors, the kernel would be compiled several times.
@triton.jit(do_not_specialize=["number"])
def _step_kernel(
    high_ptr,  # int16 [N]: the bits of bf16
    low_ptr,  # int16 [N]
    gradient_ptr,  # fp32 [N]
    first_ptr,  # uint8 [N]: codes of exp_avg
    second_ptr,  # uint8 [N]: codes of exp_avg_sq
    first_scale_ptr,  # fp32 [B]
    second_scale_ptr,  # fp32 [B]
    slots_ptr,  # int32 [B]: which row of lowest is a block's, -1 for none; read with COMPENSATED alone
    lowest_ptr,  # int16 [C, 256]
    first_values_ptr,  # fp32 [256], and the other tables of dynamic_codes
    first_edges_ptr,
    first_cells_ptr,
    second_values_ptr,
    second_edges_ptr,
    second_cells_ptr,
    N,
    B,
    beta1,
    rest1,  # 1 - beta1
    beta2,
    rest2,
    size,  # -rate / (1 - beta1^t)
    inverse_root,  # 1 / sqrt(1 - beta2^t)
    epsilon,
    number,  # of the step
    COMPENSATED: tl.constexpr,
    ROWS: tl.constexpr,  # blocks of a program
    WIDTH: tl.constexpr,  # 256
):
    blocks = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.arange(0, WIDTH)[None, :]
    places = blocks.to(tl.int64)[:, None] * WIDTH + inside
    real, whole = places < N, blocks < B

    gradient = tl.load(gradient_ptr + places, mask=real, other=0.0)
    code = tl.load(first_ptr + places, mask=real, other=0).to(tl.int32)
    scale = tl.load(first_scale_ptr + blocks, mask=whole, other=0.0)
    first = tl.load(first_values_ptr + code) * scale[:, None] * beta1 + gradient * rest1
    code = tl.load(second_ptr + places, mask=real, other=0).to(tl.int32)
    scale = tl.load(second_scale_ptr + blocks, mask=whole, other=0.0)
    second = tl.load(second_values_ptr + code) * scale[:, None] * beta2 + gradient * gradient * rest2

    scale, inverse = _magnitude_scale(first, real)
    code = _nearest(tl.abs(first) * inverse[:, None], first_edges_ptr, first_cells_ptr)
    code = tl.where(first < 0, code | 128, code)
    tl.store(first_ptr + places, code.to(tl.uint8), mask=real)
    tl.store(first_scale_ptr + blocks, scale, mask=whole)
    scale, inverse = _magnitude_scale(second, real)
    code = _nearest(second * inverse[:, None], second_edges_ptr, second_cells_ptr)
    tl.store(second_ptr + places, code.to(tl.uint8), mask=real)
    tl.store(second_scale_ptr + blocks, scale, mask=whole)

    step = tl.div_rn(first, tl.sqrt_rn(second) * inverse_root + epsilon) * size
    high = tl.load(high_ptr + places, mask=real, other=0).to(tl.int32)
    bits = (high << 16) + tl.load(low_ptr + places, mask=real, other=0).to(tl.int32)
    weight = bits.to(tl.float32, bitcast=True)
    if COMPENSATED:
        slots = tl.load(slots_ptr + blocks, mask=whole, other=-1)
        held = real & (slots >= 0)[:, None]
        lowest_places = lowest_ptr + slots.to(tl.int64)[:, None] * WIDTH + inside
        power = (bits & 0x7F800000).to(tl.float32, bitcast=True)
        lowest = tl.load(lowest_places, mask=held, other=0).to(tl.float32)
        step = lowest * (power * _UNIT) + step
    moved = weight + step
    lost = step - (moved - weight)
    bits = moved.to(tl.int32, bitcast=True)
    inverse_power = (0x7F000000 - (bits & 0x7F800000)).to(tl.float32, bitcast=True)
    threshold = ((places.to(tl.uint32) * _PLACE_STRIDE + number.to(tl.uint32) * _STEP_STRIDE) >> 8).to(tl.float32)
    further = tl.abs(lost) * inverse_power * _SPACINGS > threshold * _THRESHOLD_UNIT
    if COMPENSATED:
        further = further & (slots < 0)[:, None]
        units = tl.floor(lost * inverse_power * _UNITS + 0.5)
        units = tl.where(units < 32767.0, units, 32767.0)
        units = tl.where(units > -32768.0, units, -32768.0)
        tl.store(lowest_places, units.to(tl.int16), mask=held)
    bits += tl.where(further, tl.where((lost < 0) == (moved < 0), 1, -1), 0)
    bits = tl.where(moved == moved, bits, 0x7FC00000)
    high = (bits + 0x8000) >> 16
    tl.store(high_ptr + places, high.to(tl.int16), mask=real)
    tl.store(low_ptr + places, (bits - (high << 16)).to(tl.int16), mask=real)


def step(
    high: Tensor,
    low: Tensor,
    gradient: Tensor,
    moments: Sequence[Tensor],
    slots: Tensor,
    lowest: Tensor,
    scalars: Sequence[float],
    number: int,
    blocks: Adamw8bitBlocks = ADAMW8BIT,
) -> None:
    """Moves weights and states in place; the arguments are those of `adamw8bit_op.adamw8bit`, checked there.

    Args:
        high: int16 [N], the bits of bf16.
        low: int16 [N].
        gradient: fp32 [N].
        moments: the codes of exp_avg and exp_avg_sq, uint8 [N], and their scales, fp32 [B].
        slots: int32 [B], the block's row in `lowest` or -1; [0] where no block is compensated.
        lowest: int16 [C, 256].
        scalars: beta1, 1 - beta1, beta2, 1 - beta2, -rate / (1 - beta1^t), 1 / sqrt(1 - beta2^t), epsilon.
        number: t, from 1.

    Raises:
        ValueError: the tensors lie on a CPU, and Triton does not interpret.
    """
    if not (high.is_cuda or INTERPRETED):
        raise ValueError(f"the kernel runs on CUDA, not on {high.device}: use slmfast.kernels.eager_adamw8bit there")
    count, rows = high.numel(), moments[2].numel()
    tables = [*codes(True, high.device), *codes(False, high.device)]
    with torch.cuda.device(high.device if high.is_cuda else -1):
        _step_kernel[(triton.cdiv(rows, blocks.rows),)](
            high,
            low,
            gradient,
            *moments,
            slots,
            lowest,
            *tables,
            count,
            rows,
            *scalars,
            number,
            COMPENSATED=len(slots) > 0,
            WIDTH=BLOCK,
            **blocks.constants,
            **blocks.options,
        )
