"""Values of a recipe: plain YAML data made into what a type asks for, or refused under the key that holds it."""

import dataclasses
import difflib
import types
import typing
from typing import Any

from slmfast.errors import UserError


def require(condition: bool, key: str, remedy: str) -> None:
    """Raises UserError, which names a recipe's key and what to write instead, unless the condition holds."""
    if not condition:
        raise UserError(f"recipe key {key}: {remedy}")


def build(kind: Any, value: Any, key: str) -> Any:
    """Makes a value of type `kind` from plain YAML data; an error names the key and says what belongs there."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _build_union(kind, value, key)
    if origin is list:
        require(isinstance(value, list), key, f"give a list, not {value!r}")
        return [build(typing.get_args(kind)[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        require(isinstance(value, dict), key, f"give a mapping, not {value!r}")
        return {str(name): build(typing.get_args(kind)[1], item, f"{key}.{name}") for name, item in value.items()}
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, key)
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        return _number(value, key)  # YAML 1.1 reads 5e-8 as text
    shown = "something else" if key.endswith("api_key") else repr(value)
    require(type(value) is kind, key, f"give {_NAMES[kind]}, not {shown}")
    return value


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _number(value: str | int, key: str) -> float:
    try:
        return float(value)
    except (ValueError, OverflowError) as error:
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
    require(isinstance(value, dict), key or "(top)", f"give a mapping, not {value!r}")
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
        require(optional or name in value, f"{prefix}{name}", "is missing: add it")
    try:
        return kind(**{name: build(hints[name], item, f"{prefix}{name}") for name, item in value.items()})
    except UserError as error:
        # Sections check themselves and know their keys but not, where one class serves several, their place.
        raise error if key == "" or key in str(error) else UserError(f"recipe section {key}: {error}") from error
