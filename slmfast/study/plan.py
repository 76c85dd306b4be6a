"""Which models a study makes: its seeds, mixes and learning rates."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from slmfast.errors import UserError
from slmfast.recipe import STAGES, TRAINED, Recipe
from slmfast.training.settings import TrainSettings

BASE, FUSED = "base", "fused"
MODELS = (BASE, *TRAINED, FUSED)
VARYING = STAGES[STAGES.index("diversify") : STAGES.index("train") + 1]  # where seeds may begin to differ
SEEDS = 3
MIXES: dict[str, tuple[float, float, float]] = {  # weights of S1, S2 and S3
    "equal": (1, 1, 1),
    "S1-heavy": (3, 1, 1),
    "S2-heavy": (1, 3, 1),
    "S3-heavy": (1, 1, 3),
    "S1+S2": (1, 1, 0),
}
# The paper's learning rates of SFT and their samples a step; the last is S1's own.
PAPER_RATES = ((1e-6, 300), (1e-7, 1000), (5e-8, 1000))


@dataclass(frozen=True)
class Rate:
    """SFT of the base model at one learning rate."""

    name: str  # of its model: "S1" where it is S1 itself
    settings: TrainSettings
    paper: float | None  # the paper's rate that it stands for


@dataclass(frozen=True)
class Plan:
    """Everything that a study makes."""

    recipe: Recipe
    seeds: tuple[int, ...]
    vary_from: str
    mixes: dict[str, dict[str, float]]  # beside the fused model: weights of S1, S2 and S3, summing to 1
    rates: tuple[Rate, ...]  # none, or the recipe's own among them
    own_mix: str | None  # what the fused model is called among the mixes, if it is one of them

    @property
    def models(self) -> list[str]:
        """The names of all models, in the order of the tables."""
        return [*MODELS, *self.mixes, *(rate.name for rate in self.rates if rate.name not in TRAINED)]

    def seeded(self, seed: int) -> Recipe:
        """The recipe of one seed."""
        return dataclasses.replace(self.recipe, seed=seed)


def describe(plan: Plan) -> str:
    """What a study is about to make, in one line."""
    rates = []
    for rate in plan.rates:
        stands = "" if rate.paper in (None, rate.settings.learning_rate) else f", the paper's {written(rate.paper)}"
        rates.append(f"{written(rate.settings.learning_rate)} (batch {rate.settings.effective_batch:,}{stands})")
    compared = f"; SFT at {', '.join(rates)}" if rates else ""
    return (
        f"seeds {', '.join(map(str, plan.seeds))}, which differ from {plan.vary_from} on; mixes {', '.join(plan.mixes)}"
        f"{compared}"
    )


def make_plan(
    recipe: Recipe, *, seeds: int = SEEDS, rates: Sequence[str] | None = None, vary_from: str = VARYING[0]
) -> Plan:
    """A study's plan.

    Args:
        seeds: how many, from the recipe's on.
        rates: learning rates of SFT, each "RATE" or "RATE@SAMPLES" with the samples of a step; the paper's, scaled
            to the recipe's own rate, unless given. An empty list compares none.
        vary_from: the stage at which seeds begin to differ.

    Raises:
        UserError: a number or a rate that can't be.
    """
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: give a whole number of at least 1; error bars need 2, better 3 or more")
    if vary_from not in VARYING:
        raise UserError(f"--vary-from {vary_from}: use {', '.join(VARYING)}")
    if recipe.seed + seeds > 2**32:
        raise UserError(f"recipe key seed: {seeds} seeds from {recipe.seed} go beyond {2**32 - 1}: begin lower")
    own = _shares([recipe.fuse.weights.get(name, 0.0) for name in TRAINED])
    mixes = {name: _shares(weights) for name, weights in MIXES.items()}
    same = [name for name, shares in mixes.items() if not recipe.fuse.weights.get(BASE) and shares == own]
    return Plan(
        recipe=recipe,
        seeds=tuple(range(recipe.seed, recipe.seed + seeds)),
        vary_from=vary_from,
        mixes={name: dict(zip(TRAINED, shares, strict=True)) for name, shares in mixes.items() if name not in same},
        rates=_scaled_rates(recipe.train.S1) if rates is None else _given_rates(rates, recipe.train.S1),
        own_mix=same[0] if same else None,
    )


def _shares(weights: Sequence[float]) -> tuple[float, ...]:
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights) if total else tuple(weights)


def _scaled_rates(own: TrainSettings) -> tuple[Rate, ...]:
    """The paper's rates times what makes the last of them the recipe's, their batches likewise."""
    factor, batch = own.learning_rate / PAPER_RATES[-1][0], own.effective_batch / PAPER_RATES[-1][1]
    return tuple(_rate(rate * factor, samples * batch, own, rate) for rate, samples in PAPER_RATES)


def _given_rates(texts: Sequence[str], own: TrainSettings) -> tuple[Rate, ...]:
    found: dict[str, Rate] = {}
    for text in texts:
        number, at, samples = text.partition("@")
        try:
            rate, batch = float(number), float(samples) if at else float(own.effective_batch)
        except ValueError as error:
            raise UserError(f"--rates {text}: write RATE or RATE@SAMPLES, for instance 1e-6@300") from error
        if not (0 < rate < math.inf and own.batch_size <= batch < math.inf):
            raise UserError(f"--rates {text}: the rate is above 0, a step has {own.batch_size} samples or more")
        made = _rate(rate, batch, own, None)
        found[made.name] = made
    if found and "S1" not in found:
        found["S1"] = Rate("S1", own, None)
    return tuple(sorted(found.values(), key=lambda rate: -rate.settings.learning_rate))


def _rate(rate: float, samples: float, own: TrainSettings, paper: float | None) -> Rate:
    accumulation = max(1, round(samples / own.batch_size))
    if math.isclose(rate, own.learning_rate, rel_tol=1e-9) and accumulation == own.accumulation:
        return Rate("S1", own, paper)
    settings = dataclasses.replace(own, learning_rate=float(f"{rate:.6g}"), accumulation=accumulation)
    batch = "" if accumulation == own.accumulation else f"@{settings.effective_batch}"
    return Rate(f"S1-{written(settings.learning_rate)}{batch}", settings, paper)


def written(rate: float) -> str:
    """A learning rate as people write it: 5e-8, 0.001."""
    return f"{rate:g}".replace("e-0", "e-")
