"""Means over seeds, and differences of two models with both of their errors.

A difference has two sources of error: the seeds, of which a study has a few, and the items, of which a benchmark has
some hundreds. The first is the standard error of the mean over seeds of the difference, seed by seed. The second is a
paired bootstrap over the items (as in `evaluation.paired`), with each item's value averaged over the seeds; the mean
over tasks draws the items of every task apart. Their root of squares is the error that a statement has to exceed.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from slmfast.evaluation.paired import INTERVAL, SAMPLES, paired_difference
from slmfast.study.results import MEAN, Results


class Mean(NamedTuple):
    """A mean over seeds."""

    value: float
    stderr: float | None  # the standard deviation over seeds by the root of their number; None of one seed


class Difference(NamedTuple):
    """One model's score less another's, averaged over seeds."""

    value: float
    stderr_seeds: float | None
    stderr_items: float
    low: float  # the 95 % interval of the bootstrap over items
    high: float
    n: int  # items

    @property
    def stderr(self) -> float:
        """Of both sources; of one seed the items' alone."""
        return math.hypot(self.stderr_seeds or 0.0, self.stderr_items)


def seed_mean(values: Sequence[float]) -> Mean:
    """The mean of one figure a seed, with its standard error."""
    found = np.asarray(values, dtype=np.float64)
    error = float(found.std(ddof=1) / math.sqrt(len(found))) if len(found) > 1 else None
    return Mean(float(found.mean()), error)


def difference(results: Results, model: str, less: str, task: str, seed: int = 0) -> Difference:
    """How far a model lies above another on a task, or on the mean over all tasks.

    Args:
        seed: of the bootstrap.
    """
    pairs = zip(results.values(model, task), results.values(less, task), strict=True)
    over_seeds = seed_mean([own - other for own, other in pairs])
    tasks = results.tasks if task == MEAN else [task]
    if len(tasks) == 1:
        found = paired_difference(results.item_means(model, tasks[0]), results.item_means(less, tasks[0]), seed)
        return Difference(over_seeds.value, over_seeds.stderr, found.stderr, found.low, found.high, found.n)
    steps = [_steps(results, model, less, each) for each in tasks]
    generator = np.random.default_rng(seed)
    means = np.mean([_resampled(each, generator) for each in steps], axis=0)
    low, high = np.quantile(means, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2])
    items = sum(map(len, steps))
    return Difference(*over_seeds, float(means.std(ddof=1)), float(low), float(high), items)


def _steps(results: Results, model: str, less: str, task: str) -> np.ndarray:
    """The difference of two models on every item of a task, averaged over seeds, float64 [items]."""
    own, other = (
        results.item_means(name, task).sort_by([("subset", "ascending"), ("item", "ascending")])
        for name in (model, less)
    )
    return own["value"].to_numpy() - other["value"].to_numpy()


def _resampled(steps: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The mean of as many items drawn anew, float64 [SAMPLES]; equal steps are drawn as a multinomial count."""
    distinct, counts = np.unique(steps, return_counts=True)
    return generator.multinomial(len(steps), counts / len(steps), size=SAMPLES) @ distinct / len(steps)
