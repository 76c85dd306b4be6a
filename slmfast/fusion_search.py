"""Weights of a fusion, searched on a grid: every point is scored on development tasks, and never on the test's.

The best of many points looks better than it is, by about as much as the points' scores scatter by chance. So the tasks
that choose the weights must not be those that judge them (items that both hold are refused), every point's standard
error is kept beside its score, and the winner's lead over the best single model comes with that of the paired items.
"""

import dataclasses
import itertools
import json
import math
import statistics
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from slmfast.errors import UserError
from slmfast.evaluation import evaluate_model, task_files, task_folder
from slmfast.evaluation.run import load_tasks
from slmfast.fusion import CARD, fuse
from slmfast.model_folder import check_output
from slmfast.recipe import Evaluate
from slmfast.store import WORK, atomic_path, digest, file_digest, model_digest, read_json, remove, write_json

SEARCH = "fusion_search.json"
_STATE = "search.json"


class Point(NamedTuple):
    """One point of the grid: the models' weights, in order, and how it scored."""

    weights: tuple[float, ...]
    value: float  # the mean over the tasks
    stderr: float | None
    tasks: dict[str, dict[str, Any]]
    items: dict[str, list[float]]  # of every item, by the task that it belongs to


def grid(models: int, step: float) -> list[tuple[int, ...]]:
    """All ways to give `models` models whole numbers of steps that sum to 1, the first model's largest share first.

    Raises:
        UserError: the step does not divide 1.
    """
    steps = round(1 / step) if 0 < step <= 1 else 0
    if steps < 1 or not math.isclose(steps * step, 1.0, abs_tol=1e-9):
        raise UserError(f"--step {step:g} does not divide 1: give for instance 0.5, 0.25, 0.2 or 0.1")
    shares = itertools.product(range(steps, -1, -1), repeat=models - 1)
    return [(*most, steps - sum(most)) for most in shares if sum(most) <= steps]


def search(
    models: Sequence[str | Path],
    output: str | Path,
    development: Evaluate,
    *,
    step: float = 0.25,
    test: Evaluate | None = None,
) -> dict[str, Any]:
    """Scores every point of the grid, and writes the best as a model folder with `fusion_search.json` in it.

    A search that was cut off goes on from the points that it has; one that has ended is given as it was found. Points
    of equal score: the more even weights win.

    Args:
        models: two model folders or more.
        output: the new folder; the winner's card is its `fusion.json`.
        development: the tasks that choose.
        step: of the weights; 1 / step is a whole number.
        test: the tasks that will judge; only their questions are read, to see that none is among the development's.

    Returns:
        What `fusion_search.json` holds: the models, the tasks, every point with its score and standard error, and the
        winner with its lead over the best single model.

    Raises:
        UserError: fewer than two models, a step that does not divide 1, an item of both sides, an output that holds
            another fused model, and what `fuse` and `evaluate_model` refuse.
    """
    paths, target, points = [Path(model) for model in models], Path(output), grid(len(models), step)
    if len(paths) < 2:
        raise UserError("there is nothing to search: name at least two models")
    check_output(target, CARD, paths)
    with tempfile.TemporaryDirectory() as scratch:
        folder = task_folder(development.task_folder, development.data, Path(scratch) / "tasks")
        if test is not None:
            _check_apart(development, test, Path(scratch))
        key = _key(paths, development)
        if (target / CARD).exists():  # before hours of points, not after
            return _finished(target, key, step)
        state = target / WORK / _STATE
        done = _known(state, key)
        for number, shares in enumerate(points):
            if str(shares) not in done:
                name = " ".join(f"{share / sum(shares):g}" for share in shares)
                print(f"fuse --search: point {number + 1} of {len(points)}, weights {name}", flush=True)
                done[str(shares)] = _score(paths, shares, development, folder, state.parent, Path(scratch))
                write_json(state, {"key": key, "points": done})
    scored = [Point(tuple(share / sum(shares) for share in shares), **done[str(shares)]) for shares in points]
    best = max(scored, key=lambda point: (point.value, -sum(weight**2 for weight in point.weights)))
    document = {**_document(paths, development, step, scored, best), "key": key}
    winner = points[scored.index(best)]
    with atomic_path(target) as folder:  # the points go when all of the result is there
        fuse({path: share for path, share in zip(paths, winner, strict=True) if share}, folder, mixed_dtypes=True)
        write_json(folder / SEARCH, document)
    return document


def _finished(target: Path, key: str, step: float) -> dict[str, Any]:
    """What an earlier search of the same models, tasks and step has found; another fused model is not replaced."""
    found = read_json(target / SEARCH) if (target / SEARCH).exists() else {}
    if (found.get("key"), found.get("step")) != (key, step):
        raise UserError(f"{target} holds another fused model: give another output, or remove it first")
    print(f"fuse --search: {target} is up to date", flush=True)
    return found


def _key(paths: Sequence[Path], development: Evaluate) -> str:
    """What a point's score depends on, beside its weights."""
    settings = dataclasses.asdict(development)
    files = [file_digest(path) for path in task_files(development.task_folder, development.data)]
    return digest([[model_digest(path) for path in paths], settings, files])


def _known(state: Path, key: str) -> dict[str, Any]:
    if not state.exists():
        return {}
    found = read_json(state)
    return found["points"] if found["key"] == key else {}


def _score(
    paths: Sequence[Path],
    shares: tuple[int, ...],
    settings: Evaluate,
    folder: Path | None,
    work: Path,
    scratch: Path,
) -> dict[str, Any]:
    used = {path: share for path, share in zip(paths, shares, strict=True) if share}
    model = next(iter(used))  # alone, a model is its own average bit for bit
    if len(used) > 1:
        model = work / "fused"
        remove(model)
        fuse(used, model, mixed_dtypes=True)
    result = evaluate_model(str(model), settings, folder, scratch / "cache")
    errors = [score["stderr"] for score in result.scores.values()]
    items: dict[str, list[float]] = {}
    for item in result.items:
        items.setdefault(item["task"], []).append(item["value"])
    return {
        "value": statistics.fmean(score["value"] for score in result.scores.values()),
        "stderr": None if None in errors else math.hypot(*errors) / len(errors),
        "tasks": result.scores,
        "items": items,
    }


def _document(
    paths: Sequence[Path], development: Evaluate, step: float, scored: Sequence[Point], best: Point
) -> dict[str, Any]:
    singles = [point for point in scored if max(point.weights) == 1.0]
    single = max(singles, key=lambda point: point.value)
    rows = [{name: value for name, value in point._asdict().items() if name != "items"} for point in scored]
    return {
        "models": [str(path) for path in paths],
        "tasks": list(best.tasks),
        "limit": development.limit,
        "step": step,
        "points": rows,
        "winner": {
            "weights": best.weights,
            "value": best.value,
            "stderr": best.stderr,
            "best_single": str(paths[single.weights.index(1.0)]),
            "lead": best.value - single.value,
            "lead_stderr": _lead_error(best, single),
        },
    }


def _lead_error(best: Point, single: Point) -> float | None:
    """The standard error of the mean over the tasks of two points' differences, item by item.

    None where a task is a group, whose mean need not be that of its items, or has one item alone.
    """
    squares = 0.0
    for task in best.tasks:
        steps = [a - b for a, b in zip(best.items.get(task, []), single.items.get(task, []), strict=True)]
        if len(steps) < 2:
            return None
        squares += statistics.variance(steps) / len(steps)
    return math.sqrt(squares) / len(best.tasks)


def _check_apart(development: Evaluate, test: Evaluate, scratch: Path) -> None:
    """A UserError where a question of the development tasks is one of the test's as well."""
    ours, theirs = (
        _questions(settings, task_folder(settings.task_folder, settings.data, scratch / name), scratch / "cache")
        for name, settings in (("development", development), ("test", test))
    )
    common = sorted(ours.keys() & theirs.keys(), key=lambda question: ours[question])
    if common:
        (task, item), (other, number) = ours[common[0]], theirs[common[0]]
        shared, total = len({ours[question] for question in common}), len(set(ours.values()))
        raise UserError(
            f"{shared} of {total} development items are test items too (item {item} of {task} is item "
            f"{number} of {other}): choose weights on other data than judges them"
        )


def _questions(settings: Evaluate, folder: Path | None, cache: Path) -> dict[str, tuple[str, int]]:
    """Every item's content as a hash, with its task and number: as it is asked, and as the data have it."""
    found = {}
    for name, number, doc, text in _items(settings, folder, cache):
        values = sorted(_normal(json.dumps(value, default=str)) for value in doc.values())
        for content in (_normal(text), values):
            found.setdefault(digest(content), (name, number))
    return found


def _items(settings: Evaluate, folder: Path | None, cache: Path) -> Iterator[tuple[str, int, Mapping[str, Any], str]]:
    for name, task in sorted(load_tasks(settings, folder, cache)["tasks"].items()):
        for number, doc in enumerate(task.eval_docs):
            choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else ""
            yield name, number, doc, f"{task.doc_to_text(doc)}\n{choices}\n{task.doc_to_target(doc)}"


def _normal(text: Any) -> str:
    return " ".join(unicodedata.normalize("NFKC", str(text)).lower().split())
