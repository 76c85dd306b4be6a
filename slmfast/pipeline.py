"""The stages in order: which are up to date, which run, and the balance that each must show.

A stage runs again when its key changes. The key covers its settings, the seed, the content of the models it uses and
the digests of what the stages before it wrote, so a changed setting re-runs just what depends on it.
"""

import dataclasses
import fcntl
import importlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from slmfast import __version__
from slmfast.engines.settings import HTTP, check_installed, secret
from slmfast.errors import UserError
from slmfast.job import Counts, Job, resolve_model
from slmfast.recipe import STAGES, TRAINED, Recipe, dump_recipe
from slmfast.store import (
    MANIFEST,
    TEMPORARY,
    WORK,
    atomic_path,
    digest,
    model_digest,
    output_digests,
    read_json,
    read_manifest,
    remove,
    remove_temporaries,
    write_json,
)

SUMMARY = "summary.json"
LOCK = ".lock"  # also the mark of a run's folder


def stage_module(name: str) -> ModuleType:
    """The module of a stage. It has INPUTS (stages it reads), MODELS (roles it uses) and run(job) -> Counts.

    SEEDED = False says that the recipe's seed is nothing to it.
    """
    return importlib.import_module(f"slmfast.stages.{name}")


def run(recipe: Recipe, run_dir: Path, last: str | None = None, *, first: str = STAGES[0]) -> dict[str, Any]:
    """Runs all stages that are not up to date, up to `last` if given, and returns what summary.json holds.

    Those before `first`, which `link_stages` has brought in, are taken as they are.
    """
    recipe.require_complete(last)
    names = STAGES[STAGES.index(first) : STAGES.index(last) + 1 if last else None]
    check_later_stages(recipe, run_dir)
    if "rate" in names:
        check_judge(recipe, run_dir)
    if run_dir.exists() and not (run_dir / LOCK).exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UserError(f"{run_dir} holds other files: give a new folder with --run-dir")
    run_dir.mkdir(parents=True, exist_ok=True)
    with only_run(run_dir):
        for folder in (run_dir / name for name in ("raw", *names) if not (run_dir / name).is_symlink()):
            remove_temporaries(folder)
        for stale in run_dir.glob(f".*{TEMPORARY}"):
            remove(stale)
        with atomic_path(run_dir / "recipe.yaml") as temporary:
            temporary.write_text(dump_recipe(recipe), encoding="utf-8")
        _set_threads(recipe)
        _write_world(recipe, run_dir)
        for name in names:
            job = make_job(name, recipe, run_dir)
            if is_up_to_date(job):
                remove(job.folder / WORK)  # a kill may have left it behind a finished manifest
                print(f"{name}: up to date", flush=True)
            else:
                (run_dir / SUMMARY).unlink(missing_ok=True)
                run_stage(job)
            accompany(job)
        if last in (None, STAGES[-1]):
            summary = summarize(recipe, run_dir)
            write_json(run_dir / SUMMARY, summary)
            return summary
    return {"stages": stage_table(run_dir, last)}


def link_stages(source: Path, run_dir: Path, first: str) -> None:
    """Makes a run's folder whose raw files and stages before `first` are another run's, by links."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / LOCK).touch()
    for name in ("raw", *STAGES[: STAGES.index(first)]):
        link, target = run_dir / name, Path(os.path.relpath(source / name, run_dir))
        if link.is_symlink() and link.readlink() == target:
            continue
        remove(link)
        if (source / name).exists():
            link.symlink_to(target)
    for name in STAGES[STAGES.index(first) :]:  # links of an earlier call that began later
        if (run_dir / name).is_symlink():
            remove(run_dir / name)


def check_later_stages(recipe: Recipe, run_dir: Path) -> None:
    """Raises UserError for what would stop a run later on: models, keys, raw files, rules, tasks that are not there."""
    for role in ("base", "large", "small", "judge"):
        resolve_model(recipe, role, run_dir)
        if role != "base":
            check_installed(recipe.engine(role), f"engines.{recipe.engine_role(role)}")
            secret(recipe.engine(role), f"engines.{recipe.engine_role(role)}")
    raw_is_ours = recipe.world is not None  # and not written yet
    own = ("categorize", "evaluate")
    for name in own if raw_is_ours else ("collect", "align", *own):
        stage_module(name).files(make_job(name, recipe, run_dir))


def check_judge(recipe: Recipe, run_dir: Path) -> None:
    """Raises UserError where rate has not run with the judge of now, whose server is there and can't score a text."""
    engine = recipe.engine("judge")
    if engine.kind in HTTP and not is_up_to_date(make_job("rate", recipe, run_dir)):
        from slmfast.engines.openai import check_scoring

        check_scoring(engine, resolve_model(recipe, "judge", run_dir), f"engines.{recipe.engine_role('judge')}")


@contextmanager
def only_run(run_dir: Path) -> Iterator[None]:
    """Holds the run's folder: two runs in one folder would tear each other's files."""
    with (run_dir / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{run_dir} is in use by another run: wait for it or give another --run-dir") from error
        yield


def _set_threads(recipe: Recipe) -> None:
    if recipe.threads is not None:
        import torch

        torch.set_num_threads(recipe.threads)


def _write_world(recipe: Recipe, run_dir: Path) -> None:
    """Writes the miniature's raw files, once for each size and seed."""
    if recipe.world is None:
        return
    from slmfast.miniature.world import write_world

    folder, wanted = run_dir / "raw", dataclasses.asdict(recipe.world) | {"version": __version__}
    written = folder / "world.json"
    if written.exists() and read_json(written) == wanted:
        return
    with atomic_path(folder) as temporary:
        write_world(temporary, size=recipe.world.size, seed=recipe.world.seed)
        write_json(temporary / "world.json", wanted)


def make_job(name: str, recipe: Recipe, run_dir: Path) -> Job:
    """The job of a stage in a run folder, its inputs being the folders of the stages that it reads."""
    inputs = {stage: run_dir / stage for stage in stage_module(name).INPUTS}
    return Job(stage=name, recipe=recipe, run_dir=run_dir, folder=run_dir / name, inputs=inputs)


def model_roles(job: Job) -> tuple[str, ...]:
    """The roles of the models that a stage uses: its MODELS, or where that depends on its settings models(job)."""
    module = stage_module(job.stage)
    return module.models(job) if hasattr(module, "models") else module.MODELS


def job_key(job: Job) -> str:
    """A hash of everything that a stage's outputs depend on."""
    module = stage_module(job.stage)
    models = {role: _model_identity(job, role) for role in model_roles(job)}
    return digest(
        {
            "stage": job.stage,
            "version": __version__,
            "settings": dataclasses.asdict(job.settings),
            "seed": job.recipe.seed if getattr(module, "SEEDED", True) else None,
            "models": models,
            "inputs": _input_digests(job),
            "files": module.files(job) if hasattr(module, "files") else None,
        }
    )


def _model_identity(job: Job, role: str) -> list[Any]:
    """What a role's replies depend on: of a server not its address, nor how often or how fast it is asked."""
    engine, folder = job.recipe.engine(role), Path(job.model(role))
    if engine.kind == "local":
        return [engine.kind, model_digest(folder)]
    if engine.kind not in HTTP:
        return [engine.kind, model_digest(folder), engine.dtype, engine.window, engine.extra]
    return [engine.kind, model_digest(folder, weights=False), engine.model, engine.window, engine.extra]


def _input_digests(job: Job) -> dict[str, str]:
    """The digest of what each stage before wrote; of a folder without a manifest, that of its files."""
    digests = {}
    for stage, folder in job.inputs.items():
        manifest = folder / MANIFEST
        digests[stage] = read_manifest(folder)["digest"] if manifest.exists() else digest(output_digests(folder))
    return digests


def may_write(job: Job) -> bool:
    """Whether a stage's folder is new, empty, or one that the same stage has written or begun."""
    if (job.folder / MANIFEST).exists():
        return read_manifest(job.folder)["stage"] == job.stage
    begun = job.folder / WORK / "key"
    if begun.exists():
        return begun.read_text().startswith(f"{job.stage} ")
    return not job.folder.exists() or {path.name for path in job.folder.iterdir()} <= {WORK}


def is_up_to_date(job: Job) -> bool:
    """Whether a stage has finished with the settings and inputs of now, and its files are still there."""
    if not (job.folder / MANIFEST).exists():
        return False
    manifest = read_manifest(job.folder)
    if manifest["key"] != job_key(job):
        return False
    return all((job.folder / name).exists() for name in manifest["outputs"])


def run_stage(job: Job) -> None:
    """Runs one stage, going on from what a broken run of the same key has finished, and writes its manifest."""
    key = job_key(job)
    mark = f"{job.stage} {key}"
    begun = job.folder / WORK / "key"
    if (job.folder / MANIFEST).exists() or not begun.exists() or begun.read_text() != mark:
        remove(job.folder)
    remove_temporaries(job.folder)
    with atomic_path(begun) as temporary:
        temporary.write_text(mark)
    print(f"{job.stage}: running", flush=True)
    start = time.monotonic()
    counts: Counts = stage_module(job.stage).run(job)
    counts.check(job.stage)
    seconds = round(time.monotonic() - start, 2)
    outputs = output_digests(job.folder)
    write_json(
        job.folder / MANIFEST,
        {
            "stage": job.stage,
            "key": key,
            "settings": dataclasses.asdict(job.settings),
            "seed": job.recipe.seed,
            "inputs": _input_digests(job),
            "code_version": __version__,
            "counts": counts._asdict(),
            "notes": job.notes,
            "outputs": outputs,
            "digest": digest(outputs),
            "seconds": seconds,
        },
    )
    remove(job.folder / WORK)
    print(f"{job.stage}: {describe(counts)} in {seconds:.1f} s", flush=True)


def accompany(job: Job) -> None:
    """Brings up to date what a finished stage keeps beside its outputs, if anything."""
    module = stage_module(job.stage)
    if hasattr(module, "accompany"):
        module.accompany(job)


def describe(counts: Counts) -> str:
    """One stage's balance in words."""
    if counts.rows_in is None:
        return f"{counts.out:,} out"
    return f"{counts.rows_in:,} in = {counts.out:,} out + {counts.dropped:,} dropped + {counts.rejected:,} rejected"


def stage_table(run_dir: Path, last: str | None = None) -> dict[str, dict[str, Any]]:
    """The counts and seconds of every finished stage up to `last`, by name, in order."""
    table = {}
    for name in STAGES[: STAGES.index(last) + 1 if last else None]:
        if (run_dir / name / MANIFEST).exists():
            manifest = read_manifest(run_dir / name)
            counts = manifest["counts"]
            table[name] = {"in": counts["rows_in"]} | {k: counts[k] for k in ("out", "dropped", "rejected")}
            table[name]["seconds"] = manifest["seconds"]
    return table


def summarize(recipe: Recipe, run_dir: Path) -> dict[str, Any]:
    """The content of summary.json."""
    models = {"base": resolve_model(recipe, "base", run_dir)}
    models |= {name: str(run_dir / "train" / name) for name in TRAINED}
    models["fused"] = str(run_dir / "fuse" / "fused")
    return {
        "stages": stage_table(run_dir),
        "models": models,
        "scores": read_json(run_dir / "evaluate" / "scores.json"),
        "report": str(run_dir / "report" / "report.html"),
    }


def format_stage_table(stages: dict[str, dict[str, Any]]) -> str:
    """The stage table as aligned text."""
    lines = [f"{'stage':<12}{'in':>10}{'out':>10}{'dropped':>10}{'rejected':>10}{'seconds':>10}"]
    for name, row in stages.items():
        cells = ["-" if row[key] is None else f"{row[key]:,}" for key in ("in", "out", "dropped", "rejected")]
        lines.append(f"{name:<12}" + "".join(f"{cell:>10}" for cell in cells) + f"{row['seconds']:>10.1f}")
    return "\n".join(lines)
