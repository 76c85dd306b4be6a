"""The study's tables: scores in points of a hundred, each with its standard error over seeds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from slmfast.recipe import TRAINED
from slmfast.reporting.document import NOTHING, Table, whole
from slmfast.study.errors import Difference, Mean, difference, seed_mean
from slmfast.study.plan import BASE, FUSED, Plan, written
from slmfast.study.results import MEAN, Results

Published = dict[str, dict[str, float]]


def columns(results: Results) -> list[str]:
    """The tasks, and the mean over them where there are several."""
    return [*results.tasks, MEAN] if len(results.tasks) > 1 else list(results.tasks)


def points(mean: Mean) -> str:
    """A score in points with its error over seeds."""
    error = "" if mean.stderr is None else f" ± {100 * mean.stderr:.1f}"
    return f"{100 * mean.value:.1f}{error}"


def gained(gap: Difference) -> list[str]:
    """A difference in points with its error over seeds, and the interval of the items."""
    error = "" if gap.stderr_seeds is None else f" ± {100 * gap.stderr_seeds:.1f}"
    return [f"{100 * gap.value:+.1f}{error}", f"{100 * gap.low:+.1f} to {100 * gap.high:+.1f}"]


def score_row(results: Results, model: str) -> list[str]:
    """One model's scores. The base is one model, whatever the seed: its scores have no error over seeds."""
    means = [seed_mean(results.values(model, task)) for task in columns(results)]
    return [model, *(points(Mean(mean.value, None) if model == BASE else mean) for mean in means)]


def overview(results: Results, published: Published) -> Table:
    """base, S1, S2, S3 and the fused model on every task."""
    names = [BASE, *TRAINED, FUSED]
    rows = [score_row(results, name) for name in names]
    rows += [_published_row(results, published, name) for name in names if published and name != FUSED]
    rows.append(_items(results))
    caption = "Scores in points of a hundred: mean over seeds ± its standard error"
    return Table(caption, ["model", *columns(results)], rows)


def against_base(results: Results, model: str, caption: str, published: Published, seed: int) -> Table:
    """One model beside the base, by task, with the difference, its error over seeds and its interval over items."""
    header = ["task", BASE, model, "difference", "95 % over items"]
    names = [f"paper: {name}" for name in (BASE, model)] if published and model != FUSED else []
    rows = []
    for task in columns(results):
        base, own = (seed_mean(results.values(name, task)) for name in (BASE, model))
        row = [task, points(Mean(base.value, None)), points(own)]
        row += gained(difference(results, model, BASE, task, seed))
        rows.append(row + ([_published(results, published, name, task) for name in (BASE, model)] if names else []))
    return Table(caption, [*header, *names], rows)


def differences(found: Sequence[Mapping[str, Any]]) -> Table:
    """Every pair of models that the study compares: by task in points, with the errors of seeds and items together.

    Args:
        found: the differences of study.json.
    """
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for gap in found:
        error = math.hypot(gap["stderr_seeds"] or 0.0, gap["stderr_items"])
        cell = f"{100 * gap['value']:+.1f} ± {100 * error:.1f}"
        rows.setdefault((gap["model"], gap["less"]), {})[gap["task"]] = cell
    names = list(dict.fromkeys(gap["task"] for gap in found))
    names = names if len(names) > 2 else names[:1]  # of one task the mean says the same
    cells = [[model, less, *(row[name] for name in names)] for (model, less), row in rows.items()]
    caption = "Paired differences in points ± the standard error of seeds and items together"
    return Table(caption, ["model", "less", *names], cells, 2)


def mixes(plan: Plan, results: Results) -> Table:
    """The fused model and the other mixes beside their parts."""
    own = plan.recipe.fuse.weights
    total = sum(own.values())
    weights = {FUSED: {name: own.get(name, 0.0) / total for name in TRAINED}} | plan.mixes
    shares = {name: " : ".join(f"{found[part]:.2f}" for part in TRAINED) for name, found in weights.items()}
    shares |= dict.fromkeys(TRAINED, NOTHING)
    rows = [[name, share, *score_row(results, name)[1:]] for name, share in shares.items()]
    note = f"; the fused model is the mix {plan.own_mix}" if plan.own_mix else ""
    caption = f"Fusion weights (table 4-4 of the paper){note}"
    return Table(caption, ["model", " : ".join(TRAINED), *columns(results)], rows)


def rates(plan: Plan, results: Results) -> Table:
    """S1 at every learning rate."""
    header = ["learning rate", "the paper's", "samples a step", *columns(results)]
    rows = []
    for rate in plan.rates:
        paper = NOTHING if rate.paper is None else written(rate.paper)
        own = f"{written(rate.settings.learning_rate)}{' (S1)' if rate.name == 'S1' else ''}"
        rows.append([own, paper, whole(rate.settings.effective_batch), *score_row(results, rate.name)[1:]])
    rows.append(["base", NOTHING, NOTHING, *score_row(results, BASE)[1:]])
    return Table("Learning rates of SFT", header, rows)


def by_seed(results: Results) -> Table:
    """Every model's mean over tasks, seed by seed."""
    rows = []
    for model in results.models:
        values = results.values(model, MEAN)
        rows.append([model, *(f"{100 * value:.1f}" for value in values), score_row(results, model)[-1]])
    return Table("Mean over tasks by seed", ["model", *(f"seed {seed}" for seed in results.seeds), "mean"], rows)


def _items(results: Results) -> list[str]:
    scores = results.scores[results.seeds[0]][BASE]
    numbers = [whole(scores[task]["n"]) for task in results.tasks]
    return ["items", *numbers, *([NOTHING] if len(numbers) > 1 else [])]


def _published_row(results: Results, published: Published, model: str) -> list[str]:
    return [f"paper: {model}", *(_published(results, published, model, task) for task in columns(results))]


def _published(results: Results, published: Published, model: str, task: str) -> str:
    score = published_score(results, published, model, task)
    return NOTHING if score is None else f"{score:.2f}"


def published_score(results: Results, published: Published, model: str, task: str) -> float | None:
    """The paper's score in points; its mean only where it has all of our tasks."""
    if task != MEAN:
        return published[task][model] if task in published else None
    if set(published) != set(results.tasks):
        return None
    return sum(scores[model] for scores in published.values()) / len(published)
