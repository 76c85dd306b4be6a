"""Makes and scores a study's models, going on from what an earlier start has left.

DIR/shared/        the stages that no seed changes, a run of its own
DIR/seed-N/        a whole run of seed N, whose shared stages are links; and beside them
    fusions/MIX/   the other mixes
    rates/S1-RATE/ SFT at other learning rates
    scores/        what these models answered: NAME.parquet, a row an item, and NAME.json
DIR/samples.json   what the models of the first seed answer to instructions that they were not trained on
DIR/study.json     every figure
DIR/report.html, DIR/report.md

Whatever exists is whole. A model or a score whose key has changed (its settings, its parts, the version) is made anew.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from slmfast import __version__, pipeline
from slmfast.errors import UserError
from slmfast.evaluation import evaluate_model, task_folder
from slmfast.fusion import fuse
from slmfast.recipe import STAGES, Recipe, dump_recipe
from slmfast.stages.evaluate import files, places
from slmfast.store import (
    TEMPORARY,
    WORK,
    atomic_path,
    digest,
    model_digest,
    read_json,
    remove,
    remove_temporaries,
    write_json,
    write_table,
)
from slmfast.study.plan import Plan, describe
from slmfast.training.data import dataset_digest
from slmfast.training.sft import train_sft

SHARED = "shared"


def seed_folder(folder: Path, seed: int) -> Path:
    """Where a study keeps the run of one seed."""
    return folder / f"seed-{seed}"


@contextmanager
def study_folder(folder: Path) -> Iterator[None]:
    """Holds a study's folder, new or its own, against another study or run in it."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / pipeline.LOCK).exists())):
        raise UserError(f"{folder} holds other files: give a new folder with --run-dir")
    if any((folder / stage).exists() for stage in STAGES):
        raise UserError(f"{folder} holds a run: give the study a folder of its own with --run-dir")
    folder.mkdir(parents=True, exist_ok=True)
    with pipeline.only_run(folder):
        for stale in folder.glob(f".*{TEMPORARY}"):
            remove(stale)
        yield


def make_models(plan: Plan, folder: Path) -> None:
    """Runs the pipeline for every seed, and makes and scores the models that only a study has."""
    with atomic_path(folder / "recipe.yaml") as temporary:
        temporary.write_text(dump_recipe(plan.recipe), encoding="utf-8")
    plan.recipe.require_complete()
    # Before the shared stages, and not only before those of a seed.
    pipeline.check_judge(plan.recipe, seed_folder(folder, plan.seeds[0]))
    print(f"study: {describe(plan)}\nstudy: what all seeds share", flush=True)
    pipeline.run(plan.recipe, folder / SHARED, STAGES[STAGES.index(plan.vary_from) - 1])
    for seed in plan.seeds:
        print(f"study: seed {seed}", flush=True)
        recipe, run_dir = plan.seeded(seed), seed_folder(folder, seed)
        pipeline.link_stages(folder / SHARED, run_dir, plan.vary_from)
        pipeline.run(recipe, run_dir, first=plan.vary_from)
        with pipeline.only_run(run_dir):
            for part in ("fusions", "rates", "scores"):
                remove_temporaries(run_dir / part)
            models = _fused(plan, run_dir) | _trained(plan, recipe, run_dir)
            for name, model in models.items():
                _score(recipe, run_dir, name, model)


def _fused(plan: Plan, run_dir: Path) -> dict[str, Path]:
    found = {}
    for name, weights in plan.mixes.items():
        parts = {run_dir / "train" / part: weight for part, weight in weights.items() if weight > 0}
        output = run_dir / "fusions" / name
        key = digest([__version__, [[part.name, weight, model_digest(part)] for part, weight in parts.items()]])
        if not _stands(output, key):
            fuse(parts, output)
        found[name] = output
    return found


def _trained(plan: Plan, recipe: Recipe, run_dir: Path) -> dict[str, Path]:
    found = {}
    base = Path(pipeline.make_job("train", recipe, run_dir).model("base"))
    data = run_dir / "align" / "sft"
    for rate in plan.rates:
        if rate.name == "S1":
            continue
        output, work = run_dir / "rates" / rate.name, run_dir / "rates" / WORK / rate.name
        key = digest([__version__, asdict(rate.settings), recipe.seed, model_digest(base), dataset_digest(data)])
        if not _stands(output, key, lambda work=work: remove(work)):
            print(f"study: {rate.name} is SFT at {rate.settings.learning_rate:g}", flush=True)
            train_sft(base, data, output, rate.settings, seed=recipe.seed, threads=recipe.threads or 0, work=work)
        found[rate.name] = output
    remove(run_dir / "rates" / WORK)
    return found


def _stands(output: Path, key: str, also: Callable[[], None] = lambda: None) -> bool:
    """Whether a model of this key is there; one of another key, with what `also` removes, goes."""
    mark = output.with_name(f"{output.name}.key")
    if not mark.exists() or mark.read_text(encoding="utf-8") != key:
        remove(output)
        also()
        with atomic_path(mark) as temporary:
            temporary.write_text(key, encoding="utf-8")
    return output.exists()


def _score(recipe: Recipe, run_dir: Path, name: str, model: Path) -> None:
    """Writes what a model answered and scored, unless it stands there."""
    job = pipeline.make_job("evaluate", recipe, run_dir)
    key = digest([__version__, asdict(recipe.evaluate), files(job), model_digest(model)])
    done = run_dir / "scores" / f"{name}.json"
    if done.exists() and read_json(done)["key"] == key:
        return
    remove(done)
    print(f"study: {name} answers", flush=True)
    tasks, data = places(job)
    work = run_dir / "scores" / WORK
    folder = task_folder(tasks, data, work / "tasks")
    result = evaluate_model(
        str(model), recipe.evaluate, folder, cache=work / "datasets", data=None if data is None else Path(data)
    )
    write_table(done.with_suffix(".parquet"), pa.Table.from_pylist(result.items))
    write_json(done, {"key": key, "scores": result.scores})
    remove(work)
