"""How two sides are timed: the peer climbs to the largest size that it finishes, then both run in turn."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peers import Answer, PeerFailed

ENOUGH_SECONDS = 2.0  # a side is run again until it has run for so long, at most REPEATS times
REPEATS = 5
STEP = 5  # a peer is tried at n / 125, n / 25, n / 5 and n
PROMISING = 1.5  # settings expected to take so many times the shortest are still tried at n
LEAST_ROWS = 2_000  # a smaller trial says nothing about a larger one

Settings = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Climb:
    """The largest size that a peer finished within its limit, and its fastest settings there."""

    n: int
    settings: Settings
    answer: Answer
    note: str
    """Why it is not the size that was asked for; empty where it is."""


def sizes(n: int) -> list[int]:
    """n and its fifths down to LEAST_ROWS, ascending."""
    steps = [n]
    while steps[-1] // STEP >= LEAST_ROWS:
        steps.append(steps[-1] // STEP)
    return steps[::-1]


def expected(history: Sequence[tuple[int, float]], n: int) -> float:
    """Seconds at n rows, from (rows, seconds) at smaller ones.

    The last two give the power of growth, held between linear and quadratic; one alone is taken to the power 1.5.
    """
    if not history:
        return 0.0
    rows, seconds = history[-1]
    power = 1.5
    if len(history) > 1:
        before, seconds_before = history[-2]
        power = min(max(math.log(seconds / seconds_before) / math.log(rows / before), 1.0), 2.0)
    return seconds * (n / rows) ** power


def climb(n: int, choices: Sequence[Settings], run: Callable[[int, Settings], Answer], limit: float) -> Climb:
    """Measures a peer at growing sizes, with all of its settings below n and the promising ones at n.

    A size for which more than `limit` seconds are expected is not tried.

    Raises:
        PeerFailed: with the last failure, where no settings got through the smallest size.
    """
    histories: list[list[tuple[int, float]]] = [[] for _ in choices]
    alive = list(range(len(choices)))
    best: Climb | None = None
    note = ""
    for size in sizes(n):
        able = [i for i in alive if expected(histories[i], size) <= limit]
        if not able:
            note = note or f"no more within {limit:.0f} s"
            break
        if size == n and best is not None:
            least = min(expected(histories[i], size) for i in able)
            able = [i for i in able if expected(histories[i], size) <= PROMISING * least]
        measured: list[tuple[float, Climb]] = []
        for i in able:
            try:
                answer = run(size, choices[i])
            except PeerFailed as failure:
                note = str(failure)
                alive.remove(i)
                continue
            histories[i].append((size, max(answer.seconds, 1e-6)))
            measured.append((answer.seconds, Climb(size, choices[i], answer, "")))
        if not measured:
            break
        best, note = min(measured, key=lambda one: one[0])[1], ""
    if best is None:
        raise PeerFailed(note)
    return best if best.n == n else Climb(best.n, best.settings, best.answer, note)


def stopwatch(call: Callable[[], Any]) -> tuple[float, Any]:
    """The wall time of one call in seconds, and what it gave."""
    start = time.perf_counter()
    answer = call()
    return time.perf_counter() - start, answer


def best_time(call: Callable[[], Any]) -> tuple[float, Any]:
    """The shortest wall time of a few calls, in seconds, and what the last one gave. For rows without a peer."""
    best, total = math.inf, 0.0
    answer = None
    for _ in range(REPEATS):
        seconds, answer = stopwatch(call)
        best, total = min(best, seconds), total + seconds
        if total >= ENOUGH_SECONDS:
            break
    return best, answer


def best_of(runs: int, call: Callable[[], Any]) -> tuple[float, Any]:
    """The shortest wall time of so many calls, in seconds, and what the last one gave."""
    measured = [stopwatch(call) for _ in range(runs)]
    return min(seconds for seconds, _ in measured), measured[-1][1]


def described_runs(runs: int) -> str:
    """How often each side was run, for the case's text."""
    return "1 run each" if runs == 1 else f"best of {runs} runs each"


@dataclass(frozen=True, eq=False)
class Race:
    """The shortest times of two sides that ran equally often, and their last answers."""

    runs: int
    ours: float
    our_answer: Any
    theirs: float
    their_answer: Any


def race(ours: Callable[[], Any], theirs: Callable[[], Any]) -> Race:
    """Two calls that take turns, so that neither alone meets a disturbance of the machine."""
    return in_turn(ours, lambda: stopwatch(theirs), stopwatch(theirs))


def in_turn(
    ours: Callable[[], Any], theirs: Callable[[], tuple[float, Any]], first: tuple[float, Any] | None = None
) -> Race:
    """Times both sides in turn and equally often, until theirs has run for long enough.

    The best of many runs is below the best of few, so a slow peer that runs once meets one run of ours.

    Args:
        theirs: gives its own seconds and its answer.
        first: a run of theirs that counts.
    """
    their_seconds, their_answer = first or theirs()
    our_seconds, our_answer = stopwatch(ours)
    runs, their_total = 1, their_seconds
    while runs < REPEATS and their_total < ENOUGH_SECONDS:
        seconds, their_answer = theirs()
        their_seconds, their_total = min(their_seconds, seconds), their_total + seconds
        our_seconds = min(our_seconds, stopwatch(ours)[0])
        runs += 1
    return Race(runs, our_seconds, our_answer, their_seconds, their_answer)
