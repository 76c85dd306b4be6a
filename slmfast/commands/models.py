"""Models: to train, plan, fuse and evaluate them, on data and tasks that are named."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml

from slmfast.commands.tables import format_scores, format_search
from slmfast.errors import UserError
from slmfast.recipe import Evaluate, build
from slmfast.store import only_writer, remove, write_json, write_table
from slmfast.yaml_text import load_yaml


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
        return key, load_yaml(value)
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
        fuse_models(
            weights, arguments.output, dtype=arguments.dtype, base=arguments.base, mixed_dtypes=arguments.mixed_dtypes
        )
    print(f"fused model: {arguments.output}")


def _search_fusion(arguments: Namespace) -> None:
    from slmfast.fusion_search import SEARCH, search

    tasks = _tasks(arguments.tasks)
    if not tasks:
        raise UserError("--tasks is missing: name the development tasks that choose the weights")
    if arguments.dtype != "float32" or arguments.base is not None or arguments.mixed_dtypes:
        raise UserError(
            "--dtype, --base, --mixed-dtypes: a search writes float32 and takes models of any type; fuse its winner's "
            "weights again for another"
        )
    for model in arguments.models:
        if "=" in model and not Path(model).exists():
            raise UserError(f"{model}: a search finds the weights, name the model folder alone")
    development = Evaluate(
        tasks=tasks,
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
            tasks=_tasks(arguments.test_tasks),
            task_folder=arguments.test_task_folder or arguments.task_folder,
            data=arguments.test_data or arguments.data,
            run_generated_code=True,  # only its questions are read
        )
    step = 0.25 if arguments.step is None else arguments.step
    with only_writer(arguments.output.absolute()):
        found = search(arguments.models, arguments.output, development, step=step, test=test)
    print(format_search(found))
    print(f"fused model: {arguments.output}, all scores: {arguments.output / SEARCH}")


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
    beside = _beside(arguments.output, "differences.json")
    remove(beside)  # an earlier evaluation's, which the new scores would belie
    write_json(arguments.output, scores)
    print(format_scores(scores))
    if len(models) > 1:
        differences = paired_differences(items, arguments.seed)
        write_json(beside, differences)
        print(f"\n{format_differences(differences)}")


def _evaluation_settings(arguments: Namespace) -> Evaluate:
    tasks = _tasks(arguments.tasks)
    if not tasks and arguments.suite is None:
        raise UserError("nothing to answer: name --tasks, or --suite paper")
    return Evaluate(
        suite=arguments.suite,
        tasks=tasks,
        limit=arguments.limit,
        chat_template=False if arguments.no_chat_template else None,
        dtype=arguments.dtype,
        run_generated_code=arguments.run_generated_code,
    )


def _tasks(text: str | None) -> list[str]:
    """The names in a list with commas, each once."""
    return list(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))


def _beside(output: Path, what: str) -> Path:
    """A file or folder that belongs to an output: scores.json has scores.items and so on."""
    return output.with_name(f"{output.name.removesuffix('.json')}.{what}")


def _named_models(texts: list[str]) -> dict[str, str]:
    models: dict[str, str] = {}
    for text in texts:
        whole = "=" not in text or (Path(text) / "config.json").is_file()  # a folder may be called lr=1e-6
        name, _, model = ("", "", text) if whole else text.partition("=")
        name = name or Path(model).name
        if name in models:
            raise UserError(f"{name} is named twice: give each model a name of its own")
        if not (Path(model) / "config.json").is_file():
            raise UserError(f"{model} is not a model folder: give NAME=MODEL_FOLDER")
        models[name] = model
    return models
