"""How a role's engine is set up in a recipe: its kind and, for a server, where it is and how it is asked."""

import importlib.util
import json
import math
import os
import re
import sys
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from slmfast.errors import UserError

ENGINES = ("local", "openai", "vllm")
DTYPES = ("float32", "bfloat16")
_HEEDED = {"vllm": ("dtype", "window", "extra")}
HTTP = ("openai",)  # kinds that ask a server: of the model they need the tokenizer alone

_OURS = ("messages", "model", "prompt", "max_tokens", "temperature", "top_p", "seed", "n", "stream", "echo", "logprobs")


def _require(condition: bool, key: str, remedy: str) -> None:
    if not condition:
        raise UserError(f"{key}: {remedy}")  # the recipe names the section


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """One role's engine. All keys but `kind` are for `openai`, a server that speaks OpenAI's protocol.

    `vllm`, in this process, heeds `dtype`, `window` and `extra`, which goes to vllm.LLM.
    """

    kind: str | None = None  # local, openai or vllm; models.engine unless given
    dtype: str = "bfloat16"  # of vllm's weights and activations: float32 or bfloat16
    base_url: str | None = None  # of the server, such as http://127.0.0.1:8000/v1
    model: str | None = None  # the name that the server knows it by; the role's own in `models` unless given
    tokenizer: str | None = None  # folder or hub name of its tokenizer; the role's model unless given
    api_key: str | None = None  # the environment variable that holds the key
    concurrency: int = 64  # requests in flight at a time
    timeout: float = 600.0  # seconds that one try of a request may take
    tries: int = 10  # of one request, before the run stops; another run goes on from there
    backoff: float = 1.0  # seconds before the second try; doubled from try to try, at most a minute
    window: int | None = None  # tokens of a prompt and its reply; the model's and the server's own limit unless given
    extra: dict[str, Any] = field(default_factory=dict)  # goes into every request that asks for a reply

    def __post_init__(self) -> None:
        _require(self.kind in (None, *ENGINES), "kind", f"use {' or '.join(ENGINES)}")
        _require(self.base_url is None or _is_address(self.base_url), "base_url", _URL_REMEDY)
        # A key that was pasted here would end in recipe.yaml, so it is refused, and never repeated.
        named = self.api_key is None or re.fullmatch(r"[A-Z][A-Z0-9_]*", self.api_key) is not None
        _require(named, "api_key", "name the environment variable that holds the key (A-Z, 0-9, _), not the key itself")
        _require(self.dtype in DTYPES, "dtype", f"use {' or '.join(DTYPES)}")
        _require(self.concurrency > 0, "concurrency", "give a positive number of requests")
        _require(0 < self.timeout < math.inf, "timeout", "give a positive number of seconds")
        _require(self.tries > 0, "tries", "give a positive number")
        _require(0 <= self.backoff < math.inf, "backoff", "give zero or more seconds")
        _require(self.window is None or self.window > 1, "window", "give at least 2 tokens")
        named = _secret_names(self.extra)
        _require(
            not named, f"extra.{named[0] if named else ''}", "name a key's environment variable in api_key instead"
        )
        _require(_is_json(self.extra), "extra", "give what JSON can hold: no dates, no infinite numbers")
        ours = sorted(set(self.extra) & set(_OURS))
        _require(not ours, f"extra.{ours[0] if ours else ''}", "leave it out: the stage's own settings give it")

    def unheeded(self, kind: str) -> list[str]:
        """The keys that are set otherwise than by default and that an engine of a kind does not heed."""
        plain, heeded = EngineSettings(), {"kind", *_HEEDED.get(kind, ())}
        if kind in HTTP:
            heeded = {f.name for f in fields(self)} - {"dtype"}
        names = (f.name for f in fields(self) if f.name not in heeded)
        return [name for name in names if getattr(self, name) != getattr(plain, name)]


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _is_address(url: str) -> bool:
    """Whether a text is the address of a server: a host that has a name, and a port that there is."""
    if re.fullmatch(r"https?://[^\s@?#]+", url) is None:
        return False
    try:
        found = urlsplit(url)
        return bool((found.hostname or "").encode("idna")) and found.port != 0
    except ValueError:  # a port over 65535, an address of IPv6 without its end, an empty or overlong part of a name
        return False


_URL_REMEDY = "give the server's address, such as http://127.0.0.1:8000/v1, without a user, password or query"
_SECRETS = re.compile(r"(^|[_-])(api[_-]?key|key|secret|password|authorization|(access|auth|bearer)[_-]token)$", re.I)


def _secret_names(value: Any) -> list[str]:
    """The keys, at any depth, whose names say that their values are secrets."""
    if isinstance(value, list):
        return [name for item in value for name in _secret_names(item)]
    if not isinstance(value, dict):
        return []
    own = [str(name) for name in value if _SECRETS.search(str(name))]
    return own + [name for item in value.values() for name in _secret_names(item)]


def secret(settings: EngineSettings, key: str) -> str | None:
    """The API key of a server, None where none is named. Raises UserError where its environment variable is not set.

    Args:
        key: the recipe's section of these settings, for the message.
    """
    name = settings.api_key
    if name is None:
        return None
    value = os.environ.get(name, "").strip()
    _require(bool(value), f"recipe key {key}.api_key", f"the environment variable {name} is not set: put the key there")
    written = len(value) >= 8 and (
        value in json.dumps(settings.extra, ensure_ascii=False) or value in str(settings.base_url)
    )
    _require(not written, f"recipe section {key}", f"the key in {name} stands in extra or base_url: take it out there")
    return value


def check_installed(settings: EngineSettings, key: str) -> None:
    """Raises UserError where an engine needs a package that is not there: before a run begins, and not days later.

    Args:
        key: the recipe's section of these settings, for the message.
    """
    if settings.kind == "vllm" and "vllm" not in sys.modules:
        found = importlib.util.find_spec("vllm") is not None
        _require(found, f"recipe key {key}.kind", "vllm is not installed: install it, or say local")


@dataclass(frozen=True, kw_only=True)
class Engines:
    """Engines by role. A judge that is named neither here nor in `models` is the large model, on its engine."""

    large: EngineSettings | None = None
    small: EngineSettings | None = None
    judge: EngineSettings | None = None
