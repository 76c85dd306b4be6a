"""Scores of base, S1, S2, S3 and the fused model with their standard errors, and how far each lies from the base.

All models answer the same items, so a difference is taken item by item: its standard error is the standard deviation of
the items' differences over the root of their number, which is smaller than that of two unrelated samples.
"""

import math
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from slmfast.evaluation.run import described
from slmfast.recipe import TRAINED
from slmfast.reporting import plots
from slmfast.reporting.document import NOTHING, Block, Plot, Section, Table, Text, with_error
from slmfast.reporting.run_folder import RunFolder

MEAN = "mean"
BASE = "base"
MODELS = (BASE, *TRAINED, "fused")
Scores = dict[str, dict[str, dict[str, Any]]]
Figure = tuple[float, float | None]  # a value and its standard error


def scores_section(run: RunFolder) -> Section | None:
    """The table of scores, its drawing, and the differences to the base model."""
    scores, tasks = read_scores(run)
    if not tasks:
        return None
    columns = tasks if len(tasks) == 1 else [*tasks, MEAN]
    values = {model: {task: score(scores, model, task, tasks) for task in columns} for model in scores}
    rows = [[model, *(_cell(values[model][task]) for task in columns)] for model in scores]
    rows.append(["items", *_items(scores, tasks), *([NOTHING] if len(tasks) > 1 else [])])
    blocks: list[Block] = [
        Text(
            f"Every model, the base included, is evaluated in {run.recipe.evaluate.dtype} with our harness (lm-eval) "
            "on the same items; scores that others published were measured otherwise and don't compare. Each figure "
            f"has its standard error. How the questions were put: {described(run.recipe.evaluate)}."
        ),
        Table("Scores", ["model", *columns], rows),
        Plot("Scores; the bars show one standard error to each side", plots.points(columns, _bars(values), "score")),
    ]
    if BASE in scores and len(scores) > 1:
        blocks += _differences(run, scores, tasks)
    return Section("Scores", blocks)


def read_scores(run: RunFolder) -> tuple[Scores, list[str]]:
    """The scores of all models, in the order of their making, and the tasks, in the order of the recipe."""
    found: Scores = run.json("evaluate", "scores.json") or {}
    models = [model for model in MODELS if model in found] + sorted(set(found) - set(MODELS))
    answered = {task for scores in found.values() for task in scores}
    tasks = [task for task in run.recipe.evaluate.names if task in answered]
    return {model: found[model] for model in models}, tasks + sorted(answered - set(tasks))


def summary_rows(run: RunFolder) -> list[list[str]]:
    """Each model's mean score over all tasks, as rows of a table."""
    scores, tasks = read_scores(run)
    figures = {model: mean([score(scores, model, task, tasks) for task in tasks]) for model in scores}
    return [[f"{model}, mean score over {len(tasks)} tasks", _cell(figure)] for model, figure in figures.items()]


def score(scores: Scores, model: str, task: str, tasks: list[str]) -> Figure | None:
    """A model's score on a task or, for MEAN, over all tasks; None where it has not answered."""
    if task != MEAN or MEAN in tasks:
        found = scores[model].get(task)
        return None if found is None else (found["value"], found.get("stderr"))
    return mean([score(scores, model, task, tasks) for task in tasks])


def mean(figures: list[Figure | None]) -> Figure | None:
    """The mean of independent figures with its standard error; None where one is missing."""
    if not figures or any(figure is None for figure in figures):
        return None
    known = [figure for figure in figures if figure is not None]
    errors = [error for _, error in known if error is not None]
    error = math.sqrt(math.fsum(e * e for e in errors)) / len(known) if len(errors) == len(known) else None
    return math.fsum(value for value, _ in known) / len(known), error


def _cell(figure: Figure | None) -> str:
    return NOTHING if figure is None else with_error(*figure)


def _items(scores: Scores, tasks: list[str]) -> list[str]:
    """How many items each task has; of models that answered unlike numbers, all of them."""
    cells = []
    for task in tasks:
        numbers = {found[task].get("n") for found in scores.values() if task in found} - {None}
        cells.append(" / ".join(f"{n:,}" for n in sorted(numbers)) or NOTHING)
    return cells


def _bars(values: dict[str, dict[str, Figure | None]]) -> dict[str, list[tuple[float, float]]]:
    missing = (math.nan, 0.0)
    return {
        model: [missing if figure is None else (figure[0], figure[1] or 0.0) for figure in figures.values()]
        for model, figures in values.items()
    }


def _differences(run: RunFolder, scores: Scores, tasks: list[str]) -> list[Block]:
    items = {model: _item_values(run, model) for model in scores}
    rows, verdicts = [], []
    for model in scores:
        if model == BASE:
            continue
        found = [_difference(scores, items, model, task) for task in tasks]
        overall = mean(found)
        cells = [*found, *([overall] if len(tasks) > 1 else [])]
        rows.append([model, *(NOTHING if cell is None else with_error(*cell, signed=True) for cell in cells)])
        verdicts.append(_verdict(model, overall))
    header = ["model", *tasks, *([MEAN] if len(tasks) > 1 else [])]
    return [
        Table("Difference to the base model, paired by item where the items are stored", header, rows),
        Text(" ".join(verdicts)),
    ]


def _item_values(run: RunFolder, model: str) -> dict[tuple[str, str, int], float]:
    """The value of every item that a model answered, by task, the task's subset if it has several, and number."""
    path = run.stages["evaluate"] / "items" / f"{model}.parquet"
    if not path.exists():
        return {}
    table = pq.read_table(path, partitioning=None)
    subsets = table["subset"].to_pylist() if "subset" in table.column_names else [""] * len(table)
    tasks, items, values = (table[name].to_pylist() for name in ("task", "item", "value"))
    return {tuple(key): value for *key, value in zip(tasks, subsets, items, values, strict=True)}


def _difference(
    scores: Scores, items: dict[str, dict[tuple[str, str, int], float]], model: str, task: str
) -> Figure | None:
    """A model's score less the base model's: paired where both have the same items, else as of independent samples."""
    own, other = (scores[name].get(task) for name in (model, BASE))
    if own is None or other is None:
        return None
    keys = sorted(key for key in items[model] if key[0] == task)
    if len(keys) > 1 and keys == sorted(key for key in items[BASE] if key[0] == task):
        steps = np.array([items[model][key] - items[BASE][key] for key in keys])
        return own["value"] - other["value"], float(steps.std(ddof=1) / math.sqrt(len(steps)))
    errors = own.get("stderr"), other.get("stderr")
    return own["value"] - other["value"], None if None in errors else math.hypot(*errors)


def _verdict(model: str, difference: Figure | None) -> str:
    if difference is None or difference[1] is None:
        return f"{model}: no standard error to measure it by."
    value, error = difference
    if abs(value) <= error:
        return f"{model} is not told apart from the base: the difference lies within one standard error."
    way = "above" if value > 0 else "below"
    sure = "more than two standard errors" if abs(value) > 2 * error else "one to two standard errors"
    return f"{model} is {sure} {way} the base."
