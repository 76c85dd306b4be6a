"""Who generates and scores text. Stages ask for an engine by kind and model and know nothing else of it."""

from pathlib import Path
from typing import Any

from slmfast.engines.base import Engine, Generation
from slmfast.errors import UserError

__all__ = ["ENGINES", "Engine", "Generation", "open_engine"]

ENGINES = ("local",)


def open_engine(kind: str, model: str | Path, **settings: Any) -> Engine:
    """An engine of a kind (see ENGINES) for a model folder or hub name; `settings` are the kind's own.

    Raises UserError where there is no such kind or no such model.
    """
    if kind not in ENGINES:
        raise UserError(f"engine {kind!r} is unknown: use {' or '.join(ENGINES)}")
    # Only here: whoever merely lists stages or engines needs no torch.
    from slmfast.engines.local import LocalEngine

    return LocalEngine(model, **settings)
