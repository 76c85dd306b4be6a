"""The recipe: everything that a run depends on, as validated dataclasses read from YAML.

A recipe has one section a stage, under the stage's name. Each value that can't be right is refused at once, with the
key that holds it and what to write instead. Paths may hold `${NAME}`: an environment variable, `${RUN}`, the run's
own folder, or `${RECIPE}`, the folder of the recipe's file.
"""

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from slmfast.engines.settings import HTTP, Engines, EngineSettings
from slmfast.errors import UserError
from slmfast.recipe_sections import (
    SUITES,
    TRAINED,
    Align,
    Categorize,
    Classify,
    Collect,
    Dedup,
    Diversify,
    Evaluate,
    Fuse,
    Models,
    Rate,
    Regenerate,
    Report,
    Source,
    Train,
    World,
)
from slmfast.recipe_values import build, require
from slmfast.yaml_text import load_yaml

__all__ = [
    "STAGES",
    "SUITES",
    "TRAINED",
    "Engines",
    "Evaluate",
    "Recipe",
    "Source",
    "build",
    "dump_recipe",
    "expand",
    "load_recipe",
]

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
        require(valid, "name", "use letters, digits, dots, dashes and underscores: it names the run's folder")
        require(0 <= self.seed < 2**32, "seed", "give a whole number from 0 to 4294967295")
        require(self.threads is None or self.threads > 0, "threads", "give a positive number, or null for all cores")
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
            require(given.base_url is None, f"{key}.kind", f"say {' or '.join(HTTP)}, or name no base_url")
        for name in given.unheeded(settings.kind):
            require(False, f"{key}.{name}", f"leave it out: an engine of kind {settings.kind} does not heed it")
        if settings.kind not in HTTP:
            return
        require(settings.base_url is not None, f"{key}.base_url", "name the server, such as http://127.0.0.1:8000/v1")
        builtin = (getattr(self.models, role) or self.models.large).startswith("builtin:")
        for name, what in (("model", "the name that the server knows the model by"), ("tokenizer", "its tokenizer")):
            require(not builtin or getattr(given, name) is not None, f"{key}.{name}", f"give {what}")

    def require_complete(self, last: str | None = None) -> None:
        """Raises UserError where a run up to stage `last` has nothing to read, nothing to answer, or no judge."""
        require(len(self.collect.sources) > 0, "collect.sources", "name at least one source")
        stages = STAGES[: STAGES.index(last) + 1 if last else None]
        judges = "rate" in stages or ("diversify" in stages and self.diversify.audit is not None)
        remedy = "vllm gives no scores here: have the judge run with local, or behind a server"
        require(not judges or self.engine("judge").kind != "vllm", "engines.judge.kind", remedy)
        answered = "evaluate" not in stages or len(self.evaluate.names) > 0
        require(answered, "evaluate.tasks", "name at least one task, or a suite")


def load_recipe(path: Path | None, overrides: list[str] | None = None) -> Recipe:
    """Reads a YAML recipe, or takes the defaults, and applies `key.sub=value` overrides, whose values are YAML too."""
    raw = {} if path is None else _read_yaml(path)
    for override in overrides or []:
        _override(raw, override)
    return build(Recipe, raw, "")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        raw = load_yaml(text)
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
        raw[last] = load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {key}: the value is not YAML") from error


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
