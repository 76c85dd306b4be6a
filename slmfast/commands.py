"""What each sub-command does. A handler takes the parsed arguments and returns an exit code, None for success."""

import dataclasses
import importlib.util
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml

from slmfast import pipeline
from slmfast.errors import UserError
from slmfast.job import Job
from slmfast.recipe import STAGES, Evaluate, Recipe, Source, build, load_recipe
from slmfast.records import RECORD_SCHEMA
from slmfast.store import MANIFEST, only_writer, table_schema, write_json, write_table

MINIATURE = Path(__file__).parent / "miniature" / "recipe.yaml"


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


def format_study(found: dict[str, Any]) -> str:
    """A study's means over seeds in points with their standard errors, a row a model, and its statements."""
    tasks = [*found["tasks"], "mean"]
    lines = [f"{'model':<14}" + "".join(f"{task:>17}" for task in tasks)]
    for model, means in found["means"].items():
        cells = []
        for task in tasks:
            error = means[task]["stderr"]
            cells.append(f"{100 * means[task]['value']:.1f}" + ("" if not error else f" ±{100 * error:.1f}"))
        lines.append(f"{model:<14}" + "".join(f"{cell:>17}" for cell in cells))
    for claim in found["claims"]:
        lines += ["", f"{claim['statement']}: {'yes' if claim['holds'] else 'no'}. {claim['words']}"]
    return "\n".join(lines)


def status(arguments: Namespace) -> None:
    """Shows which stages of a run are done."""
    run_dir = arguments.run_dir
    if not (run_dir / "recipe.yaml").exists():
        raise UserError(f"{run_dir} holds no run: give the --run-dir of a run")
    recipe = load_recipe(run_dir / "recipe.yaml")
    fresh = True
    for name in STAGES:
        job = pipeline.make_job(name, recipe, run_dir.absolute())
        fresh = fresh and pipeline.is_up_to_date(job)
        print(f"{name:<12}{'done' if fresh else _unfinished(job)}")
    print()
    print(pipeline.format_stage_table(pipeline.stage_table(run_dir)))


def _unfinished(job: Job) -> str:
    if (job.folder / MANIFEST).exists():
        return "out of date"
    return "begun" if job.folder.exists() else "to do"


def report(arguments: Namespace) -> None:
    """Writes a finished run's report again."""
    run_dir = arguments.run_dir.absolute()
    if not (run_dir / "evaluate" / MANIFEST).exists():
        raise UserError(f"{run_dir} has no finished evaluation: end the run first with slmfast run")
    recipe = load_recipe(run_dir / "recipe.yaml")
    with pipeline.only_run(run_dir):
        pipeline.run_stage(pipeline.make_job("report", recipe, run_dir))
    print(f"report: {run_dir / 'report' / 'report.html'}")


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
    problems = check_sources(sources, recipe.collect.max_text_bytes, shown=arguments.show)
    return 1 if problems else 0


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
    pipeline.accompany(job)


def _whereabouts(job: Job, role: str) -> str:
    engine, folder = job.recipe.engine(role), job.model(role)
    if engine.base_url is None:
        return f"{folder} (models.{role})"
    return f"{engine.model} at {engine.base_url} (engines.{job.recipe.engine_role(role)})"


def train(arguments: Namespace) -> None:
    """Trains one model."""
    from slmfast.training.kto import train_kto
    from slmfast.training.settings import TrainSettings
    from slmfast.training.sft import train_sft

    values = dict(_setting(text) for text in arguments.set)
    if "method" in values:
        raise UserError(f"--set method={values['method']}: the method is the word after train, sft or kto")
    if arguments.method == "sft" and arguments.reference is not None:
        raise UserError("--reference: only KTO has a reference model, leave it out or train kto")
    if arguments.budget is not None:
        values["budget"] = arguments.budget
    settings = build(TrainSettings, values | {"method": arguments.method}, "")
    common: dict[str, Any] = {"seed": arguments.seed}
    if arguments.method == "kto":
        common["reference"] = arguments.reference
    train_model = train_kto if arguments.method == "kto" else train_sft
    with only_writer(arguments.output.absolute()):
        train_model(arguments.model, arguments.data, arguments.output, settings, **common)
    print(f"trained model: {arguments.output}")


def plan(arguments: Namespace) -> None:
    """Says what training a model takes of a device's memory, beside TRL."""
    from slmfast.training.memory import RATES
    from slmfast.training.plan_report import report
    from slmfast.training.settings import TrainSettings

    values: dict[str, Any] = {"learning_rate": RATES[arguments.method]} | dict(map(_setting, arguments.set))
    for name in ("method", "budget"):
        if name in values:
            raise UserError(f"--set {name}={values[name]}: a plan is told it by --{name} {values[name]}")
    flags = ("optimizer", "forward", "max_length", "pack_tokens", "checkpointing")
    values |= {name: getattr(arguments, name) for name in flags if getattr(arguments, name) is not None}
    settings = build(TrainSettings, values | {"method": arguments.method}, "")
    for line in report(arguments.model, settings, arguments.budget):
        print(line, flush=True)


def _setting(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise UserError(f"--set {text}: write key=value, for instance --set learning_rate=5e-8")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {text}: the value is not YAML") from error


def fuse(arguments: Namespace) -> None:
    """Averages models, by weights that are given or found."""
    from slmfast.fusion import fuse as fuse_models

    if arguments.search:
        _search_fusion(arguments)
        return
    for flag in ("step", "tasks", "test_tasks"):
        if getattr(arguments, flag) is not None:
            raise UserError(f"--{flag.replace('_', '-')}: only a search takes it, add --search")
    weights = {}
    for text in arguments.models:
        model, _, weight = text.rpartition("=")
        if not model:
            raise UserError(f"{text}: write MODEL=WEIGHT, for instance runs/miniature/train/S1=0.5")
        if Path(model).absolute() in map(Path.absolute, map(Path, weights)):
            raise UserError(f"{model} is named twice: give each model once")
        try:
            weights[model] = float(weight)
        except ValueError as error:
            raise UserError(f"{text}: the weight is not a number") from error
    with only_writer(arguments.output.absolute()):
        fuse_models(weights, arguments.output, dtype=arguments.dtype, base=arguments.base)
    print(f"fused model: {arguments.output}")


def _search_fusion(arguments: Namespace) -> None:
    from slmfast.fusion_search import SEARCH, search

    if arguments.tasks is None:
        raise UserError("--tasks is missing: name the development tasks that choose the weights")
    if arguments.dtype != "float32" or arguments.base is not None:
        raise UserError("--dtype and --base: a search writes float32; fuse its winner's weights again for another type")
    for model in arguments.models:
        if "=" in model and not Path(model).exists():
            raise UserError(f"{model}: a search finds the weights, name the model folder alone")
    development = Evaluate(
        tasks=arguments.tasks.split(","),
        task_folder=arguments.task_folder,
        data=arguments.data,
        limit=arguments.limit,
        chat_template=not arguments.no_chat_template,
        run_generated_code=arguments.run_generated_code,
    )
    test = None
    if arguments.test_tasks is None:
        print("fuse --search: no --test-tasks, so nobody checks that these are not the items that will judge")
    else:
        test = Evaluate(
            tasks=arguments.test_tasks.split(","),
            task_folder=arguments.test_task_folder or arguments.task_folder,
            data=arguments.test_data or arguments.data,
            run_generated_code=True,  # only its questions are read
        )
    step = 0.25 if arguments.step is None else arguments.step
    found = search(arguments.models, arguments.output, development, step=step, test=test)
    print(format_search(found))
    print(f"fused model: {arguments.output}, all scores: {arguments.output / SEARCH}")


def format_search(found: dict[str, Any]) -> str:
    """A search's points, best first, in percent with standard errors, and the winner's lead."""
    names = [Path(model).name for model in found["models"]]
    lines = ["".join(f"{name:>12}" for name in names) + f"{'score':>15}"]
    for point in sorted(found["points"], key=lambda point: -point["value"]):
        error = "" if point["stderr"] is None else f" ±{100 * point['stderr']:.1f}"
        weights = "".join(f"{weight:>12g}" for weight in point["weights"])
        score = f"{100 * point['value']:.1f}{error}"
        lines.append(f"{weights}{score:>15}")
    winner = found["winner"]
    error = "" if winner["lead_stderr"] is None else f" ±{100 * winner['lead_stderr']:.1f}"
    lines.append(
        f"lead over the best single model, {Path(winner['best_single']).name}: {100 * winner['lead']:.1f}{error}"
    )
    return "\n".join(lines)


def evaluate(arguments: Namespace) -> None:
    """Scores models on lm-eval tasks."""
    import tempfile

    import pyarrow as pa

    from slmfast.evaluation import evaluate_model, task_folder
    from slmfast.evaluation.paired import format_differences, paired_differences
    from slmfast.evaluation.run import described
    from slmfast.sandbox import check_sandbox
    from slmfast.stages.evaluate import survival

    settings = _evaluation_settings(arguments)
    if settings.run_generated_code:
        check_sandbox()
    models = _named_models(arguments.models)
    data = None if arguments.data is None else Path(arguments.data)
    print(f"evaluate: {described(settings, data)}", flush=True)
    base, scores, items = next(iter(models.values())), {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = task_folder(arguments.task_folder, arguments.data, Path(scratch) / "tasks")
        for name, model in models.items():
            print(f"evaluate: {name}{survival(base, model, settings.dtype)}", flush=True)
            result = evaluate_model(model, settings, folder, Path(scratch) / "cache", data)
            scores[name], items[name] = result.scores, pa.Table.from_pylist(result.items)
            write_table(_beside(arguments.output, "items") / f"{name}.parquet", items[name])
            write_json(_beside(arguments.output, "settings.json"), result.settings)
    write_json(arguments.output, scores)
    print(format_scores(scores))
    if len(models) > 1:
        differences = paired_differences(items, arguments.seed)
        write_json(_beside(arguments.output, "differences.json"), differences)
        print(f"\n{format_differences(differences)}")


def _evaluation_settings(arguments: Namespace) -> Evaluate:
    if arguments.tasks is None and arguments.suite is None:
        raise UserError("nothing to answer: name --tasks, or --suite paper")
    return Evaluate(
        suite=arguments.suite,
        tasks=arguments.tasks.split(",") if arguments.tasks else [],
        limit=arguments.limit,
        chat_template=False if arguments.no_chat_template else None,
        dtype=arguments.dtype,
        run_generated_code=arguments.run_generated_code,
    )


def _beside(output: Path, what: str) -> Path:
    """A file or folder that belongs to an output: scores.json has scores.items and so on."""
    return output.with_name(f"{output.name.removesuffix('.json')}.{what}")


def _named_models(texts: list[str]) -> dict[str, str]:
    models: dict[str, str] = {}
    for text in texts:
        name, _, model = text.rpartition("=")
        name = name or Path(model).name
        if name in models:
            raise UserError(f"{name} is named twice: give each model a name of its own")
        if not (Path(model) / "config.json").is_file():
            raise UserError(f"{model} is not a model folder: give NAME=MODEL_FOLDER")
        models[name] = model
    return models


def format_scores(scores: dict[str, dict[str, Any]]) -> str:
    """Scores in percent with standard errors, a row a task."""
    tasks = list(next(iter(scores.values())))
    lines = [f"{'task':<20}" + "".join(f"{model:>15}" for model in scores)]
    for task in tasks:
        cells = []
        for model in scores:
            score = scores[model][task]
            error = "" if score["stderr"] is None else f" ±{100 * score['stderr']:.1f}"
            cells.append(f"{100 * score['value']:.1f}{error}")
        lines.append(f"{task:<20}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def doctor(arguments: Namespace) -> None:
    """Says what this machine offers, and how a model would be scored on it."""
    from slmfast.doctor import findings

    for name, text in findings(arguments.model):
        print(f"{name:<22}{text}")


def bench(arguments: Namespace) -> int:
    """Runs a benchmark from the source tree: benchmarks are not part of the installed package."""
    script = Path(__file__).parent.parent / "bench" / f"{arguments.what}.py"
    if not script.exists():
        raise UserError("benchmarks run from a source checkout: clone the repository and install it with make install")
    spec = importlib.util.spec_from_file_location(f"slmfast_bench_{arguments.what}", script)
    if spec is None or spec.loader is None:
        raise UserError(f"{script} can't be loaded: the checkout is damaged")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main(arguments.rest) or 0
