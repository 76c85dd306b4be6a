"""One model's answers to the tasks of an evaluation, and their scores."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from slmfast.errors import UserError
from slmfast.recipe import SUITES, Evaluate

FEW_SHOT_SEED = 1234  # lm-eval's own default
Samples = list[dict[str, Any]]


class Evaluation(NamedTuple):
    """One model's scores by task, one row an item, and what each task was put with.

    A row has `task`, `subset` (of a group, the task that the item is of), `item`, `value` (what the task's score metric
    gives it) and `output` (the reply, or the log-probabilities of the choices as JSON).
    """

    scores: dict[str, dict[str, Any]]
    items: Samples
    settings: dict[str, dict[str, Any]]


def evaluate_model(
    model: str, settings: Evaluate, folder: Path | None, cache: Path, data: Path | None = None
) -> Evaluation:
    """Scores one model, a folder or hub name, on the recipe's tasks.

    Args:
        folder: of task files of our own, see `task_folder`.
        cache: where data sets go.
        data: the folder of a suite's local files; None for the hub's.

    Raises:
        UserError: a task is unknown, has no score that is a mean over items, its data can't be read, it runs programs
            without the suite's sandbox, or an item doesn't fit in the model's window: lm-eval would cut it silently.
    """
    from slmfast.evaluation.metrics import score_metric

    tasks = load_tasks(settings, folder, cache, data)
    metrics = {task: score_metric(task, tasks) for task in settings.names}
    from lm_eval.evaluator import evaluate

    from slmfast.evaluation.language_model import PackedLM
    from slmfast.scoring.loading import load_model, load_tokenizer

    language_model = PackedLM(
        load_model(model, dtype=settings.dtype),
        load_tokenizer(model),
        slots=settings.batch_size,
        progress=True,
    )
    results = evaluate(
        lm=language_model,
        task_dict=tasks,
        limit=settings.limit,
        apply_chat_template=settings.templated,
        fewshot_as_multiturn=settings.templated,  # as lm-eval's own command has it: an example is a turn and its reply
        log_samples=True,
        bootstrap_iters=1000,
    )
    scores = {task: _score(results, task, metric) for task, metric in metrics.items()}
    items = [row for task, metric in metrics.items() for row in _items(results, task, metric)]
    told = {task: _settings(results, task, metric, settings) for task, metric in metrics.items()}
    return Evaluation(scores, items, told)


def load_tasks(settings: Evaluate, folder: Path | None, cache: Path, data: Path | None = None) -> dict[str, Any]:
    """The tasks as lm-eval's `evaluate` takes them; arguments and errors are those of `evaluate_model`."""
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    import datasets

    datasets.config.HF_DATASETS_CACHE = cache  # it may have been imported before the variable was set
    datasets.disable_progress_bars()
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    try:
        for part in _loaded(settings, folder, cache, data):
            for kind, found in part.items():
                loaded[kind].update(found)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        remedy = "check the network, or name the folder of a suite's own files with evaluate.data (--data)"
        raise UserError(
            f"the data of the tasks {', '.join(settings.names)} can't be read ({reason}): {remedy}"
        ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"task {name} runs programs that the model writes, here unguarded: take humaneval instead")
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEW_SHOT_SEED)
    return loaded


def _loaded(settings: Evaluate, folder: Path | None, cache: Path, data: Path | None) -> Iterator[dict[str, Any]]:
    """Tasks of our own or of lm-eval, and those of a suite."""
    from lm_eval.tasks import TaskManager

    from slmfast.evaluation import suite

    own = {name for name in settings.names if folder is not None and (folder / f"{name}.yaml").exists()}
    suites = [name for name in settings.names if name not in own and name in _suite_tasks(settings)]
    others = [name for name in settings.names if name not in suites]
    if others:
        # Where our own files define every task, lm-eval's thousands need not be read.
        manager = TaskManager(include_path=str(folder) if folder else None, include_defaults=not own >= set(others))
        missing = [task for task in others if task not in manager.all_tasks]
        if missing:
            unknown = f"recipe key evaluate.tasks: lm-eval knows no task {', '.join(missing)}"
            raise UserError(f"{unknown}; task files of your own need evaluate.task_folder (or --task-folder)")
        yield dict(manager.load(others))
    for name in suites:
        yield suite.load(name, data if settings.suite else None, cache / "items")


def _suite_tasks(settings: Evaluate) -> set[str]:
    """The tasks that our suite defines. humaneval always: lm-eval's own has no sandbox."""
    return {"humaneval", *SUITES.get(settings.suite or "", {})}


def _leaves(results: dict[str, Any], task: str) -> list[str]:
    children = results.get("group_subtasks", {}).get(task) or []
    return [leaf for child in children for leaf in _leaves(results, child)] or [task]


def _filter(results: dict[str, Any], task: str) -> str:
    """The first filter that a task, or a group's first task, declares."""
    return results["samples"][_leaves(results, task)[0]][0]["filter"]


def _score(results: dict[str, Any], task: str, metric: str) -> dict[str, Any]:
    name = _filter(results, task)
    row = results["results"][task]
    stderr = row.get(f"{metric}_stderr,{name}")
    return {
        "value": float(row[f"{metric},{name}"]),
        "stderr": float(stderr) if isinstance(stderr, int | float) else None,
        "n": sum(results["n-samples"][leaf]["effective"] for leaf in _leaves(results, task)),
    }


def _items(results: dict[str, Any], task: str, metric: str) -> Iterator[dict[str, Any]]:
    name = _filter(results, task)
    for leaf in sorted(_leaves(results, task)):
        for sample in results["samples"][leaf]:
            if sample["filter"] == name:
                row = {"task": task, "subset": leaf, "item": int(sample["doc_id"]), "value": float(sample[metric])}
                yield row | {"output": _output(sample["resps"])}


def _output(responses: list[list[Any]]) -> str:
    """The first reply, or the log-probability of each choice."""
    first = [some[0] for some in responses]
    if isinstance(first[0], str):
        return first[0]
    return json.dumps([value[0] if isinstance(value, tuple) else value for value in first])


def _settings(results: dict[str, Any], task: str, metric: str, settings: Evaluate) -> dict[str, Any]:
    leaf = _leaves(results, task)[0]
    return {
        "shots": results["n-shot"][leaf],
        "metric": metric,
        "filter": _filter(results, task),
        "dtype": settings.dtype,
        "chat_template": settings.templated,
        "limit": settings.limit,
    }


def described(settings: Evaluate, data: Path | None = None) -> str:
    """What decides on the scores, in one line: worked examples, precision, template and where the data is from.

    Args:
        data: the folder of a suite's files, where it isn't told as the settings have it.
    """
    pinned = SUITES.get(settings.suite or "", {})
    tasks = ", ".join(f"{task} {pinned[task]}-shot" if task in pinned else task for task in settings.names)
    name = f"suite {settings.suite}: " if settings.suite else ""
    template = "chat template" if settings.templated else "bare text"
    source = f"; data from {data or settings.data or 'the hub'}" if settings.suite else ""
    limit = f"; of each task the first {settings.limit:,} items" if settings.limit else ""
    return f"{name}{tasks}; {settings.dtype}, {template}, greedy{source}{limit}"
