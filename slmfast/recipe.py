"""The recipe: everything that a run depends on, as validated dataclasses read from YAML.

A recipe has one section a stage, under the stage's name. Each value that can't be right is refused at once, with the
key that holds it and what to write instead. Paths may hold `${NAME}`: an environment variable, `${RUN}`, the run's
own folder, or `${RECIPE}`, the folder of the recipe's file.
"""

import dataclasses
import difflib
import os
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from slmfast.engines.settings import ENGINES, HTTP, Engines, EngineSettings
from slmfast.errors import UserError
from slmfast.training.settings import TrainSettings

STAGES = (
    "collect",
    "categorize",
    "dedup",
    "classify",
    "diversify",
    "regenerate",
    "rate",
    "align",
    "train",
    "fuse",
    "evaluate",
    "report",
)
TRAINED = ("S1", "S2", "S3")
CONTAMINATION = ("report", "remove", "skip")
# Benchmarks of a suite and their numbers of worked examples; slmfast.evaluation.suite says where these are from.
SUITES = {"paper": {"mmlu": 5, "cmmlu": 5, "ceval-valid": 5, "humaneval": 0, "gsm8k": 4}}
CODE_TASKS = ("humaneval", "mbpp")  # how the names of tasks begin that run what a model wrote
EVALUATION_DTYPES = ("float32", "bfloat16", "float16")


def _require(condition: bool, key: str, remedy: str) -> None:
    if not condition:
        raise UserError(f"recipe key {key}: {remedy}")


@dataclass(frozen=True, kw_only=True)
class World:
    """The built-in miniature world: raw files that the run writes for itself."""

    size: int = 6000  # raw records
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.size >= 100, "world.size", "give at least 100 records")


@dataclass(frozen=True, kw_only=True)
class Models:
    """Who answers, who judges and who is trained: folders, hub names, or builtin:large, builtin:small, builtin:base."""

    base: str = "builtin:base"  # the model to be trained
    large: str = "builtin:large"  # writes the large replies and the labels
    small: str = "builtin:small"  # writes the small replies
    judge: str | None = None  # rates replies; the large model unless named
    engine: str = "local"  # who runs them where `engines` says nothing else: local, vllm, or openai (a server)

    def __post_init__(self) -> None:
        _require(self.engine in ENGINES, "models.engine", f"use {' or '.join(ENGINES)}")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of raw records."""

    name: str
    format: str  # a name that slmfast.readers knows
    path: str | list[str]  # files or globs
    licence: str | None = None


@dataclass(frozen=True, kw_only=True)
class Collect:
    sources: list[Source] = field(default_factory=list)  # in order of priority: of two duplicates the earlier stays
    max_text_bytes: int = 1 << 20  # a longer prompt or reply is rejected

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        _require(len(set(names)) == len(names), "collect.sources", "give every source a name of its own")
        _require(self.max_text_bytes > 0, "collect.max_text_bytes", "give a positive number of bytes")


@dataclass(frozen=True, kw_only=True)
class Categorize:
    rules: str | None = None  # a YAML of rules; the built-in one unless named


@dataclass(frozen=True, kw_only=True)
class Dedup:
    k: int = 3  # the largest Hamming distance of two duplicates
    mode: str = "representative"  # or components: chains merge
    verify: float | None = 0.8  # least Jaccard similarity of the 3-grams; null: plain SimHash
    ngram: int = 3

    def __post_init__(self) -> None:
        _require(1 <= self.ngram <= 9, "dedup.ngram", "give 1 to 9 characters")
        _require(0 <= self.k <= 8, "dedup.k", "give a distance from 0 to 8")
        _require(self.mode in ("representative", "components"), "dedup.mode", "use representative or components")
        _require(self.verify is None or 0 <= self.verify <= 1, "dedup.verify", "give a share from 0 to 1, or null")


@dataclass(frozen=True, kw_only=True)
class Classify:
    sample: int | None = None  # label only so many records, chosen by a seeded hash; all of them unless given
    max_new_tokens: int = 32
    unit_rows: int = 1024  # rows that are labelled, written and, after a break, redone together

    def __post_init__(self) -> None:
        _require(self.sample is None or self.sample > 0, "classify.sample", "give a positive number, or null for all")
        _require(self.max_new_tokens > 0, "classify.max_new_tokens", "give a positive number")
        _require(self.unit_rows > 0, "classify.unit_rows", "give a positive number")


@dataclass(frozen=True, kw_only=True)
class Diversify:
    target: int = 500_000  # records to keep
    min_label_count: int = 10  # labels with fewer records go
    audit: int | None = None  # records of each label that the judge is asked about; no audit unless given
    audit_threshold: float = 0.5  # a label goes where the judge finds a smaller share of them right

    def __post_init__(self) -> None:
        _require(self.target > 0, "diversify.target", "give a positive number")
        _require(self.min_label_count >= 0, "diversify.min_label_count", "give zero or more")
        _require(
            self.audit is None or self.audit > 0, "diversify.audit", "give a positive number, or null for no audit"
        )
        _require(0 <= self.audit_threshold <= 1, "diversify.audit_threshold", "give a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Regenerate:
    max_new_tokens: int = 1024
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    unit_rows: int = 512

    def __post_init__(self) -> None:
        _require(self.max_new_tokens > 0, "regenerate.max_new_tokens", "give a positive number")
        _require(self.temperature >= 0, "regenerate.temperature", "give zero (greedy) or more")
        _require(0 < self.top_p <= 1, "regenerate.top_p", "give a share above 0, at most 1")
        _require(self.unit_rows > 0, "regenerate.unit_rows", "give a positive number")


@dataclass(frozen=True, kw_only=True)
class Rate:
    unit_rows: int = 512
    token_budget: int | None = None  # tokens scored together; what the memory holds at the first run unless given

    def __post_init__(self) -> None:
        _require(self.unit_rows > 0, "rate.unit_rows", "give a positive number")
        _require(
            self.token_budget is None or self.token_budget > 0, "rate.token_budget", "give a positive number of tokens"
        )


@dataclass(frozen=True, kw_only=True)
class Align:
    sft_size: int = 100_000  # SFT rows at most, water-filled over the labels
    positives_per_negative: float = 2.0
    max_reply_tokens: int | None = None  # a longer reply never wins
    outlier_fences: float = 3.0  # a reply that many quartile ranges above the third quartile of bits a token never wins
    benchmarks: dict[str, str | list[str]] = field(default_factory=dict)  # files or globs of each one's items, by name
    contamination: str = "report"  # records that hold items of the benchmarks: report, remove, or skip the check

    def __post_init__(self) -> None:
        _require(self.sft_size > 0, "align.sft_size", "give a positive number")
        _require(self.positives_per_negative > 0, "align.positives_per_negative", "give a positive number")
        _require(self.outlier_fences > 0, "align.outlier_fences", "give a positive number")
        _require(self.contamination in CONTAMINATION, "align.contamination", f"use {', '.join(CONTAMINATION)}")


@dataclass(frozen=True, kw_only=True)
class Train:
    """The three trainings of the study. S1 is SFT, S2 is KTO, S3 is KTO from S1."""

    S1: TrainSettings = field(default_factory=lambda: TrainSettings(method="sft", learning_rate=5e-8))
    S2: TrainSettings = field(default_factory=lambda: TrainSettings(method="kto", learning_rate=1e-8))
    S3: TrainSettings = field(default_factory=lambda: TrainSettings(method="kto", learning_rate=3e-8))

    def __post_init__(self) -> None:
        methods = (self.S1.method, self.S2.method, self.S3.method)
        _require(methods == ("sft", "kto", "kto"), "train", "S1 is method sft, S2 and S3 are method kto")


@dataclass(frozen=True, kw_only=True)
class Fuse:
    weights: dict[str, float] = field(default_factory=lambda: {"S1": 1.0, "S2": 1.0, "S3": 1.0})

    def __post_init__(self) -> None:
        known = set(self.weights) <= {"base", *TRAINED}
        _require(known and bool(self.weights), "fuse.weights", "weigh base, S1, S2 and S3 and nothing else")
        positive = all(weight >= 0 for weight in self.weights.values()) and sum(self.weights.values()) > 0
        _require(positive, "fuse.weights", "give weights of zero or more, one of them positive")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    suite: str | None = None  # paper: the paper's five benchmarks with pinned settings
    tasks: list[str] = field(
        default_factory=list
    )  # names that lm-eval knows, or files of `task_folder`; of a suite, all
    task_folder: str | None = None  # lm-eval task files of our own; builtin:miniature for the miniature's
    data: str | None = None  # what ${DATA} in those files stands for; of a suite, the folder of its files, else the hub
    limit: int | None = None  # items a task
    batch_size: int = 64  # replies written side by side
    chat_template: bool | None = None  # put each question as a user turn; without a suite yes, a suite's are bare text
    dtype: str = "float32"  # of the weights
    run_generated_code: bool = False  # humaneval runs what the models write, in a sandbox, and only if this is true

    def __post_init__(self) -> None:
        _require(self.limit is None or self.limit > 0, "evaluate.limit", "give a positive number, or null for all")
        _require(self.batch_size > 0, "evaluate.batch_size", "give a positive number")
        _require(
            self.suite is None or self.suite in SUITES, "evaluate.suite", f"use {', '.join(SUITES)}, or leave it out"
        )
        _require(self.dtype in EVALUATION_DTYPES, "evaluate.dtype", f"use {', '.join(EVALUATION_DTYPES)}")
        code = [task for task in self.names if task.startswith(CODE_TASKS)]
        _require(
            self.run_generated_code or not code,
            "evaluate.run_generated_code",
            f"{', '.join(code)} runs programs that the model writes; set it to true (or give --run-generated-code) to "
            "have them run in a sandbox, or leave it out of the tasks",
        )

    @property
    def names(self) -> list[str]:
        """The tasks, those of the suite where none are named."""
        return self.tasks or list(SUITES.get(self.suite or "", {}))

    @property
    def templated(self) -> bool:
        """Whether questions are put as user turns."""
        return self.suite is None if self.chat_template is None else self.chat_template


@dataclass(frozen=True, kw_only=True)
class Report:
    title: str = "Post-training report"
    note: str | None = None  # a sentence that stands above all figures


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run. Sections left out take their defaults."""

    name: str = "run"
    seed: int = 0
    threads: int | None = None  # of compute; all cores unless given
    world: World | None = None  # the miniature's raw files, written before collect
    models: Models = field(default_factory=Models)
    engines: Engines = field(default_factory=Engines)
    collect: Collect = field(default_factory=Collect)
    categorize: Categorize = field(default_factory=Categorize)
    dedup: Dedup = field(default_factory=Dedup)
    classify: Classify = field(default_factory=Classify)
    diversify: Diversify = field(default_factory=Diversify)
    regenerate: Regenerate = field(default_factory=Regenerate)
    rate: Rate = field(default_factory=Rate)
    align: Align = field(default_factory=Align)
    train: Train = field(default_factory=Train)
    fuse: Fuse = field(default_factory=Fuse)
    evaluate: Evaluate = field(default_factory=Evaluate)
    report: Report = field(default_factory=Report)

    def __post_init__(self) -> None:
        valid = re.fullmatch(r"[\w][\w.-]*", self.name) is not None
        _require(valid, "name", "use letters, digits, dots, dashes and underscores: it names the run's folder")
        _require(0 <= self.seed < 2**32, "seed", "give a whole number from 0 to 4294967295")
        _require(self.threads is None or self.threads > 0, "threads", "give a positive number, or null for all cores")
        for role in ("large", "small", "judge"):
            self._check_server(role)

    def engine(self, role: str) -> EngineSettings:
        """The engine of the model in a role, `kind` and, for a server, `model` and `tokenizer` filled in.

        The base model, which is trained, runs here.
        """
        if role == "base":
            return EngineSettings(kind="local")
        role = self.engine_role(role)
        given = getattr(self.engines, role) or EngineSettings()
        name = getattr(self.models, role) or self.models.large
        kind = given.kind or self.models.engine
        if kind not in HTTP:
            return dataclasses.replace(given, kind=kind)
        return dataclasses.replace(given, kind=kind, model=given.model or name, tokenizer=given.tokenizer or name)

    def model_name(self, role: str) -> str:
        """What the model in a role is called; on a server, the server's name of it."""
        return self.engine(role).model or getattr(self.models, role) or self.models.large

    def engine_role(self, role: str) -> str:
        """The role whose keys say who runs a role: its own, or large for a judge that is named nowhere."""
        unnamed = role == "judge" and self.models.judge is None and self.engines.judge is None
        return "large" if unnamed else role

    def _check_server(self, role: str) -> None:
        """A server needs an address, and a model and tokenizer that are not the built-in ones by default."""
        settings = self.engine(role)
        key = f"engines.{self.engine_role(role)}"
        given = getattr(self.engines, self.engine_role(role)) or EngineSettings()
        if settings.kind not in HTTP:
            _require(given.base_url is None, f"{key}.kind", f"say {' or '.join(HTTP)}, or name no base_url")
        for name in given.unheeded(settings.kind):
            _require(False, f"{key}.{name}", f"leave it out: an engine of kind {settings.kind} does not heed it")
        if settings.kind not in HTTP:
            return
        _require(settings.base_url is not None, f"{key}.base_url", "name the server, such as http://127.0.0.1:8000/v1")
        builtin = (getattr(self.models, role) or self.models.large).startswith("builtin:")
        for name, what in (("model", "the name that the server knows the model by"), ("tokenizer", "its tokenizer")):
            _require(not builtin or getattr(given, name) is not None, f"{key}.{name}", f"give {what}")

    def require_complete(self, last: str | None = None) -> None:
        """Raises UserError where a run up to stage `last` has nothing to read or nothing to answer."""
        _require(len(self.collect.sources) > 0, "collect.sources", "name at least one source")
        evaluates = last is None or STAGES.index(last) >= STAGES.index("evaluate")
        _require(not evaluates or len(self.evaluate.names) > 0, "evaluate.tasks", "name at least one task, or a suite")


def load_recipe(path: Path | None, overrides: list[str] | None = None) -> Recipe:
    """Reads a YAML recipe, or takes the defaults, and applies `key.sub=value` overrides, whose values are YAML too."""
    raw = {} if path is None else _read_yaml(path)
    for override in overrides or []:
        _override(raw, override)
    return build(Recipe, raw, "")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        raw = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise UserError(f"no recipe at {path}: give the path of a YAML file, or none for the miniature") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a recipe: it must be a mapping with the sections of a recipe")
    return _with_folder(raw, str(path.absolute().parent))


def _with_folder(value: Any, folder: str) -> Any:
    """Plain data with `${RECIPE}` replaced in every text."""
    if isinstance(value, dict):
        return {key: _with_folder(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_folder(item, folder) for item in value]
    return value.replace("${RECIPE}", folder) if isinstance(value, str) else value


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included, which load_recipe reads back to an equal one."""
    return yaml.safe_dump(dataclasses.asdict(recipe), allow_unicode=True, sort_keys=False)


def _override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override}: write key=value, for instance --set dedup.k=4")
    *parents, last = key.split(".")
    for parent in parents:
        section = raw.get(parent, {})
        if not isinstance(section, dict):
            raise UserError(f"--set {override}: {parent} is not a section of the recipe")
        raw[parent] = raw = dict(section)  # a copy: a YAML alias may stand for the same section elsewhere
    try:
        raw[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {key}: the value is not YAML") from error


def build(kind: Any, value: Any, key: str) -> Any:
    """Makes a value of type `kind` from plain YAML data; an error names the key and says what belongs there."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _build_union(kind, value, key)
    if origin is list:
        _require(isinstance(value, list), key, f"give a list, not {value!r}")
        return [build(typing.get_args(kind)[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        _require(isinstance(value, dict), key, f"give a mapping, not {value!r}")
        return {str(name): build(typing.get_args(kind)[1], item, f"{key}.{name}") for name, item in value.items()}
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, key)
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        return _number(value, key)  # YAML 1.1 reads 5e-8 as text
    shown = "something else" if key.endswith("api_key") else repr(value)
    _require(type(value) is kind, key, f"give {_NAMES[kind]}, not {shown}")
    return value


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _number(value: str | int, key: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise UserError(f"recipe key {key}: give a number, not {value!r}") from error


def _build_union(kind: Any, value: Any, key: str) -> Any:
    options = typing.get_args(kind)
    if value is None and type(None) in options:
        return None
    options = [option for option in options if option is not type(None)]
    for option in options[:-1]:
        if isinstance(value, typing.get_origin(option) or option):
            return build(option, value, key)
    return build(options[-1], value, key)


def _build_dataclass(kind: Any, value: Any, key: str) -> Any:
    _require(isinstance(value, dict), key or "(top)", f"give a mapping, not {value!r}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            remedy = f"did you mean {prefix}{near[0]}?" if near else f"the keys here are {', '.join(fields)}"
            raise UserError(f"recipe key {prefix}{name} is unknown: {remedy}")
    for name, f in fields.items():
        optional = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        _require(optional or name in value, f"{prefix}{name}", "is missing: add it")
    try:
        return kind(**{name: build(hints[name], item, f"{prefix}{name}") for name, item in value.items()})
    except UserError as error:
        # Sections check themselves and know their keys but not, where one class serves several, their place.
        raise error if key == "" or key in str(error) else UserError(f"recipe section {key}: {error}") from error


def expand(text: str, folders: dict[str, Path], key: str) -> str:
    """Replaces each `${NAME}` by one of `folders` or an environment variable; an unset one is a user error."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name in folders:
            return str(folders[name])
        if name not in os.environ:
            raise UserError(f"recipe key {key} needs the environment variable {name}: set it to a folder")
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", value, text)
