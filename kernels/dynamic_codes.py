"""The 8-bit codes of the optimizer's states: values of a block of 256 relative to the block's largest magnitude.

The codes are dense near the block's maximum and reach down by decades (Dettmers et al. 2022, "8-bit Optimizers via
Block-wise Quantization", arXiv 2110.02861, section 2.1): a decade [10^-(d+1), 10^-d] holds half as many values as the
decade above it, in the middles of equal parts. Two things are ours:

- First moments are a sign and 7 bits of magnitude, so that both signs are treated alike.
- A positive second moment never gets the code of 0. Under a first moment that did not vanish it would leave the
  division to Adam's epsilon alone, and the step could grow by orders of magnitude. It gets the smallest code instead.

The nearest code is found without a search: the upper half of a normalised value's fp32 bits names a cell, and no cell
holds more than one of the edges between codes.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256  # weights that share one largest magnitude
FIRST_CELL = 0x3400  # the upper half of 2^-23: every edge but the one at 0 lies above it
LAST_CELL = 0x3F80  # the upper half of 1
CELLS = LAST_CELL - FIRST_CELL + 1
LEAST_SCALE = 2.0**-126  # a block whose largest magnitude is no normal number is all zeros


class Codes(NamedTuple):
    """The tables of one moment; M magnitudes, 128 for the first moment and 256 for the second."""

    values: Tensor  # fp32 [256]: what a code stands for, relative to the block's largest magnitude
    edges: Tensor  # fp32 [M]: a magnitude above edges[i] belongs to a later code than i; the last is infinity
    cells: Tensor  # uint8 [CELLS]: the code of the least magnitude in each cell


@functools.cache
def codes(signed: bool, device: torch.device | None = None) -> Codes:
    """The tables for first (signed) or second moments, on a device."""
    magnitudes = _magnitudes(6 if signed else 7)
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    if not signed:
        middles[0] = 0.0
    edges = torch.cat([middles, torch.tensor([torch.inf], dtype=torch.float64)]).float()
    least = (torch.arange(FIRST_CELL, LAST_CELL + 1, dtype=torch.int32) << 16).view(torch.float32)
    least[0] = 0.0  # smaller magnitudes are in the first cell too
    cells = torch.searchsorted(edges, least)  # the number of edges below each
    values = magnitudes.float()
    if signed:
        values = torch.cat([values, -values])
    return Codes(*(table.contiguous().to(device) for table in (values, edges, cells.to(torch.uint8))))


def _magnitudes(decades: int) -> Tensor:
    """0, the values of the decades, 2 in the lowest and twice as many in each one above it, and 1; float64."""
    found = [torch.zeros(1, dtype=torch.float64)]
    for place in range(decades):
        count = 2 << place
        middles = 0.1 + 0.9 * (torch.arange(count, dtype=torch.float64) + 0.5) / count
        found.append(middles * 10.0 ** (place + 1 - decades))
    return torch.cat([*found, torch.ones(1, dtype=torch.float64)])
