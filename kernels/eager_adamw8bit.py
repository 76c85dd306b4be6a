"""The CPU's twin of adamw8bit.py: the same operations in the same order, and so the same bits, in compiled loops.

Each block of 256 weights is one piece of work that stays in the first cache; threads share the blocks out, and no
result depends on how many there are. The arguments are those of `adamw8bit.step`.
"""

import math
from collections.abc import Sequence

import numba
import numpy as np
import torch
from numba import float32, int32, uint32
from torch import Tensor

from .adamw8bit_op import PLACE_STRIDE, STEP_STRIDE
from .dynamic_codes import BLOCK, CELLS, FIRST_CELL, LEAST_SCALE, codes

_BLOCKS_A_CHUNK = 64  # of one piece of work for a thread: 16,384 weights
_UNITS, _UNIT = np.float32(2.0**39), np.float32(2.0**-39)
_SPACINGS, _THRESHOLD_UNIT = np.float32(2.0**23), np.float32(2.0**-24)
_PLACE_STRIDE, _STEP_STRIDE = np.uint32(PLACE_STRIDE), np.uint32(STEP_STRIDE)
_LEAST = np.float32(LEAST_SCALE)
_ZERO, _HALF, _ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)
_TOP, _BOTTOM = np.float32(32767.0), np.float32(-32768.0)
# The loops run over 32-bit integers throughout, twice as many to a vector as numba's own.
_NONE, _ONCE, _SIXTEEN, _SIGN = np.int32(0), np.int32(1), np.int32(16), np.int32(128)
_FIRST_CELL, _LAST_PLACE = np.int32(FIRST_CELL), np.int32(CELLS - 1)
_MAGNITUDE, _EXPONENT, _INVERSE = np.int32(0x7FFFFFFF), np.int32(0x7F800000), np.int32(0x7F000000)
_HALF_STEP, _NAN = np.int32(0x8000), np.int32(0x7FC00000)
_compiled = numba.njit(nogil=True, error_model="numpy")


def step(
    high: Tensor,
    low: Tensor,
    gradient: Tensor,
    moments: Sequence[Tensor],
    slots: Tensor,
    lowest: Tensor,
    scalars: Sequence[float],
    number: int,
) -> None:
    """Moves weights and states in place; see `adamw8bit.step`."""
    tensors = (high, low, gradient, *moments, slots, lowest, *codes(True), *codes(False))
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    _all_blocks(*(tensor.numpy() for tensor in tensors), *(np.float32(scalar) for scalar in scalars), number)


@numba.njit(nogil=True, parallel=True, error_model="numpy")
def _all_blocks(
    high,
    low,
    gradient,
    first,
    second,
    first_scale,
    second_scale,
    slots,
    lowest,
    first_values,
    first_edges,
    first_cells,
    second_values,
    second_edges,
    second_cells,
    beta1,
    rest1,
    beta2,
    rest2,
    size,
    inverse_root,
    epsilon,
    number,
):
    count, rows = len(high), len(first_scale)
    chunks = (rows + _BLOCKS_A_CHUNK - 1) // _BLOCKS_A_CHUNK
    for chunk in numba.prange(chunks):
        # The same memory as numbers and as bits.
        m, v = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
        m_bits, v_bits = m.view(np.int32), v.view(np.int32)
        w, relative = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
        w_bits = w.view(np.int32)
        for block in range(chunk * _BLOCKS_A_CHUNK, min(rows, (chunk + 1) * _BLOCKS_A_CHUNK)):
            start = block * BLOCK
            end = min(count, start + BLOCK)
            g = gradient[start:end]
            _advance(m, first[start:end], first_values, first_scale[block], beta1, rest1, g, False)
            _advance(v, second[start:end], second_values, second_scale[block], beta2, rest2, g, True)
            first_scale[block] = _encode(m, m_bits, relative, first[start:end], first_edges, first_cells)
            second_scale[block] = _encode(v, v_bits, relative, second[start:end], second_edges, second_cells)
            for i in range(end - start):
                m[i] = m[i] / (math.sqrt(v[i]) * inverse_root + epsilon) * size
            for i in range(end - start):
                w_bits[i] = (int32(high[start + i]) << _SIXTEEN) + int32(low[start + i])
            if len(slots) and slots[block] >= 0:
                _move_compensated(w, w_bits, m, lowest[slots[block], : end - start])
            else:
                _move(w, w_bits, m, end - start, start, number)
            _write_halves(w, w_bits, high[start:end], low[start:end])


@_compiled
def _advance(moment, code, values, scale, beta, rest, gradient, square):
    """Decodes a moment and takes the gradient in, or its square."""
    for i in range(len(code)):
        g = gradient[i] * gradient[i] if square else gradient[i]
        moment[i] = values[code[i]] * scale * beta + g * rest


@_compiled
def _encode(moment, bits, relative, code, edges, cells):
    """Writes the nearest codes of a moment, and returns the block's largest magnitude, 0 where it is no normal number.

    The largest is found by bits, where NaN is above infinity: a comparison of numbers would pass over it.
    """
    count = len(code)
    most = np.zeros(1, np.int32)
    for i in range(count):
        most[0] = max(most[0], bits[i] & _MAGNITUDE)
    largest = most.view(np.float32)[0]
    if largest < _LEAST:
        largest, inverse = _ZERO, _ZERO
    else:
        inverse = _ONE / largest
    signed = len(edges) == BLOCK // 2
    relative_bits = relative.view(np.int32)
    for i in range(count):
        relative[i] = abs(moment[i]) * inverse
    for i in range(count):
        place = ((relative_bits[i] & _MAGNITUDE) >> _SIXTEEN) - _FIRST_CELL
        guess = int32(cells[min(max(place, _NONE), _LAST_PLACE)])
        found = guess + int32(relative[i] > edges[guess])
        code[i] = found | _SIGN if signed and moment[i] < _ZERO else found
    return largest


@_compiled
def _move(weight, bits, step, count, start, number):
    """Adds the step to the weights; some sums are rounded away from their nearest number, see adamw8bit.py."""
    power_bits = np.empty(BLOCK, np.int32)
    power, lost = power_bits.view(np.float32), np.empty(BLOCK, np.float32)
    for i in range(count):
        moved = weight[i] + step[i]
        lost[i] = step[i] - (moved - weight[i])
        weight[i] = moved
    for i in range(count):
        power_bits[i] = _INVERSE - (bits[i] & _EXPONENT)
    for i in range(count):
        threshold = uint32(uint32(start + i) * _PLACE_STRIDE + uint32(number) * _STEP_STRIDE) >> uint32(8)
        further = abs(lost[i]) * power[i] * _SPACINGS > float32(threshold) * _THRESHOLD_UNIT
        outward = (lost[i] < _ZERO) == (weight[i] < _ZERO)
        bits[i] += (_ONCE if outward else -_ONCE) if further else _NONE


@_compiled
def _move_compensated(weight, bits, step, lowest):
    """Adds the step and what `lowest` holds to the weights, and leaves there what fp32 can't hold."""
    power_bits = np.empty(1, np.int32)
    power = power_bits.view(np.float32)
    for i in range(len(lowest)):
        power_bits[0] = bits[i] & _EXPONENT
        wanted = float32(lowest[i]) * (power[0] * _UNIT) + step[i]
        moved = weight[i] + wanted
        lost = wanted - (moved - weight[i])
        weight[i] = moved
        power_bits[0] = _INVERSE - (bits[i] & _EXPONENT)
        units = np.floor(lost * power[0] * _UNITS + _HALF)
        units = units if units < _TOP else _TOP
        lowest[i] = units if units > _BOTTOM else _BOTTOM


@_compiled
def _write_halves(weight, bits, high, low):
    for i in range(len(high)):
        whole = bits[i] if weight[i] == weight[i] else _NAN
        upper = (whole + _HALF_STEP) >> _SIXTEEN
        high[i] = upper
        low[i] = whole - (upper << _SIXTEEN)
