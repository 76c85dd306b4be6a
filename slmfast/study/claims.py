"""The paper's statements, held against what the study measured: S1 above base, S3 above S1, fused above all singles.

A statement holds if the difference of the means over all tasks is above its standard error, that of seeds and items
together. The best single model is the one of S1, S2 and S3 with the highest mean over seeds; being chosen by the same
items that it is measured on, it looks a little better than it is, which makes the third statement the harder to meet.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slmfast.model_folder import ModelWeights
from slmfast.recipe import TRAINED
from slmfast.store import read_json
from slmfast.study.errors import Difference, difference, seed_mean
from slmfast.study.plan import BASE, FUSED, Plan, written
from slmfast.study.results import MEAN, Results


def claims(results: Results, seed: int, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Each statement with the difference, its errors, whether it holds, and in words why or why not.

    Args:
        seed: of the bootstrap.
        facts: what `training_facts` found.
    """
    best = max(TRAINED, key=lambda name: seed_mean(results.values(name, MEAN)).value)
    pairs = [("S1 > base", "S1", BASE), ("S3 > S1", "S3", "S1"), ("fused > best single", FUSED, best)]
    found = []
    for statement, model, less in pairs:
        gap = difference(results, model, less, MEAN, seed)
        holds = gap.value > gap.stderr
        words = _words(model, less, gap, len(results.seeds))
        if not holds:
            words += _why(model, less, facts)
        found.append(
            {"statement": statement, "model": model, "less": less}
            | gap._asdict()
            | {"stderr": gap.stderr, "holds": holds, "words": words}
        )
    return found


def better_rates(plan: Plan, results: Results, seed: int) -> str:
    """What qualifies the statements: the rates at which SFT alone does better than S1, in words, or nothing.

    Args:
        seed: of the bootstrap.
    """
    found = []
    for rate in plan.rates:
        gap = difference(results, rate.name, "S1", MEAN, seed)
        if gap.value > gap.stderr:
            beside = difference(results, rate.name, FUSED, MEAN, seed)
            found.append(
                f"SFT at {written(rate.settings.learning_rate)} lies {100 * gap.value:.1f} ± {100 * gap.stderr:.1f} "
                f"points above it, and {abs(100 * beside.value):.1f} ± {100 * beside.stderr:.1f} "
                f"{'above' if beside.value >= 0 else 'below'} the fused model."
            )
    return " ".join(["S1's rate is not the best for SFT alone:", *found]) if found else ""


def _words(model: str, less: str, gap: Difference, seeds: int) -> str:
    points, error = 100 * gap.value, 100 * gap.stderr
    if gap.value == gap.stderr == 0:
        return f"{model} answers every item as {less} does."
    measured = f"{model} lies {abs(points):.1f} ± {error:.1f} points {'above' if points >= 0 else 'below'} {less}"
    if gap.value > gap.stderr:
        beyond = "beyond its standard error"
        return (
            f"{measured}, {beyond}{' and beyond twice that' if gap.value > 2 * gap.stderr else ', though not twice'}."
        )
    if gap.value < -gap.stderr:
        return f"{measured}, beyond the standard error, but the wrong way."
    seen = f"{seeds} seed{'s' * (seeds > 1)} and {gap.n:,} items"
    return f"{measured}: {seen} don't tell the two apart."


def _why(model: str, less: str, facts: dict[str, Any]) -> str:
    if (model, less) == ("S3", "S1"):
        share, margin = facts.get("S3_update_over_S1"), facts.get("S3_margin")
        words = ""
        if share is not None:
            words += f" KTO moved the weights of S1 by {share:.1%} of the distance that SFT had moved the base's"
            words += "" if margin is None else f", to a reward margin of {margin:.3f} (0 is where it began)"
            words += ": " + ("too little to show." if share < 0.2 else "it did move, but hardly towards these tasks.")
        return words
    if model == FUSED:
        return (
            " An average lies between its parts: it is above all of them only where their errors differ. "
            f"{less} is the best of three by the very items that it is measured on."
        )
    return " At this rate and on these sets SFT did not carry over to the tasks."


def training_facts(seed_folders: list[Path], base: Path) -> dict[str, Any]:
    """How far S3 was moved from S1, by the share of S1's own distance from the base, and S3's last reward margin.

    Means over the seeds; a figure that a log hasn't got is left out.
    """
    shares, margins = [], []
    for folder in seed_folders:
        train = folder / "train"
        shares.append(_distance(train / "S1", train / "S3") / (_distance(base, train / "S1") or math.nan))
        log = [row["margin"] for row in read_json(train / "S3" / "training_log.json") if "margin" in row]
        if log:
            margins.append(float(np.mean(log[-max(1, len(log) // 10) :])))
    facts = {"S3_update_over_S1": float(np.mean(shares)), "S3_margin": float(np.mean(margins)) if margins else None}
    return {name: value for name, value in facts.items() if value is not None and math.isfinite(value)}


def _distance(first: Path, second: Path) -> float:
    """The Euclidean distance of two models' weights, a tensor at a time."""
    with ModelWeights(first) as one, ModelWeights(second) as other:
        steps = (one[name].float().sub_(other[name]) for name in one.names)
        squares = [float(step.square_().sum(dtype=torch.float64)) for step in steps]
    return math.sqrt(math.fsum(squares))
