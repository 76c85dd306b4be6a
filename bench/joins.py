"""Joins: all pairs of fingerprints within a Hamming distance, beside peers that find the very same pairs."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from context import Context, available_memory, meet
from inputs import ADVERSARIAL, Draw, uniform
from peers import FAISS, SIMHASH_PYBIND, Peer, PeerFailed
from result_table import Result
from timing import Settings, best_time, race

from slmfast import _native
from slmfast.near_duplicates import near_pairs

BRUTE_FORCE_ROWS = 20_000
CHILD = Path(__file__).parent / "measured_child.py"
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
    seconds = {}
    for draw in (uniform, *ADVERSARIAL):
        row = _alone(context, draw, n)
        seconds[draw] = row.ours
        yield row
        yield _beside_brute_force(context, draw, n)
    yield from beside_peers(context, uniform, n)
    worst = max(ADVERSARIAL, key=lambda draw: seconds[draw])
    yield from beside_peers(context, worst, n)
    yield _skew(context, worst, n)


def _skew(context: Context, worst: Draw, n: int) -> Result:
    crowded, even = worst(n, context.seed), uniform(n, context.seed)
    skewed, usual = race(
        lambda: near_pairs(crowded, context.k, threads=context.threads),
        lambda: near_pairs(even, context.k, threads=context.threads),
    )
    return Result(
        group="joins",
        case=f"join, slowest of {len(ADVERSARIAL)} adversarial families ({_name(worst)}) over uniform (ratio = ours / "
        f"uniform), n={n:,}, k={context.k}",
        ours=skewed,
        theirs=usual,
        unit="s",
        ratio=skewed / usual,
    )


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
    plan = predicted(len(values), context.k, context.threads) if draw is uniform else None
    case = _case(draw, values, context.k, pairs)
    context.say(f"ours: {case}: {seconds:.3f} s")
    return Result(group="joins", case=case, ours=seconds, unit="s", predicted=plan)


def _beside_brute_force(context: Context, draw: Draw, n: int) -> Result:
    values = draw(min(n, BRUTE_FORCE_ROWS), context.seed)
    ours, pairs = best_time(lambda: near_pairs(values, context.k, threads=context.threads))
    theirs, found = best_time(lambda: brute_force(values, context.k))
    return _row(_case(draw, values, context.k, pairs), "numpy brute force", np.__version__, ours, theirs, pairs, found)


def _beside(context: Context, peer: Peer, choices: list[Settings], draw: Draw, n: int) -> Iterator[Result]:
    if not context.peers.has(peer):
        return

    def ours(values: np.ndarray) -> Any:
        return near_pairs(values, context.k, threads=context.threads)

    try:
        met = meet(context, peer, "join", n, choices, lambda size: draw(size, context.seed), ours)
    except PeerFailed as failure:
        yield _failed(context, draw, n, peer, failure)
        return
    case = f"{_case(draw, met.source, context.k, met.our_answer)} ({met.settings})"
    yield _row(case, peer.title, met.answer.version, met.ours, met.theirs, met.our_answer, met.answer.value)


def _failed(context: Context, draw: Draw, n: int, peer: Peer, failure: PeerFailed) -> Result:
    context.fail(peer, f"join, {_name(draw)}, k={context.k}", failure)
    row = _alone(context, draw, n)
    return replace(row, case=f"{row.case}: {failure}", peer=peer.title, version=peer.version, predicted=None)


def _row(case: str, peer: str, version: str, ours: float, theirs: float, pairs: Any, found: np.ndarray) -> Result:
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
    )


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
    context.say(f"ours: join, uniform, n={n:,}, k={context.k}")
    arguments = ["join", str(n), str(context.k), str(context.threads), str(context.seed)]
    done = subprocess.run([sys.executable, str(CHILD), *arguments], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    case = f"join, uniform, n={found['n']:,}, k={context.k}, pairs={found['pairs']:,}"
    plan = predicted(found["n"], context.k, context.threads)
    yield Result(group="joins", case=case, ours=found["seconds"], unit="s", predicted=plan)
    for name, value in (("without", found["bytes"]), ("with", found["bytes_with_input"])):
        yield Result(group="joins", case=f"{case}: peak memory {name} its input", ours=value, unit="bytes/record")
