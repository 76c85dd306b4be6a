"""A run held to a budget of its device's memory: planned before it starts, refused where it can't fit, enforced.

The choice is made at a run's first start and kept in its work folder's mark, so that a resumed run repeats it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from slmfast.errors import UserError
from slmfast.sizes import GIB, gib, parse_bytes
from slmfast.store import read_json, write_json
from slmfast.training.pack_budget import KEY as PACKS
from slmfast.training.settings import TrainSettings

if TYPE_CHECKING:
    from slmfast.training.memory import MemoryPlan

LAYERS = "checkpointing"  # in the work folder's mark
CONTEXT = GIB // 2  # of a device, outside of torch's allocator


def fitted(
    settings: TrainSettings, mark: Path, model: nn.Module, device: torch.device, longest: int, warmup_steps: int
) -> TrainSettings:
    """The settings with packs and checkpointing that fit the budget, or on CUDA the device where none is set.

    On a CPU without a budget nothing is planned. A budget there is that of the CUDA device for which it is planned.

    Args:
        mark: the file in the work folder that keeps the choice.
        longest: tokens of the longest sequence of the data, mismatched pairs included.

    Raises:
        UserError: it can't fit, with the settings that would make it.
    """
    if settings.budget is None and device.type != "cuda":
        return settings
    kept = read_json(mark)
    if LAYERS in kept and settings.checkpointing != "auto":  # told anew: no bit depends on it
        return settings
    if LAYERS in kept:
        return replace(settings, checkpointing=kept[LAYERS])
    if PACKS in kept:  # begun without a plan
        return settings
    # They bring in the objectives, which build on the run that asks for this.
    from slmfast.training.fake_step import Unplannable, one_line
    from slmfast.training.memory import plan_memory

    size = _budget(settings, device)
    try:
        plan = plan_memory(model, budget=size, settings=settings, longest=longest, warmup_steps=warmup_steps)
    except Unplannable as error:
        if settings.budget is not None:
            raise
        why = one_line(error.__cause__ or error)
        print(f"train {settings.method}: packs are by what is free, for no plan can be made ({why})", file=sys.stderr)
        return settings
    if not plan.fits:
        raise UserError(refusal(plan))
    packs = {PACKS: [(0, plan.settings.pack_tokens)]}  # at once: a run killed between the two would take others
    write_json(mark, kept | packs | {LAYERS: plan.settings.checkpointing})
    return plan.settings


def _budget(settings: TrainSettings, device: torch.device) -> int:
    """Bytes that the run may take: no more than the device has for it, its model's weights included."""
    told = None if settings.budget is None else parse_bytes(settings.budget)
    if device.type != "cuda":
        return told
    free, _ = torch.cuda.mem_get_info(device)
    there = free + torch.cuda.memory_reserved(device) + CONTEXT
    return there if told is None else min(told, there)


def refusal(plan: "MemoryPlan") -> str:
    """Why a run that doesn't fit is not started, and the flags that would make it fit, in one line."""
    takes = f"{gib(plan.peak_bytes)} by its plan, and a budget of {gib(plan.budget)} leaves it {gib(plan.usable_bytes)}"
    if plan.remedy is None:
        return f"this run takes {takes}: train a smaller model, or raise budget"
    flags = " ".join(f"--set {key}={'null' if value is None else value}" for key, value in plan.remedy.items())
    return f"this run takes {takes}: it would fit with {flags}"


@contextmanager
def enforced(budget: str | int | None) -> Iterator[None]:
    """Inside, torch allocates no more of the CUDA device than the budget; packs are halved where that is too little."""
    if budget is None or not torch.cuda.is_available():
        yield
        return
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, parse_bytes(budget) - CONTEXT) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
