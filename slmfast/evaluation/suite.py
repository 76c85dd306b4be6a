"""The suite `paper`: the five benchmarks of the paper's section 4, with what decides on their scores pinned.

The numbers of worked examples are those that Qwen states for Qwen2 (the model card of Qwen/Qwen2-7B, "The datasets
for evaluation include"; arXiv 2407.10671): MMLU, CMMLU and C-Eval 5, GSM8K 4, HumanEval 0. Prompts, examples, answers
and metrics are lm-eval's own, as its tasks of these names have them; its gsm8k draws the examples of every item anew.
"""

import dataclasses
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager

from slmfast.evaluation import humaneval, local_items
from slmfast.recipe import SUITES

# Where lm-eval defines them, so that its other thousands of tasks need not be read.
_FOLDERS = {"mmlu": "mmlu/default", "cmmlu": "cmmlu", "ceval-valid": "ceval", "gsm8k": "gsm8k"}


def load(benchmark: str, data: Path | None, scratch: Path, *, only: Container[str] | None = None) -> dict[str, Any]:
    """A benchmark of the suite, loaded: its tasks and group as lm-eval's TaskManager gives them.

    Args:
        data: the folder of local files, as `local_items` names them; None for the hub's.
        scratch: where these go in the hub's columns.
        only: of a benchmark's tasks; all of them unless given.

    Raises:
        UserError: a local file is missing or not what it should be.
    """
    shots = SUITES["paper"][benchmark]
    manager = _manager(benchmark)
    if benchmark == "humaneval":
        return manager.load([humaneval.TASK | _local(benchmark, "", data, scratch) | {"num_fewshot": shots}])
    members = [name for name in _leaves(manager, benchmark) if only is None or name in only]
    tasks = []
    for name in members:
        subject = name.removeprefix(f"{benchmark}_")
        tasks.append({"task": name, "num_fewshot": shots, **_local(benchmark, subject, data, scratch)})
    known = manager.task_index[benchmark]
    if members == [benchmark]:
        return manager.load([known.cfg | tasks[0]])
    # lm-eval's own groups nest by field; the score over all items is the same.
    weighed = [{"metric": "acc", "weight_by_size": True}]
    group = {"group": benchmark, "task": tasks, "aggregate_metric_list": weighed}
    manager.task_index[benchmark] = dataclasses.replace(known, yaml_path=None, cfg=group)
    return manager.load([benchmark])


def local_files(tasks: Iterable[str], data: Path) -> list[Path]:
    """The files that those of the tasks which are the suite's read of a local folder.

    Raises:
        UserError: one is missing.
    """
    found = []
    for benchmark in tasks:
        if benchmark in SUITES["paper"]:
            for name in _leaves(_manager(benchmark), benchmark):
                files = local_items.FILES[benchmark](data, name.removeprefix(f"{benchmark}_"))
                found += [local_items.existing(benchmark, split, file) for split, file in files.items()]
    return found


def _manager(benchmark: str) -> TaskManager:
    folder = _FOLDERS.get(benchmark)
    root = Path(lm_eval.tasks.__file__).parent
    return TaskManager(include_path=str(root / folder) if folder else None, include_defaults=False)


def _leaves(manager: TaskManager, name: str) -> Iterator[str]:
    """The single tasks of a group, in order; a task itself."""
    entry = manager.task_index.get(name)
    if entry is None or entry.kind.name in ("TASK", "PY_TASK"):
        yield name
    elif entry.kind.name == "TAG":
        yield from sorted(entry.tags)
    else:
        for child in entry.cfg["task"]:
            yield from _leaves(manager, child)


def _local(benchmark: str, subject: str, data: Path | None, scratch: Path) -> dict[str, Any]:
    """What of a task's configuration says where its data is; nothing for the hub's."""
    if data is None:
        return {}
    splits = {}
    for split, file in local_items.FILES[benchmark](data, subject).items():
        splits[split] = str(scratch / benchmark / f"{subject or benchmark}-{split}.parquet")
        local_items.convert(benchmark, split, file, Path(splits[split]))
    return {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": {"data_files": splits}}
