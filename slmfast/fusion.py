"""Weighted averages of models, and how much of a training run a coarser type keeps.

The method's fusion step averages the weights of several tunings of one base (Wortsman et al., "Model soups",
arXiv 2203.05482). At its learning rates a whole run moves a weight by about 1e-6, less than the spacing of a bf16
weight, so the average is taken in float64 and kept in float32; `update_survival` says what any other type would lose.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slmfast.errors import UserError
from slmfast.model_folder import (
    SINGLE,
    ModelWeights,
    check_output,
    check_same_tensors,
    write_companions,
    write_tensors,
)
from slmfast.reporting.model_card import write_fusion_card
from slmfast.store import atomic_path, model_digest, write_json

CARD = "fusion.json"
PIECE = 1 << 22  # weights of an update measured at once: in float64 an embedding would take gigabytes
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


class Survival(NamedTuple):
    """What rounding to a type leaves of an update; both are shares, 1.0 where there was no update to lose.

    Where either weight is beyond the type's range, nothing is left.
    """

    weights: float  # of the places that the update moved, how many still differ once both models are rounded
    norm: float  # <Q(tuned) - Q(base), tuned - base> / |tuned - base|^2


def update_survival(base: str | Path, tuned: str | Path, dtype: str | torch.dtype) -> Survival:
    """How much of the update from `base` to `tuned` survives rounding both models to `dtype`.

    Args:
        base, tuned: model folders of the same architecture, read a tensor at a time.
        dtype: "float32", "bfloat16" or "float16", or torch's own.

    Raises:
        UserError: a folder is missing or damaged, the tensors' names or shapes differ, or a weight is not finite.
    """
    counter = SurvivalCounter(as_dtype(dtype))
    with ModelWeights(Path(base)) as old, ModelWeights(Path(tuned)) as new:
        check_same_tensors(old, new)
        for name in old.names:
            counter.add(old[name], new[name])
    return counter.result()


class SurvivalCounter:
    """Adds up `update_survival` over the tensors of two models.

    Args:
        rounding: a type, or a function that rounds a tensor to what it would be.
    """

    def __init__(self, rounding: torch.dtype | Callable[[Tensor], Tensor]):
        self._rounded = rounding if callable(rounding) else lambda tensor: tensor.to(rounding)
        self._moved = self._kept = 0
        self._product = self._square = 0.0

    def add(self, base: Tensor, tuned: Tensor) -> None:
        """Counts one tensor of both models, of equal shape."""
        for old, new in zip(base.reshape(-1).split(PIECE), tuned.reshape(-1).split(PIECE), strict=True):
            self._add(old, new)

    def _add(self, base: Tensor, tuned: Tensor) -> None:
        moved = tuned.double() != base.double()
        rounded = self._rounded(tuned).double() - self._rounded(base).double()
        rounded.masked_fill_(~rounded.isfinite(), 0.0)  # where the type overflows, the update is lost
        update = tuned.double() - base.double()
        if not update.isfinite().all():
            raise UserError("a weight is NaN or infinite: compare models whose weights are finite")
        self._moved += int(moved.sum())
        self._kept += int((moved & (rounded != 0)).sum())
        self._product += float((rounded * update).sum())
        self._square += float(update.square().sum())

    def result(self) -> Survival:
        """The two shares over all that was added."""
        if self._moved == 0:
            return Survival(1.0, 1.0)
        return Survival(self._kept / self._moved, self._product / self._square)


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """torch's type of that name."""
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise UserError(f"dtype is {dtype!r}: set it to float32, bfloat16 or float16")
    return found


def fuse(
    models: Mapping[str | Path, float],
    output: str | Path,
    dtype: str = "float32",
    *,
    base: str | Path | None = None,
) -> dict[str, Any]:
    """Writes the weighted average of models as a complete model folder, and returns its card.

    The weights are normalised to sum to 1. Tensors are read one at a time, averaged in float64, and rounded once; the
    result does not depend on the order of the models. Config, tokenizer and chat template are those of the first.

    Args:
        models: model folders and their weights, each at least 0.
        output: the new folder; it appears whole or not at all.
        dtype: the type of the stored weights. Any but float32 prints what share of the update survives in it.
        base: the model from which that update is measured; by default the first of `models`, and where that is the
            only one nothing can be measured, which is said instead.

    Returns:
        The card, also written as `fusion.json`: parts with their weights, the type, and for a type other than
        float32 `update_survival`. README.md in the folder tells it in words.

    Raises:
        UserError: no models, one named twice, a bad weight, tensors whose names, shapes or values do not allow an
            average, or an output that would replace something else.
    """
    shares = _normalised(models)
    paths = list(shares)
    target, kind = Path(output), as_dtype(dtype)
    check_output(target, CARD, paths)
    weights = {path: ModelWeights(path) for path in paths}
    first = weights[paths[0]]
    for other in weights.values():
        check_same_tensors(first, other)
    counter = None
    if kind != torch.float32 and base is None and len(paths) == 1:
        print(
            f"fuse: {dtype} loses most of a training at small rates; name the model that it began with as base to "
            "see what share of it survives",
            file=sys.stderr,
        )
    elif kind != torch.float32:
        start = ModelWeights(Path(base)) if base is not None else first
        check_same_tensors(first, start)
        counter = (SurvivalCounter(kind), start)
    with atomic_path(target) as folder:
        folder.mkdir()
        write_companions(paths[0], folder, kind)
        shapes = {name: first.shape(name) for name in first.names}
        write_tensors(folder / SINGLE, shapes, kind, _averages(weights, shares, kind, counter))
        card = _card(paths, shares, kind, counter)
        write_json(folder / CARD, card)
        write_fusion_card(folder, paths, card)
    return card


def _normalised(models: Mapping[str | Path, float]) -> dict[Path, float]:
    if not isinstance(models, Mapping):
        raise UserError(f"models is a {type(models).__name__}: give model folders with their weights, {{folder: 0.5}}")
    if not models:
        raise UserError("there is no model to fuse: name at least one with its weight")
    weights: dict[Path, float] = {}
    for path, weight in models.items():
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight) or weight < 0:
            raise UserError(f"the fusion weight of {path} is {weight!r}: set it to a number of at least 0")
        if Path(path).resolve() in {other.resolve() for other in weights}:
            raise UserError(f"{path} is named twice among the models to fuse: name it once with its whole weight")
        weights[Path(path)] = float(weight)
    total = math.fsum(weights.values())
    if total <= 0:
        raise UserError("all fusion weights are 0: give at least one model a weight above 0")
    return {path: weight / total for path, weight in weights.items()}


def _averages(
    weights: dict[Path, ModelWeights],
    shares: dict[Path, float],
    kind: torch.dtype,
    counter: tuple[SurvivalCounter, ModelWeights] | None,
) -> Iterator[Tensor]:
    """The averaged tensors in order of their names, float32.

    Parts are added in the order of their paths, so that no order of the caller's changes a bit, and the sum starts
    from the first product: from zero, a stored -0.0 would come out as 0.0.
    """
    parts = [(weights[path], shares[path]) for path in sorted(shares) if shares[path] > 0]
    for name in parts[0][0].names:
        total = None
        for part, share in parts:
            tensor = part[name]
            if not tensor.is_floating_point() or not tensor.isfinite().all():
                raise UserError(
                    f"tensor {name} of {part.path} holds values that have no average: train the model again"
                )
            product = tensor.double().mul_(share)
            total = product if total is None else total.add_(product)
        average = total.float()
        if not average.to(kind).isfinite().all():
            raise UserError(f"tensor {name} has an average beyond the range of {kind}: fuse as float32 or bfloat16")
        if counter is not None:
            counter[0].add(counter[1][name], average)
        yield average


def _card(
    paths: list[Path],
    shares: dict[Path, float],
    kind: torch.dtype,
    counter: tuple[SurvivalCounter, ModelWeights] | None,
) -> dict[str, Any]:
    parts = [{"name": path.name, "weight": shares[path], "digest": model_digest(path)} for path in paths]
    card: dict[str, Any] = {"parts": parts, "dtype": str(kind).removeprefix("torch.")}
    if counter is not None:
        survival = counter[0].result()
        card["update_survival"] = {**survival._asdict(), "base": counter[1].path.name}
        print(
            f"fuse: as {card['dtype']}, {survival.weights:.2%} of the weights that moved from {counter[1].path.name} "
            f"still differ and {survival.norm:.2%} of the update's norm survives; float32 keeps all of it",
            file=sys.stderr,
        )
    return card
