"""Whole runs: a recipe's stages, its study, how far a run is, its report."""

from argparse import Namespace
from pathlib import Path

from slmfast import pipeline
from slmfast.commands.tables import format_scores, format_study
from slmfast.errors import UserError
from slmfast.job import Job
from slmfast.recipe import STAGES, load_recipe
from slmfast.stages.report import ended_stages
from slmfast.store import MANIFEST

MINIATURE = Path(__file__).parent.parent / "miniature" / "recipe.yaml"


def run(arguments: Namespace) -> None:
    """Runs a recipe and shows the stage table and the scores."""
    if arguments.until is not None and arguments.until not in STAGES:
        raise UserError(f"--until {arguments.until}: the stages are {', '.join(STAGES)}")
    recipe = load_recipe(arguments.recipe or MINIATURE, arguments.set)
    run_dir = (arguments.run_dir or Path("runs") / recipe.name).absolute()
    summary = pipeline.run(recipe, run_dir, arguments.until)
    print()
    print(pipeline.format_stage_table(summary["stages"]))
    if "scores" in summary:
        print()
        print(format_scores(summary["scores"]))
        print(f"\nreport: {summary['report']}")


def study(arguments: Namespace) -> None:
    """Runs a recipe's study and shows its scores and what became of the paper's statements."""
    from slmfast.study.plan import make_plan

    recipe = load_recipe(arguments.recipe or MINIATURE, arguments.set)
    plan = make_plan(recipe, seeds=arguments.seeds, rates=arguments.rates, vary_from=arguments.vary_from)
    folder = (arguments.run_dir or Path("runs") / f"{recipe.name}-study").absolute()
    from slmfast.study.run import run_study

    given = [f"--seeds {arguments.seeds}", f"--vary-from {arguments.vary_from}"]
    given += [] if arguments.rates is None else [" ".join(["--rates", *arguments.rates])]
    found = run_study(plan, folder, " ".join(given))
    print(f"\n{format_study(found)}\n\nreport: {found['report']}")


def status(arguments: Namespace) -> None:
    """Shows which stages of a run are done."""
    run_dir = arguments.run_dir
    if not (run_dir / "recipe.yaml").exists():
        raise UserError(f"{run_dir} holds no run: give the --run-dir of a run")
    _refuse_study(run_dir)
    recipe = load_recipe(run_dir / "recipe.yaml")
    fresh = True
    for name in STAGES:
        job = pipeline.make_job(name, recipe, run_dir.absolute())
        fresh = fresh and pipeline.is_up_to_date(job)
        print(f"{name:<12}{'done' if fresh else _unfinished(job)}")
    print()
    print(pipeline.format_stage_table(pipeline.stage_table(run_dir)))


def _refuse_study(run_dir: Path) -> None:
    if runs := sorted(path.name for path in run_dir.glob("seed-*")):
        raise UserError(f"{run_dir} is a study, which slmfast study writes: name one of its runs, such as {runs[0]}")


def _unfinished(job: Job) -> str:
    if (job.folder / MANIFEST).exists():
        return "out of date"
    return "begun" if job.folder.exists() else "to do"


def report(arguments: Namespace) -> None:
    """Writes a run's report again, or that of the stages that an unfinished run has."""
    run_dir = arguments.run_dir.absolute()
    _refuse_study(run_dir)
    folders = [run_dir / name for name in STAGES[:-1]]
    if not (run_dir / "recipe.yaml").exists() or not any((folder / MANIFEST).exists() for folder in folders):
        raise UserError(f"{run_dir} holds no finished stage: run a recipe first with slmfast run")
    recipe = load_recipe(run_dir / "recipe.yaml")
    job = pipeline.make_job("report", recipe, run_dir)
    with pipeline.only_run(run_dir):
        pipeline.run_stage(job)
    ended = ended_stages(job)
    for words, there in (("have not ended", False), ("are out of date", True)):
        missing = [path.name for path in folders if path.name not in ended and (path / MANIFEST).exists() is there]
        if missing:
            print(f"not in it, for they {words}: {', '.join(missing)}")
    print(f"report: {run_dir / 'report' / 'report.html'}")
