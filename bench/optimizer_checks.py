"""The 8-bit AdamW kernel on a device against its twin on the CPU: after each step all bits are the same.

Rows are those of kernel_checks.check_all; "error" counts the places that differ.
"""

from typing import Any

import torch
from torch import Tensor

from slmfast.kernels.adamw8bit_op import adamw8bit
from slmfast.kernels.dynamic_codes import BLOCK
from slmfast.training.split_weights import split

STEPS = 5
COUNTS = (1, 255, 4096, 1_000_003, 896 * 4864)
SPREADS = (0.02, 0.5)  # of the weights; the larger ones are compensated in every other block
RATE, BETA1, BETA2, EPSILON = 1e-8, 0.9, 0.999, 1e-8


def check_optimizer(device: torch.device, counts: tuple[int, ...] = COUNTS, seed: int = 0) -> list[dict[str, Any]]:
    """A row for every number of weights and spread: {"kernel", "case", "output", "error", "budget", "passed"}."""
    rows = []
    for count in counts:
        for spread in SPREADS:
            differing = _differing(count, spread, device, seed)
            rows.append(
                {
                    "kernel": "adamw8bit",
                    "case": f"N={count}, weights of {spread}, {STEPS} steps",
                    "output": "weights and states",
                    "error": differing,
                    "budget": 0,
                    "passed": differing == 0,
                }
            )
    return rows


def _differing(count: int, spread: float, device: torch.device, seed: int) -> int:
    """In how many places weights and states differ after some steps on the same gradients, from the same start."""
    generator = torch.Generator().manual_seed(seed)
    host = _start(torch.randn(count, generator=generator) * spread, compensated=spread > 0.1)
    there = [tensor.to(device, copy=True) for tensor in host]
    for number in range(1, STEPS + 1):
        gradient = torch.randn(count, generator=generator) * 10 ** (torch.rand(count, generator=generator) * 8 - 10)
        for tensors in (host, there):
            high, low, *states = tensors
            given = gradient.to(high.device)
            adamw8bit(high, low, given, *states, RATE, BETA1, BETA2, EPSILON, number)
    return sum(int((mine != other.cpu()).sum()) for mine, other in zip(host, there, strict=True))


def _start(weights: Tensor, compensated: bool) -> list[Tensor]:
    """Halves, states, slots and lowest bits before the first step, in the operator's order."""
    high, low = split(weights)
    count, rows = len(weights), -(-len(weights) // BLOCK)
    slots = torch.empty(0, dtype=torch.int32)
    if compensated:
        slots = torch.full((rows,), -1, dtype=torch.int32)
        slots[::2] = torch.arange(len(slots[::2]), dtype=torch.int32)
    lowest = torch.zeros(len(slots[::2]), BLOCK, dtype=torch.int16)
    codes = [torch.zeros(count, dtype=torch.uint8) for _ in range(2)]
    scales = [torch.zeros(rows) for _ in range(2)]
    return [high.view(torch.int16), low, *codes, *scales, slots, lowest]
