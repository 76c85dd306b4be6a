"""What share of a run's update its forward pass has seen, printed as the precision law asks.

At a learning rate of 1e-8 a weight moves by far less than the spacing of bf16 numbers, so that a forward in bf16 goes
on with nearly the weights it began with, while the masters learn.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from slmfast.fusion import SurvivalCounter
from slmfast.model_folder import ModelWeights
from slmfast.training.settings import TrainSettings
from slmfast.training.split_weights import SplitWeights, seen_by_split


def report_update(
    base: Path, parameters: Iterable[tuple[str, nn.Parameter]], masters: SplitWeights | None, settings: TrainSettings
) -> dict[str, dict[str, float]]:
    """Measures, and says on stderr in one line, what the forward saw of the update and what a bf16 file would keep.

    Args:
        base: folder of the model that the run began with.
        parameters: names and parameters of the model as it is now.
        masters: who split some of them, if somebody has.

    Returns:
        For the model's card: "forward_sees" and "bfloat16_keeps", each the shares "weights" (of those that moved, how
        many differ once both models are rounded) and "norm" (of the update's norm), as `fusion.Survival` has them.
    """
    forward, kept = _Seen(settings.forward), SurvivalCounter(torch.bfloat16)
    with ModelWeights(base) as before:
        for name, parameter in parameters:
            split = masters is not None and parameter in masters.low
            now = (masters.merged(parameter) if split else parameter.detach()).cpu()
            old = before[name].float()
            forward.add(old, now, split)
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


class _Seen:
    """Counts what a forward sees: of all weights their bf16 values, of split ones both halves, or everything."""

    def __init__(self, forward: str):
        self._forward, self._now_split = forward, False
        self.counter = SurvivalCounter(self._rounded)

    def add(self, base: Tensor, tuned: Tensor, split: bool) -> None:
        self._now_split = split
        self.counter.add(base, tuned)

    def _rounded(self, weights: Tensor) -> Tensor:
        if self._forward == "bf16":
            return weights.bfloat16()
        return seen_by_split(weights) if self._forward == "split" and self._now_split else weights
