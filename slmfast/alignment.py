"""Which reply wins and which loses, and how the winners and losers become an SFT and a KTO set.

The order is lexicographic: safety, then quality, then perplexity, then the fixed order of the replies. Perplexity only
breaks ties, since a model finds its own replies likely whatever they say.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Choice(NamedTuple):
    """Positions among a record's replies; None where nothing qualifies."""

    best: int | None
    worst: int | None


def choose_replies(
    replies: Sequence[dict[str, Any]],
    ratings: Sequence[dict[str, Any]],
    *,
    max_tokens: int | None,
    max_bits: float,
) -> Choice:
    """The best and the worst of one instruction's replies.

    The best is safe, of quality 1, was not cut off, has at most `max_tokens` tokens and `max_bits` bits a token. The
    worst is worse than the best in safety or quality and differs from it in text. A reply with a null rating neither
    wins nor loses, and without a best there is no worst.
    """
    rated = [i for i, rating in enumerate(ratings) if None not in rating.values()]

    def may_win(i: int) -> bool:
        rating = ratings[i]
        short = max_tokens is None or rating["tokens"] <= max_tokens
        whole = replies[i]["finish_reason"] == "stop"
        usual = rating["bits_per_token"] <= max_bits
        return rating["safety"] > 0 and rating["quality"] == 1 and short and whole and usual

    def rank(i: int) -> tuple[float, float, float, int]:
        return ratings[i]["safety"], ratings[i]["quality"], -ratings[i]["perplexity"], -i

    best = max(filter(may_win, rated), key=rank, default=None)
    if best is None:
        return Choice(None, None)

    def may_lose(i: int) -> bool:
        return rank(i)[:2] < rank(best)[:2] and replies[i]["text"].strip() != replies[best]["text"].strip()

    return Choice(best, min(filter(may_lose, rated), key=rank, default=None))


def upper_fence(values: np.ndarray, fences: float) -> float:
    """Tukey's fence: the third quartile plus `fences` interquartile ranges; infinite without values or end."""
    values = values[~np.isnan(values)]
    if len(values) == 0 or fences == float("inf"):
        return float("inf")
    first, third = np.quantile(values, [0.25, 0.75])
    return float(third + fences * (third - first))


def shuffled_apart(prompts: Sequence[int], hashes: np.ndarray) -> list[int]:
    """An order of rows by their hashes in which no two neighbours share a prompt, if there is any.

    `prompts` gives each row's prompt number. Where the next row by hash has the prompt of the last one taken, the
    first later row with another prompt goes before it. Rows that are left over at the end (all of one prompt) are
    inserted at the first places that keep them apart.
    """
    order: list[int] = []
    waiting: list[int] = []  # rows that could not yet follow
    for row in np.argsort(hashes, kind="stable").tolist():
        if order and prompts[order[-1]] == prompts[row]:
            waiting.append(row)
            continue
        order.append(row)
        while waiting and prompts[waiting[0]] != prompts[order[-1]]:
            order.append(waiting.pop(0))
    for row in waiting:
        order.insert(_place_apart(order, prompts, row), row)
    return order


def _place_apart(order: list[int], prompts: Sequence[int], row: int) -> int:
    for place in range(len(order) + 1):
        neighbours = order[max(0, place - 1) : place + 1]
        if all(prompts[other] != prompts[row] for other in neighbours):
            return place
    return len(order)
