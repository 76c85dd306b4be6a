"""The memory that a call takes beyond what was held before: the process's peak on a CPU, the allocator's on CUDA."""

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peak_memory import peak_resident


@dataclass(frozen=True)
class Measured:
    """What a call gave, and what it took."""

    value: Any
    seconds: float
    bytes: int


def transient(call: Callable[[], Any], device: torch.device) -> Measured:
    """Runs a call once, and compares the peak with what was held when it began.

    Raises:
        OSError: on a CPU, where the system does not tell a process its peak (it is measured on Linux only).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        give_back_freed()
        before = peak_resident(reset=True)
    start = time.perf_counter()
    value = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    after = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()
    return Measured(value, seconds, after - before)


def give_back_freed() -> None:
    """Has the C library return freed memory to the system, or a call would use it again without being seen to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc has it, other C libraries have not
        trim(0)
