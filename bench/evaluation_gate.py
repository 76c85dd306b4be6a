"""When two evaluations of the same items have given the same answer; without that no ratio is printed."""

from collections.abc import Sequence

import numpy as np

CLOSE = 1e-4  # nats between two log-probabilities of a choice, in fp32

Scored = Sequence[tuple[float, bool]]  # a choice's log-probability, and whether it is the greedy reply


def same_answer(ours: Scored, theirs: Scored, gold: Sequence[int], choices: int) -> bool:
    """Whether both say the same of every choice, and so of every item: log-probabilities, greedy flags, accuracy.

    Args:
        ours, theirs: each item's choices one after the other.
        gold: the right choice of each item.
        choices: how many each item has.
    """
    if not len(ours) == len(theirs) == len(gold) * choices:
        return False
    mine, its = (np.array([score for score, _ in side]) for side in (ours, theirs))
    if not (np.isfinite(mine).all() and np.isfinite(its).all()):
        return False
    flags = [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    return (
        flags and furthest(ours, theirs) <= CLOSE and accuracy(ours, gold, choices) == accuracy(theirs, gold, choices)
    )


def furthest(ours: Scored, theirs: Scored) -> float:
    """The largest difference of two log-probabilities of one choice, in nats."""
    return max(abs(mine - its) for (mine, _), (its, _) in zip(ours, theirs, strict=True))


def accuracy(scores: Scored, gold: Sequence[int], choices: int) -> float:
    """The share of items whose likeliest choice is the right one."""
    likeliest = np.array([score for score, _ in scores]).reshape(-1, choices).argmax(1)
    return float((likeliest == np.array(gold)).mean())
