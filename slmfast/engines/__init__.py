"""Who generates and scores text. Stages ask for an engine by kind and model and know nothing else of it."""

from pathlib import Path
from typing import Any

from slmfast.engines.base import Engine, Generation
from slmfast.engines.settings import ENGINES, EngineSettings
from slmfast.errors import UserError

__all__ = ["ENGINES", "Engine", "Generation", "open_engine"]


def open_engine(engine: str | EngineSettings, model: str | Path, **settings: Any) -> Engine:
    """An engine for a model folder or hub name, of a kind (see ENGINES) or as a recipe sets it up.

    Args:
        model: for `openai`, the tokenizer's folder.
        settings: the kind's own; a recipe's engine takes `role`, `key` and `store` (see OpenAIEngine).

    Raises:
        UserError: there is no such kind or no such model.
    """
    if isinstance(engine, EngineSettings) and engine.kind == "openai":
        from slmfast.engines.openai import OpenAIEngine

        return OpenAIEngine(engine, model, **settings)
    if isinstance(engine, EngineSettings) and engine.kind == "vllm":
        from slmfast.engines.vllm import VllmEngine

        return VllmEngine(engine, model, key=settings["key"])
    kind, own = (engine.kind, {}) if isinstance(engine, EngineSettings) else (engine, settings)
    if kind not in ENGINES:
        raise UserError(f"engine {kind!r} is unknown: use {' or '.join(ENGINES)}")
    if kind != "local":
        raise UserError(f"engine {kind!r} is set up by an EngineSettings: pass one instead of the name")
    # Only here: whoever merely lists stages or engines needs no torch.
    from slmfast.engines.local import LocalEngine

    return LocalEngine(model, **own)
