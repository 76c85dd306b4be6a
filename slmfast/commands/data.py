"""The stages that make the data, one at a time, each on the folder that the stage before it wrote."""

import dataclasses
import sys
from argparse import Namespace
from pathlib import Path

from slmfast import pipeline
from slmfast.errors import UserError
from slmfast.job import Job
from slmfast.recipe import STAGES, Recipe, Source, load_recipe
from slmfast.records import RECORD_SCHEMA
from slmfast.reporting.run_folder import RunFolder
from slmfast.store import only_writer, table_schema

REASONS = 10  # of rows that went, which are told


def collect(arguments: Namespace) -> int | None:
    """Reads raw files into records, or only tells what is wrong with them."""
    recipe = _settings(arguments)
    if arguments.input:
        if arguments.format is None:
            raise UserError("--format is missing: say of which format the files are, for instance --format alpaca")
        source = Source(name=arguments.name, format=arguments.format, path=arguments.input)
        recipe = dataclasses.replace(recipe, collect=dataclasses.replace(recipe.collect, sources=[source]))
    elif not recipe.collect.sources:
        raise UserError("nothing to collect: name files and their --format, or a --recipe with collect.sources")
    if arguments.check:
        return _check_sources(recipe, arguments)
    if arguments.output is None:
        raise UserError("-o is missing: give the folder to write, or --check to write nothing")
    _run_alone(arguments, recipe, "collect", {})
    return None


def _check_sources(recipe: Recipe, arguments: Namespace) -> int:
    from slmfast.source_check import check_sources
    from slmfast.stages.collect import source_paths

    run_dir = (arguments.output or Path("runs") / recipe.name).absolute()
    job = Job("collect", recipe, run_dir, run_dir, {})
    sources = [(source.name, source.format, source_paths(job, source)) for source in recipe.collect.sources]
    try:
        return 1 if check_sources(sources, recipe.collect.max_text_bytes, shown=arguments.show) else 0
    except KeyboardInterrupt:
        print("slmfast: interrupted; the check is not complete, and nothing is written", file=sys.stderr)
        return 130


def data_stage(arguments: Namespace) -> None:
    """Runs one stage on the folder that the stage before it wrote."""
    stage = arguments.stage
    _run_alone(arguments, _settings(arguments), stage, _stage_input(stage, arguments.input))


def dedup(arguments: Namespace) -> None:
    """Drops near-duplicates, from records or from one column of any tables."""
    recipe = _dedup_recipe(arguments)
    if arguments.column is None:
        if len(arguments.input) > 1 or arguments.input[0].is_file():
            raise UserError(f"{arguments.input[-1]}: files need --column, the name of their column of texts")
        _run_alone(arguments, recipe, "dedup", _stage_input("dedup", arguments.input[0]))
        return
    from slmfast.dedup_files import dedup_files

    settings = dataclasses.asdict(recipe.dedup) | {"threads": recipe.threads or 0}
    kept, dropped, alarm = dedup_files(arguments.input, arguments.column, arguments.output, **settings)
    if alarm is not None:
        print(f"dedup: {alarm}")
    print(f"{kept + dropped:,} rows in = {kept:,} kept + {dropped:,} dropped: {arguments.output}")


def _dedup_recipe(arguments: Namespace) -> Recipe:
    """The recipe given, or the defaults, with the command's own flags laid over it."""
    if arguments.no_verify and arguments.verify is not None:
        raise UserError("--verify and --no-verify exclude each other: give one of them")
    given = {name: getattr(arguments, name) for name in ("k", "verify", "mode", "ngram")}
    values = {name: value for name, value in given.items() if value is not None}
    if arguments.no_verify:
        values["verify"] = None
    recipe = _settings(arguments)
    for name, value in values.items():
        try:
            recipe = dataclasses.replace(recipe, dedup=dataclasses.replace(recipe.dedup, **{name: value}))
        except UserError as error:  # a section of a recipe names its own keys
            remedy = str(error).removeprefix(f"recipe key dedup.{name}: ").replace("or null", "or --no-verify")
            raise UserError(f"--{name} is {value}: {remedy}") from error
    return recipe if arguments.threads is None else dataclasses.replace(recipe, threads=arguments.threads or None)


def _settings(arguments: Namespace) -> Recipe:
    """The recipe that a single stage takes its settings from: the one given, else the defaults."""
    return load_recipe(arguments.recipe, arguments.set)


def _stage_input(stage: str, folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the one that the stage before {stage} wrote")
    inputs = dict.fromkeys(pipeline.stage_module(stage).INPUTS, folder.absolute())
    table = folder / "records" if (folder / "records").is_dir() else folder
    columns = set(table_schema(table).names)
    missing = set(RECORD_SCHEMA.names)
    for earlier in STAGES[: STAGES.index(stage)]:
        missing |= {field.name for field in getattr(pipeline.stage_module(earlier), "COLUMNS", ())}
    missing -= columns
    if missing:
        lacks = f"{folder} lacks the columns {', '.join(sorted(missing))}"
        raise UserError(f"{lacks}: run slmfast {pipeline.stage_module(stage).INPUTS[0]} first and give its folder")
    if columns & {field.name for field in getattr(pipeline.stage_module(stage), "COLUMNS", ())}:
        raise UserError(f"{folder} has been through {stage} already: give the folder of the stage before")
    return inputs


def _run_alone(arguments: Namespace, recipe: Recipe, stage: str, inputs: dict[str, Path]) -> None:
    folder = arguments.output.absolute()
    job = Job(stage=stage, recipe=recipe, run_dir=folder, folder=folder, inputs=inputs)
    for source in inputs.values():
        if folder == source or folder in source.parents or source in folder.parents:
            raise UserError(f"{folder} is, holds or lies in the input {source}: give another folder with -o")
    if folder.is_file() or not pipeline.may_write(job):
        raise UserError(f"{folder} holds other files: give a new folder with -o")
    if pipeline.is_up_to_date(job):
        print(f"{stage}: up to date")
    else:
        for role in pipeline.model_roles(job):
            print(f"{stage}: the {role} model is {_whereabouts(job, role)}")
        with only_writer(folder):
            pipeline.run_stage(job)
        _print_reasons(job)
    pipeline.accompany(job)


def _print_reasons(job: Job) -> None:
    """Tells why rows went; the tables have every row with its place."""
    run = RunFolder(job.run_dir, job.recipe, {job.stage: job.folder})
    for table in ("rejected", "dropped"):
        reasons = run.reasons(job.stage, table)
        for reason, count in reasons[:REASONS]:
            print(f"{count:>10,}  {table}: {reason[:200]}")
        rest = [count for _, count in reasons[REASONS:]]
        if rest:
            print(f"{sum(rest):>10,}  {table}: {len(rest):,} more reasons")


def _whereabouts(job: Job, role: str) -> str:
    engine, folder = job.recipe.engine(role), job.model(role)
    if engine.base_url is None:
        return f"{folder} (models.{role})"
    return f"{engine.model} at {engine.base_url} (engines.{job.recipe.engine_role(role)})"
