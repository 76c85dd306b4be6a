"""What `slmfast plan` prints: a plan's table, what would make it fit, and TRL's plan for the same beside it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from slmfast.sizes import gib
from slmfast.training.memory import RESERVE, MemoryPlan, load_config, plan_memory
from slmfast.training.peer_memory import VERSION, trl_peak
from slmfast.training.settings import TrainSettings

_FLAGS = {"optimizer": "--optimizer", "forward": "--forward", "max_length": "--max-length"}
_FLAGS |= {"checkpointing": "--checkpointing", "pack_tokens": "--pack-tokens"}
_TRAINERS = {"kto": "KTOTrainer", "sft": "SFTTrainer"}


def report(folder: Path, settings: TrainSettings, budget: str) -> Iterator[str]:
    """The lines about a run of `settings` on the model of a folder, each as soon as it is known."""
    what = f"{settings.method.upper()} of {folder.resolve().name} within {budget}"
    plan = plan_memory(folder, budget=budget, settings=settings)
    yield f"{what}: a plan for a CUDA device, nothing is measured"
    yield _summary(plan)
    yield ""
    yield from _table(plan)
    yield ""
    yield _verdict(plan)
    if not plan.weights_known:
        yield "no weights are here: what compensates those too large for small steps, 2 or 4 bytes each, is not counted"
    yield ""
    yield from _beside_trl(folder, plan)


def _summary(plan: MemoryPlan) -> str:
    told = plan.settings
    layers = "layers checkpointed" if told.checkpointing == "on" else "no layer checkpointed"
    return (
        f"{told.optimizer}, {told.forward} forward, sequences of at most {plan.longest:,} tokens, packs of at most "
        f"{told.pack_tokens:,} tokens, {layers}"
    )


def _table(plan: MemoryPlan) -> Iterator[str]:
    for name, size in (*plan.rows, ("total", plan.peak_bytes)):
        yield f"{name:<18}{gib(size):>12}"
    reserve = f"{gib(plan.budget)} less {gib(RESERVE)} for the device's context, cuBLAS and what fragments"
    yield f"{'usable':<18}{gib(plan.usable_bytes):>12}   {reserve}"


def _verdict(plan: MemoryPlan) -> str:
    if plan.fits:
        return "fits"
    if plan.remedy is None:
        return "does not fit, whatever the settings: take a smaller model or a larger budget"
    return f"does not fit; it would {flags(plan.remedy)}"


def flags(remedy: Any) -> str:
    """Changes of settings as flags of `slmfast plan`, after "it would"."""
    left_out = [_FLAGS[key] for key, value in remedy.items() if value is None]
    given = [f"{_FLAGS[key]} {value}" for key, value in remedy.items() if value is not None]
    parts = ([f"with {' '.join(given)}"] if given else []) + ([f"without {' '.join(left_out)}"] if left_out else [])
    return " and ".join(parts)


def _beside_trl(folder: Path, plan: MemoryPlan) -> Iterator[str]:
    told, length = plan.settings, plan.longest
    together = told.batch_size * length
    trainer = _TRAINERS[told.method]
    yield f"beside TRL {VERSION}'s {trainer} with its defaults (fp32 weights, bf16 autocast, AdamW of fp32 states,"
    yield f"checkpointing) in batches of {told.batch_size} x {length:,} tokens, planned by the same count:"
    config = load_config(folder)
    theirs = {trainer: trl_peak(config, told.method, told.batch_size, length)}
    if told.method == "kto":
        theirs["references precomputed"] = trl_peak(config, told.method, told.batch_size, length, precomputed=True)
    totals = {name: sum(kinds.values()) for name, kinds in theirs.items()}
    for name, total in totals.items():
        yield f"  {f'TRL, {name}':<50}{gib(total):>12}"
    for tokens in (together, length):  # the same tokens at once, and the least that a step can be taken in
        smaller = replace(told, pack_tokens=tokens, checkpointing="on")
        ours = plan_memory(folder, budget=plan.budget, settings=smaller, seek_remedy=False).peak_bytes
        shares = ", ".join(f"{ours / total:.2f}x" for total in totals.values())
        yield f"  {f'slmfast, packs of {tokens:,} tokens, checkpointed':<50}{gib(ours):>12}   {shares}"
