"""What share of a run's update its forward pass has seen, printed as the precision law asks.

At a learning rate of 1e-8 a weight moves by far less than the spacing of bf16 numbers, so that a forward in bf16 goes
on with nearly the weights it began with, while the masters learn.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from slmfast.fusion import SurvivalCounter
from slmfast.model_folder import ModelWeights
from slmfast.training.settings import TrainSettings
from slmfast.training.split_weights import SplitWeights, seen_by_split


def report_update(
    base: Path, model: nn.Module, masters: SplitWeights | None, settings: TrainSettings
) -> dict[str, dict[str, float]]:
    """Measures, and says on stderr in one line, what the forward saw of the update and what a bf16 file would keep.

    Args:
        base: folder of the model that the run began with.
        model: as it is now.
        masters: who split some of its parameters, if somebody has.

    Returns:
        For the model's card: "forward_sees" and "bfloat16_keeps", each the shares "weights" (of those that moved, how
        many differ once both models are rounded) and "norm" (of the update's norm), as `fusion.Survival` has them.
    """
    forward, kept = _Seen(settings.forward), SurvivalCounter(torch.bfloat16)
    rounded = multiplied(model)
    with ModelWeights(base) as before:
        for name, parameter in sorted(model.named_parameters()):
            split = masters is not None and parameter in masters.low
            now = (masters.merged(parameter) if split else parameter.detach()).cpu()
            old = before[name].float()
            forward.add(old, now, split if settings.forward == "split" else parameter in rounded)
            kept.add(old, now)
    found = {"forward_sees": forward.counter.result(), "bfloat16_keeps": kept.result()}
    seen, left = found.values()
    print(
        f"train {settings.method}: the {settings.forward} forward saw {seen.weights:.2%} of the moved weights and "
        f"{seen.norm:.2%} of the update's norm; the model is saved in fp32, bfloat16 would keep {left.weights:.2%} and "
        f"{left.norm:.2%}",
        file=sys.stderr,
    )
    return {name: shares._asdict() for name, shares in found.items()}


def multiplied(model: nn.Module) -> set[Tensor]:
    """The parameters that autocast rounds to bf16: those of matrix products, biases included.

    Norms and rows of embeddings are used as they are; an embedding that is the head's weight too counts as rounded.
    """
    found = set()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if not isinstance(module, nn.Embedding) and any(parameter.ndim > 1 for parameter in own):
            found.update(own)
    return found


class _Seen:
    """Counts what a forward sees: of products' weights their bf16 values or both halves, of all others everything."""

    def __init__(self, forward: str):
        self._forward, self._now_changed = forward, False
        self.counter = SurvivalCounter(self._rounded)

    def add(self, base: Tensor, tuned: Tensor, changed: bool) -> None:
        """Counts a tensor; `changed` where the forward does not see it as it is."""
        self._now_changed = changed
        self.counter.add(base, tuned)

    def _rounded(self, weights: Tensor) -> Tensor:
        if not self._now_changed or self._forward == "fp32":
            return weights
        return weights.bfloat16() if self._forward == "bf16" else seen_by_split(weights)
