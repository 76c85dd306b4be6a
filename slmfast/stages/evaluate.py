"""Evaluate: base, S1, S2, S3 and the fused model answer the same tasks through lm-eval (the paper, section 4.1)."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from slmfast.evaluation import evaluate_model, task_files, task_folder
from slmfast.evaluation.paired import paired_differences
from slmfast.evaluation.run import described
from slmfast.fusion import update_survival
from slmfast.job import Counts, Job
from slmfast.recipe import TRAINED, expand
from slmfast.sandbox import check_sandbox
from slmfast.store import file_digest, read_json, write_json, write_table

INPUTS = ("train", "fuse")
MODELS = ("base",)


def places(job: Job) -> tuple[str | None, str | None]:
    """The folder of our own task files and the folder of their data, variables resolved."""
    settings, folders = job.settings, {"RUN": job.run_dir}
    tasks = None if settings.task_folder is None else expand(settings.task_folder, folders, "evaluate.task_folder")
    return tasks, None if settings.data is None else expand(settings.data, folders, "evaluate.data")


def files(job: Job) -> dict[str, str]:
    """The digests of our own task files and of the data that they name: evaluate runs again when one changes."""
    tasks, data = places(job)
    found = task_files(tasks, data)
    if job.settings.suite is not None and data is not None:
        from slmfast.evaluation.suite import local_files

        found += local_files(job.settings.names, Path(data))
    return {str(path): file_digest(path) for path in found}


def run(job: Job) -> Counts:
    """Writes scores.json, {model: {task: {value, stderr, n}}}, settings.json, {task: {shots, metric, filter, dtype,
    chat_template, limit}}, every item's score and output under `items/`, and how far any two models lie apart in
    differences.json."""
    settings = job.settings
    if settings.run_generated_code:
        check_sandbox()
    models = {"base": job.model("base")}
    models |= {name: str(job.inputs["train"] / name) for name in TRAINED}
    models["fused"] = str(job.inputs["fuse"] / "fused")
    tasks, data = places(job)
    folder = task_folder(tasks, data, job.work / "tasks")
    source = None if data is None else Path(data)
    print(f"evaluate: {described(settings, source)}", flush=True)
    scores, items = {}, {}
    for name, path in models.items():
        done, file = job.work / f"{name}.json", job.folder / "items" / f"{name}.parquet"
        if not done.exists():
            print(f"evaluate: {name}{survival(models['base'], path, settings.dtype)}", flush=True)
            result = evaluate_model(path, settings, folder, cache=job.work / "datasets", data=source)
            write_table(file, pa.Table.from_pylist(result.items))
            write_json(job.folder / "settings.json", result.settings)
            write_json(done, result.scores)
        scores[name], items[name] = read_json(done), pq.read_table(file, partitioning=None)
    write_json(job.folder / "differences.json", paired_differences(items, job.recipe.seed))
    write_json(job.folder / "scores.json", scores)
    return Counts(None, len(models))


def survival(base: str, model: str, dtype: str) -> str:
    """What evaluation in less than fp32 sees of a model's training, in words; nothing in fp32 or of the base."""
    if dtype == "float32" or model == base:
        return ""
    share = update_survival(base, model, dtype)
    return f", of whose update {dtype} keeps {share.weights:.2%} of the weights and {share.norm:.2%} of its norm"
