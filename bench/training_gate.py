"""When two trainings have given the same answer; without that no ratio is printed.

The losses of all steps must agree, the first step's and those that later weights give. A KTO loss before any step is
1/2 whatever the model says, so the norm of the first gradient must agree as well, and a curve that does not move shows
nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Of losses and of the first gradient's norm, relative."""

    loss: float
    norm: float


FP32 = Tolerance(1e-5, 1e-5)
# bf16 keeps 8 bits of every number of a forward pass. That the question is the same is seen in fp32 before; this only
# finds a side that goes astray.
BF16 = Tolerance(5e-2, 1e-1)
MOVED = 2.0  # tolerances between the least and the largest loss of a curve


@dataclass(frozen=True)
class Curve:
    """The losses of a training's steps in order, and the norm of its first gradient."""

    losses: Sequence[float]
    norm: float


def same_answer(ours: Curve, theirs: Curve, allowed: Tolerance = FP32) -> bool:
    """Whether two trainings, of equally many steps, did the same; false where either is not finite or does not move."""
    if len(ours.losses) != len(theirs.losses) or not all(map(math.isfinite, (*ours.losses, ours.norm))):
        return False
    largest = max(map(abs, theirs.losses))
    moved = max(theirs.losses) - min(theirs.losses) > MOVED * FP32.loss * largest
    return moved and furthest(ours, theirs) <= allowed.loss and _apart(ours.norm, theirs.norm) <= allowed.norm


def furthest(ours: Curve, theirs: Curve) -> float:
    """The largest relative difference of two losses of one step; infinite where one is not finite."""
    return max(map(_apart, ours.losses, theirs.losses))


def _apart(ours: float, theirs: float) -> float:
    difference = abs(ours - theirs)
    return difference / abs(theirs) if math.isfinite(difference) and theirs else math.inf
