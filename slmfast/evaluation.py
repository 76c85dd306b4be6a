"""Evaluation through lm-eval: any task that it knows, or task files of our own over local data; always in fp32."""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from slmfast.errors import UserError
from slmfast.recipe import Evaluate

FEW_SHOT_SEED = 1234  # lm-eval's own default
MINIATURE_TASKS = Path(__file__).parent / "miniature" / "tasks"


class Evaluation(NamedTuple):
    """One model's scores by task, and one row an item: task, item, value."""

    scores: dict[str, dict[str, Any]]
    items: list[dict[str, Any]]


def _own_tasks(folder: str) -> list[Path]:
    source = MINIATURE_TASKS if folder == "builtin:miniature" else Path(folder)
    files = sorted(source.glob("*.yaml"))
    if not files:
        raise UserError(f"recipe key evaluate.task_folder: {source} holds no *.yaml task file")
    return files


def task_files(folder: str | None, data: str | None) -> list[Path]:
    """Our own task files, and those files of their data that are there already."""
    if folder is None:
        return []
    found = _own_tasks(folder)
    for file in list(found):
        for name in re.findall(r"\$\{DATA\}/([^\s\"']+)", file.read_text(encoding="utf-8")):
            found += sorted(path for path in Path(data or "").glob(name) if path.is_file())
    return found


def task_folder(folder: str | None, data: str | None, target: Path) -> Path | None:
    """Copies lm-eval task files to `target`, with `${DATA}` replaced by the folder of their data.

    lm-eval takes data files relative to the working directory, so the copies name them in full.
    """
    if folder is None:
        return None
    target.mkdir(parents=True, exist_ok=True)
    for file in _own_tasks(folder):
        text = file.read_text(encoding="utf-8")
        if "${DATA}" in text and data is None:
            raise UserError(f"{file} needs ${{DATA}}: set evaluate.data (or --data) to the folder of its data")
        (target / file.name).write_text(text.replace("${DATA}", str(data)), encoding="utf-8")
    return target


def evaluate_model(model: str, settings: Evaluate, folder: Path | None, cache: Path) -> Evaluation:
    """Scores one model, a folder or hub name, on the recipe's tasks.

    Raises UserError where a task is unknown, and where a question doesn't fit in the model's window: lm-eval would
    cut it silently.
    """
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    import datasets

    datasets.config.HF_DATASETS_CACHE = cache  # it may have been imported before the variable was set
    datasets.disable_progress_bars()
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    defaults = not _all_local(settings, folder)
    manager = TaskManager(include_path=str(folder) if folder else None, include_defaults=defaults)
    missing = [task for task in settings.tasks if task not in manager.all_tasks]
    if missing:
        unknown = f"recipe key evaluate.tasks: lm-eval knows no task {', '.join(missing)}"
        raise UserError(f"{unknown}; task files of your own need evaluate.task_folder (or --task-folder)")
    try:
        loaded = manager.load(list(settings.tasks))
    except (OSError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the data of the tasks {', '.join(settings.tasks)} can't be read: {reason}") from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEW_SHOT_SEED)
    language_model = _language_model(model, settings.batch_size)
    results = evaluate(
        lm=language_model,
        task_dict=loaded,
        limit=settings.limit,
        apply_chat_template=settings.chat_template,
        log_samples=True,
        bootstrap_iters=1000,
    )
    for task, samples in results["samples"].items():
        _check_window(task, samples, language_model)
    scores = {task: _score(results, task) for task in settings.tasks}
    items = [
        {"task": task, "item": int(sample["doc_id"]), "value": float(sample[_metric(results, task)])}
        for task, samples in sorted(results["samples"].items())
        for sample in samples
        if sample["filter"] == samples[0]["filter"]
    ]
    return Evaluation(scores, items)


def _language_model(model: str, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class QuietHFLM(HFLM):
        """HFLM without its progress bars, which know no log file."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    return QuietHFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        tokenizer=AutoTokenizer.from_pretrained(model),
        softmax_dtype="float32",
        batch_size=batch_size,
    )


def _check_window(task: str, samples: list[dict[str, Any]], language_model: Any) -> None:
    window = language_model.max_length
    for sample in samples:
        for context, more in sample["arguments"]:
            tokens = len(language_model.tok_encode(context))
            if isinstance(more, str):
                tokens += len(language_model.tok_encode(more))
            else:
                tokens += int(more.get("max_gen_toks", language_model.max_gen_toks))
            if tokens > window:
                raise UserError(
                    f"item {sample['doc_id']} of task {task} takes {tokens} tokens, but the model's window has "
                    f"{window}: use fewer shots or another task (recipe key evaluate.tasks)"
                )


def _all_local(settings: Evaluate, folder: Path | None) -> bool:
    """Whether our own files define every task; lm-eval's thousands then need not be read."""
    return folder is not None and all((folder / f"{task}.yaml").exists() for task in settings.tasks)


def _metric(results: dict[str, Any], task: str) -> str:
    """The first metric that a task, or a group's first task, declares."""
    while task not in results["configs"]:
        task = results["group_subtasks"][task][0]
    return results["configs"][task]["metric_list"][0]["metric"]


def _score(results: dict[str, Any], task: str) -> dict[str, Any]:
    metric, row = _metric(results, task), results["results"][task]
    name = next(key for key in row if key.split(",")[0] == metric)
    stderr = row.get(name.replace(",", "_stderr,", 1))
    leaves = _leaves(results, task)
    return {
        "value": float(row[name]),
        "stderr": float(stderr) if isinstance(stderr, int | float) else None,
        "n": sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
    }


def _leaves(results: dict[str, Any], task: str) -> list[str]:
    children = results.get("group_subtasks", {}).get(task) or []
    return [leaf for child in children for leaf in _leaves(results, child)] or [task]
