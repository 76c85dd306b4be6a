"""Evaluate: base, S1, S2, S3 and the fused model answer the same tasks through lm-eval (the paper, section 4.1)."""

import pyarrow as pa

from slmfast.evaluation import evaluate_model, task_files, task_folder
from slmfast.job import Counts, Job
from slmfast.recipe import TRAINED, expand
from slmfast.sandbox import check_sandbox
from slmfast.store import file_digest, read_json, write_json, write_table

INPUTS = ("train", "fuse")
MODELS = ("base",)


def _places(job: Job) -> tuple[str | None, str | None]:
    """The folder of our own task files and the folder of their data, variables resolved."""
    settings, folders = job.settings, {"RUN": job.run_dir}
    tasks = None if settings.task_folder is None else expand(settings.task_folder, folders, "evaluate.task_folder")
    return tasks, None if settings.data is None else expand(settings.data, folders, "evaluate.data")


def files(job: Job) -> dict[str, str]:
    """The digests of our own task files and of the data that they name: evaluate runs again when one changes."""
    return {str(path): file_digest(path) for path in task_files(*_places(job))}


def run(job: Job) -> Counts:
    """Writes scores.json, {model: {task: {value, stderr, n}}}, and the score of every item under `items/`."""
    settings = job.settings
    if settings.run_generated_code:
        check_sandbox()
    models = {"base": job.model("base")}
    models |= {name: str(job.inputs["train"] / name) for name in TRAINED}
    models["fused"] = str(job.inputs["fuse"] / "fused")
    folder = task_folder(*_places(job), job.work / "tasks")
    scores = {}
    for name, path in models.items():
        done = job.work / f"{name}.json"
        if not done.exists():
            print(f"evaluate: {name}", flush=True)
            result = evaluate_model(path, settings, folder, cache=job.work / "datasets")
            write_table(job.folder / "items" / f"{name}.parquet", pa.Table.from_pylist(result.items))
            write_json(done, result.scores)
        scores[name] = read_json(done)
    write_json(job.folder / "scores.json", scores)
    return Counts(None, len(models))
