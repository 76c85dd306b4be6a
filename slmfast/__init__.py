"""slmfast: post-train small language models on one 24 GB GPU.

The public names are loaded when they are first used, so that `import slmfast` needs neither torch nor a GPU.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "simhash": "slmfast.near_duplicates",
    "near_pairs": "slmfast.near_duplicates",
    "dedup": "slmfast.near_duplicates",
    "DedupResult": "slmfast.near_duplicates",
    "DedupIndex": "slmfast.dedup_index",
    "perplexity": "slmfast.scoring",
    "choose": "slmfast.scoring",
    "fuse": "slmfast.fusion",
    "update_survival": "slmfast.fusion",
    "kto_loss": "slmfast.training.kto_loss",
    "plan_memory": "slmfast.training.memory",
    "UserError": "slmfast.errors",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'slmfast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
