"""Joins: all pairs of fingerprints within a Hamming distance, beside peers that find the very same pairs."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from context import Context, available_memory, meet
from inputs import ADVERSARIAL, Draw, one_row_in_ten_near, uniform
from measured_child import NEIGHBOUR
from own_child import ChildFailed, measured
from peers import FAISS, SIMHASH_PYBIND, Peer, PeerFailed
from result_table import Result
from timing import Race, Settings, best_of, best_time, described_runs, race

from slmfast import _native
from slmfast.near_duplicates import near_pairs

BRUTE_FORCE_ROWS = 20_000
BYTES_A_RECORD = 40  # of memory that a join may need, its input included, before it is tried


def predicted(n: int, k: int, threads: int) -> float | None:
    """Wall seconds that the cost formula expects of a uniform join; None where the native module does not say."""
    plan = getattr(_native, "join_plan", None)
    return None if plan is None else plan(n, k)[2] / threads


def ordered(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64[2, m] as i < j, sorted by i and then j. A pair given twice stays twice."""
    i, j = np.minimum(*pairs).astype(np.int64), np.maximum(*pairs).astype(np.int64)
    order = np.lexsort((j, i))
    return i[order], j[order]


def same_pairs(ours: tuple[np.ndarray, ...], theirs: np.ndarray) -> bool:
    """Whether a peer's pairs, in any order, are ours."""
    i, j = ordered(theirs)
    return bool(np.array_equal(ours[0], i) and np.array_equal(ours[1], j))


def brute_force(values: np.ndarray, k: int) -> np.ndarray:
    """int64[2, m]: all pairs within k, by numpy in tiles."""
    found = []
    for begin in range(0, len(values), 256):
        i, j = np.nonzero(np.bitwise_count(values[begin : begin + 256, None] ^ values[None, begin:]) <= k)
        found.append(np.stack([i[i < j], j[i < j]]) + begin)
    return np.concatenate(found, axis=1)


def block_choices(k: int) -> list[Settings]:
    """Numbers of blocks for simhash-pybind: all are exact, the fastest depends on n."""
    return [{"blocks": k + more} for more in ((1, 2, 3) if k < 6 else (2, 3, 4))]


def faiss_choices(k: int) -> list[Settings]:
    """Exact settings for faiss: k + 1 hashes without flipped bits, or half as many with one."""
    half = (k + 2) // 2
    flipped = [{"hashes": half, "flips": 1}] if half < k + 1 else []
    return [{"hashes": k + 1, "flips": 0}, *flipped]


def join_cases(context: Context, n: int) -> Iterator[Result]:
    """Uniform and adversarial fingerprints: ours alone, numpy's brute force on few rows, and the peers."""
    for draw in (uniform, one_row_in_ten_near, *ADVERSARIAL):
        yield _alone(context, draw, n)
        yield from _beside_brute_force(context, draw, n)
    skews = {draw: _skew(context, draw, n) for draw in ADVERSARIAL}
    worst = max(ADVERSARIAL, key=lambda draw: skews[draw].ratio)
    for draw in (uniform, one_row_in_ten_near):
        yield from beside_peers(context, draw, n)
    yield from skews.values()
    row = skews[worst]
    yield replace(row, case=f"slowest of {len(ADVERSARIAL)} adversarial families: {row.case}")


def _skew(context: Context, draw: Draw, n: int) -> Result:
    crowded, even = draw(n, context.seed), uniform(n, context.seed)
    both = race(
        lambda: near_pairs(crowded, context.k, threads=context.threads),
        lambda: near_pairs(even, context.k, threads=context.threads),
    )
    return Result(
        group="joins",
        case=f"join, adversarial ({_name(draw)}) over uniform (ratio = ours / uniform), n={n:,}, k={context.k}, "
        f"{_described_output(both)}, {described_runs(both.runs)}",
        ours=both.ours,
        theirs=both.theirs,
        unit="s",
        ratio=both.ours / both.theirs,
        ratio_says="uniform's time",
        predicted=predicted(n, context.k, context.threads),
    )


def _described_output(both: Race) -> str:
    """What the two joins of a race found, and how fast, so that a slow join can be told from one with much to say.

    Where there are more than half as many again, the further time is also given for each further pair.
    """
    ours, theirs = len(both.our_answer[0]), len(both.their_answer[0])
    text = f"pairs={ours:,} ({_rate(ours, both.ours)}) over {theirs:,} ({_rate(theirs, both.theirs)})"
    if ours - theirs > theirs / 2 and both.ours > both.theirs:
        text += f", {(both.ours - both.theirs) / (ours - theirs) * 1e9:.3g} ns a further pair"
    return text


def _rate(pairs: int, seconds: float) -> str:
    return f"{pairs / seconds:.3g} pairs/s"


def k8_case(context: Context, n: int) -> Iterator[Result]:
    """The widest join, k = 8, on uniform fingerprints."""
    wide = replace(context, k=8)
    yield _alone(wide, uniform, n)
    yield from _beside(wide, SIMHASH_PYBIND, block_choices(8), uniform, n)


def beside_peers(context: Context, draw: Draw, n: int) -> Iterator[Result]:
    """One row a peer that is installed."""
    yield from _beside(context, SIMHASH_PYBIND, block_choices(context.k), draw, n)
    yield from _beside(context, FAISS, faiss_choices(context.k), draw, n)


def _alone(context: Context, draw: Draw, n: int) -> Result:
    values = draw(n, context.seed)
    seconds, pairs = best_time(lambda: near_pairs(values, context.k, threads=context.threads))
    plan = predicted(len(values), context.k, context.threads)
    case = f"{_case(draw, values, context.k, pairs)} ({_rate(len(pairs[0]), seconds)}), {_threads(context.threads)}"
    context.say(f"ours: {case}: {seconds:.3f} s")
    return Result(group="joins", case=case, ours=seconds, unit="s", predicted=plan)


def _beside_brute_force(context: Context, draw: Draw, n: int) -> Iterator[Result]:
    values = draw(min(n, BRUTE_FORCE_ROWS), context.seed)

    def ours(threads: int) -> Any:
        return near_pairs(values, context.k, threads=threads)

    both = race(lambda: ours(1), lambda: brute_force(values, context.k))
    seconds = {1: (both.ours, both.our_answer)}
    if context.threads > 1:  # numpy has one thread: its measurement serves for both rows
        seconds[context.threads] = best_of(both.runs, lambda: ours(context.threads))
    for threads, (taken, pairs) in seconds.items():
        yield _row(
            f"{_case(draw, values, context.k, pairs)}, {_threads(threads)} ({described_runs(both.runs)})",
            "numpy brute force (1 thread)",
            np.__version__,
            taken,
            both.theirs,
            pairs,
            both.their_answer,
            predicted(len(values), context.k, threads),
        )


def _beside(context: Context, peer: Peer, choices: list[Settings], draw: Draw, n: int) -> Iterator[Result]:
    if not context.peers.has(peer):
        return

    least = 1 if peer.one_thread else context.threads

    def ours(values: np.ndarray, threads: int = least) -> Any:
        return near_pairs(values, context.k, threads=threads)

    try:
        met = meet(context, peer, "join", n, choices, lambda size: draw(size, context.seed), ours)
    except PeerFailed as failure:
        yield _failed(context, draw, n, peer, failure)
        return
    seconds = {least: (met.ours, met.our_answer)}
    if context.threads > least:  # the peer has one thread: its measurement serves for both rows
        seconds[context.threads] = best_of(met.runs, lambda: ours(met.source, context.threads))
    for threads, (taken, pairs) in seconds.items():
        case = f"{_case(draw, met.source, context.k, pairs)}, {_threads(threads)} ({met.settings})"
        plan = predicted(len(met.source), context.k, threads)
        yield _row(case, peer.title, met.answer.version, taken, met.theirs, pairs, met.answer.value, plan)


def _failed(context: Context, draw: Draw, n: int, peer: Peer, failure: PeerFailed) -> Result:
    context.fail(peer, f"join, {_name(draw)}, k={context.k}", failure)
    row = _alone(context, draw, n)
    return replace(row, case=f"{row.case}: {failure}", peer=peer.title, version=peer.version)


def _row(
    case: str,
    peer: str,
    version: str,
    ours: float,
    theirs: float,
    pairs: Any,
    found: np.ndarray,
    plan: float | None,
) -> Result:
    same = same_pairs(pairs, found)
    return Result(
        group="joins",
        case=case,
        peer=peer,
        version=version,
        ours=ours,
        theirs=theirs,
        unit="s",
        ratio=theirs / ours if same else None,
        same_answer=same,
        predicted=plan,
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _name(draw: Draw) -> str:
    return draw.__name__.replace("_", " ")


def _case(draw: Draw, values: Any, k: int, pairs: Any) -> str:
    return f"join, {_name(draw)}, n={len(values):,}, k={k}, pairs={len(pairs[0]):,}"


def large_case(context: Context, n: int) -> Iterator[Result]:
    """Ours alone at a size that fills the memory: wall time, and peak memory a record, in a process of its own."""
    most = int(available_memory() * 0.9) // BYTES_A_RECORD
    if n > most:
        context.say(f"join of {n:,}: memory for {most:,} only; that many are joined")
        n = most
    case = f"join, uniform with a neighbour for 1 row in {NEIGHBOUR:,}, n={n:,}, k={context.k}"
    context.say(f"ours: {case}")
    try:
        found = measured("join", n, context.k, context.threads, context.seed)
    except ChildFailed as failure:
        context.fail_ourselves(case, failure)
        return
    case += f", pairs={found['pairs']:,}, {_threads(context.threads)}"
    plan = predicted(found["n"], context.k, context.threads)
    yield Result(group="joins", case=case, ours=found["seconds"], unit="s", predicted=plan)
    for name, value in (("without", found["bytes"]), ("with", found["bytes_with_input"])):
        yield Result(
            group="joins",
            case=f"{case}: peak memory {name} its input, those pairs included",
            ours=value,
            unit="bytes/record",
        )
