"""Who trains in the training benchmark: ours, and TRL's trainers in the ways that give the same answer."""

import importlib.metadata
from dataclasses import dataclass, field
from typing import Any

GROUP = 4  # samples of a micro-batch of TRL's, and so of a KL group
RATE = 1e-6  # constant; the curves of so many steps differ visibly from those of other weights


@dataclass(frozen=True)
class Side:
    """A way to train."""

    title: str
    package: str | None = None
    """Whose version is told; None for ours."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the trainer's configuration, beyond what all share."""
    copies: int = 1
    """Models in memory."""

    @property
    def version(self) -> str | None:
        return importlib.metadata.version(self.package) if self.package else None


OURS = "ours"
KTO_PEERS = {
    "precomputed": Side("TRL KTOTrainer, precomputed reference", "trl", {"precompute_ref_log_probs": True}),
    "default": Side("TRL KTOTrainer, its default", "trl", copies=2),
}
SFT_PEERS = {
    "padded": Side("TRL SFTTrainer, padded", "trl"),
    "padding-free": Side("TRL SFTTrainer, padding-free", "trl", {"padding_free": True}),
}
SIDES = {OURS: Side("slmfast"), **KTO_PEERS, **SFT_PEERS}
