"""The study's figures, each error bar or band one standard error over seeds to both sides."""

from pathlib import Path
from typing import Any

import numpy as np

from slmfast.recipe import TRAINED
from slmfast.reporting import plots
from slmfast.reporting.document import Plot
from slmfast.store import read_json
from slmfast.study.errors import seed_mean
from slmfast.study.plan import BASE, FUSED, Plan, written
from slmfast.study.results import MEAN, Results
from slmfast.study.tables import Published, columns, published_score

POINTS = "points of a hundred"
ERRORS = "one standard error over seeds to each side"


def overview(results: Results) -> Plot:
    """All five models by task."""
    names = [BASE, *TRAINED, FUSED]
    series = {name: [_point(results, name, task) for task in columns(results)] for name in names}
    return Plot(f"Scores by task; {ERRORS}", plots.points(columns(results), series, POINTS))


def against_base(results: Results, model: str, caption: str, published: Published) -> Plot:
    """One model beside the base by task as bars; with the paper's where it has any."""
    names = columns(results)
    found = {name: [_point(results, name, task) for task in names] for name in (BASE, model)}
    values = {name: [value for value, _ in column] for name, column in found.items()}
    errors = {BASE: [np.nan] * len(names), model: [error for _, error in found[model]]}
    if published and model != FUSED:
        for name in (BASE, model):
            scores = [published_score(results, published, name, task) for task in names]
            values[f"paper: {name}"] = [np.nan if score is None else score for score in scores]
            errors[f"paper: {name}"] = [np.nan] * len(names)
    own = (BASE, *TRAINED, FUSED).index(model)
    return Plot(f"{caption}; {ERRORS}", plots.bars(names, values, POINTS, errors, (0, own, 5, 4)))


def mixes(plan: Plan, results: Results) -> Plot:
    """The mean over tasks of the base, the single models and every mix."""
    names = [BASE, *TRAINED, FUSED, *plan.mixes]
    series = {MEAN: [_point(results, name, MEAN) for name in names]}
    return Plot(f"Mean over tasks by fusion weights; {ERRORS}", plots.points(names, series, POINTS))


def rates(plan: Plan, results: Results) -> Plot:
    """Scores over the learning rate, a line a task."""
    found = sorted(plan.rates, key=lambda rate: rate.settings.learning_rate)
    x = [rate.settings.learning_rate for rate in found]
    series = {}
    for task in columns(results):
        y, error = zip(*(_point(results, rate.name, task) for rate in found), strict=True)
        series[task] = (x, y, error)
    ticks = {rate.settings.learning_rate: written(rate.settings.learning_rate) for rate in found}
    caption = f"SFT at other learning rates, by task; the bands are {ERRORS}"
    return Plot(caption, plots.bands(series, "learning rate", POINTS, ticks))


def losses(plan: Plan, folders: list[Path]) -> list[Plot]:
    """The losses of SFT at every rate, and the reward margins of KTO, over the share of the training done."""
    sft = {rate.name: "train/S1" if rate.name == "S1" else f"rates/{rate.name}" for rate in plan.rates} or {
        "S1": "train/S1"
    }
    kto = {name: f"train/{name}" for name in ("S2", "S3")}
    drawn = []
    for parts, key, label, caption in (
        (sft, "loss", "loss, nats a token", "SFT loss"),
        (kto, "margin", "reward margin", "KTO: reward of desirable less that of undesirable replies"),
    ):
        series = {name: _progress([folder / part for folder in folders], key) for name, part in parts.items()}
        series = {name: line for name, line in series.items() if line is not None}
        if series:
            words = f"{caption}, a tenth of an epoch smoothed; the bands are {ERRORS}"
            drawn.append(Plot(words, plots.bands(series, "epochs", label)))
    return drawn


def _progress(models: list[Path], key: str) -> tuple[Any, Any, Any] | None:
    """One figure of the log over epochs, (epochs, mean, error over seeds), smoothed over a tenth of an epoch."""
    lines = []
    for model in models:
        rows = [row for row in read_json(model / "training_log.json") if np.isfinite(row.get(key, np.nan))]
        if not rows:
            return None
        lines.append(np.array([[row["epoch"], row[key]] for row in rows]).T)
    length = min(line.shape[1] for line in lines)
    epochs = lines[0][0][:length]
    width = max(1, int(np.searchsorted(epochs, epochs[0] + 0.1)))
    kernel = np.full(min(width, length), 1 / min(width, length))
    smooth = np.array([np.convolve(line[1][:length], kernel, "valid") for line in lines])
    means = [seed_mean(column) for column in smooth.T]
    error = [mean.stderr or 0.0 for mean in means]
    return epochs[len(kernel) - 1 :], [mean.value for mean in means], error


def _point(results: Results, model: str, task: str) -> tuple[float, float]:
    """A score and its error over seeds, in points; the base has none."""
    mean = seed_mean(results.values(model, task))
    return 100 * mean.value, 100 * (mean.stderr or 0.0)
