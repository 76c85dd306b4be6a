"""Weighted averages of models, and how much of a training run a coarser type keeps.

The method's fusion step averages the weights of several tunings of one base (Wortsman et al., "Model soups",
arXiv 2203.05482). At its learning rates a whole run moves a weight by about 1e-6, less than the spacing of a bf16
weight, so the average is taken in float64 and kept in float32; `update_survival` says what any other type would lose.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slmfast.errors import UserError
from slmfast.fusion_checks import check_same_dtypes, check_same_kind
from slmfast.fusion_pieces import PIECE, Part, write_average
from slmfast.model_folder import SINGLE, ModelWeights, check_output, check_same_tensors, write_companions
from slmfast.reporting.model_card import write_fusion_card
from slmfast.store import atomic_path, read_json, write_json

CARD = "fusion.json"
_ROUNDING = 2.0**-50  # how far from 1 normalised weights may sum
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
    mixed_dtypes: bool = False,
) -> dict[str, Any]:
    """Writes the weighted average of models as a complete model folder, and returns its card.

    The weights are normalised to sum to 1. Pieces of tensors are read, averaged in float64, rounded once and written
    by all of torch's threads; the result depends neither on their number nor on the order of the models. Config,
    tokenizer and chat template are those of the first.

    Args:
        models: model folders and their weights, each at least 0.
        output: the new folder; it appears whole or not at all.
        dtype: the type of the stored weights. Any but float32 prints what share of the update survives in it.
        base: the model from which that update is measured; by default the first of `models`, and where that is the
            only one nothing can be measured, which is said instead.
        mixed_dtypes: average parts whose tensors are of different types too: each value exactly as it is stored.

    Returns:
        The card, also written as `fusion.json`: parts with their weights and a hash of their tensors, the type, and
        for a type other than float32 `update_survival`. README.md in the folder tells it in words.

    Raises:
        UserError: no models, one named twice, a bad weight, tensors whose names, shapes or values do not allow an
            average, different types, architectures or vocabularies, or an output that would replace something
            else, such as another average.
    """
    shares = _normalised(models)
    paths = list(shares)
    target, kind = Path(output), as_dtype(dtype)
    check_output(target, CARD, paths)
    with contextlib.ExitStack() as stack:
        parts = [Part(stack.enter_context(ModelWeights(path)), shares[path]) for path in paths]
        first = parts[0].weights
        for part in parts:
            check_same_tensors(first, part.weights)
            check_same_kind(first.path, part.weights.path)
            if not mixed_dtypes:
                check_same_dtypes(first, part.weights)
        survival = _survival_counter(stack, first, len(paths), kind, base)
        with atomic_path(target) as folder:
            folder.mkdir()
            write_companions(paths[0], folder, kind)
            digests = write_average(parts, folder / SINGLE, kind, None if survival is None else survival.add)
            card = _card(parts, digests, kind, survival, mixed_dtypes)
            if (target / CARD).exists() and read_json(target / CARD) != card:
                raise UserError(f"{target} holds another fused model: give another output, or remove it first")
            write_json(folder / CARD, card)
            write_fusion_card(folder, paths, card)
    return card


class _Survival(NamedTuple):
    """Counts what survives of the update from `base` while the average is being written."""

    counter: SurvivalCounter
    base: ModelWeights

    def add(self, name: str, start: int, average: Tensor) -> None:
        old = torch.empty(len(average), dtype=self.base.dtype(name))
        self.base.read_piece(name, start, old)
        self.counter.add(old, average)


def _survival_counter(
    stack: contextlib.ExitStack, first: ModelWeights, models: int, kind: torch.dtype, base: str | Path | None
) -> _Survival | None:
    if kind == torch.float32:
        return None
    if base is None and models == 1:
        print(
            f"fuse: {_name(kind)} loses most of a training at small rates; name the model that it began with as base "
            "to see what share of it survives",
            file=sys.stderr,
        )
        return None
    start = first if base is None else stack.enter_context(ModelWeights(Path(base)))
    check_same_tensors(first, start)
    return _Survival(SurvivalCounter(kind), start)


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
    if abs(total - 1.0) <= _ROUNDING:  # normalised already, as a card's are: again, they would be others
        return weights
    return {path: weight / total for path, weight in weights.items()}


def _card(
    parts: list[Part], digests: list[str], kind: torch.dtype, survival: _Survival | None, mixed: bool
) -> dict[str, Any]:
    made = [
        {"name": part.weights.path.name, "weight": part.share, "digest": weights_digest}
        for part, weights_digest in zip(parts, digests, strict=True)
    ]
    card: dict[str, Any] = {"parts": made, "dtype": _name(kind)}
    if mixed:
        card["mixed_dtypes"] = True
    if survival is not None:
        kept, base = survival.counter.result(), survival.base.path.name
        card["update_survival"] = {**kept._asdict(), "base": base}
        print(
            f"fuse: as {card['dtype']}, {kept.weights:.2%} of the weights that moved from {base} still differ and "
            f"{kept.norm:.2%} of the update's norm survives; float32 keeps all of it",
            file=sys.stderr,
        )
    return card


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")
