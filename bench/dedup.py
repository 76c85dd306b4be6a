"""The near-duplicate join beside named peers, at identical pair sets.

    slmfast bench dedup [--n 200000] [--k 3] [--threads 2]

Peers that are installed take part; the others are named with what would install them. Every peer gets the same
distinct fingerprints, and a ratio is printed only if both sides found the same pairs. numpy's brute force is quadratic
and runs on the first rows alone. Times are the best of a few runs. The last line of stdout is one JSON object.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from slmfast import _native
from slmfast.near_duplicates import near_pairs, simhash

BRUTE_FORCE_ROWS = 20_000
ENOUGH_SECONDS = 2.0  # a case is repeated until it has run for so long, at most REPEATS times
REPEATS = 5

Pairs = tuple[np.ndarray, np.ndarray]  # i and j of each pair, i < j, sorted


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the table: what was measured, on whom, and whether both gave the same answer."""

    case: str
    peer: str | None
    version: str | None
    ours: float
    theirs: float | None
    unit: str
    ratio: float | None
    same_answer: bool | None


Join = tuple[Callable[[], Any], Callable[[Any], Pairs]]  # what is timed, and how its answer becomes sorted pairs


@dataclass(frozen=True)
class Peer:
    """A join by somebody else, made for given distinct fingerprints and k."""

    name: str
    package: str
    join: Callable[[np.ndarray, int], Join]
    most_rows: int | None = None

    def version(self) -> str | None:
        """The installed version; None where the package is missing."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def numpy_join(values: np.ndarray, k: int) -> Join:
    """Brute force in tiles."""

    def run() -> Pairs:
        found_i, found_j = [], []
        for begin in range(0, len(values), 256):
            near = np.bitwise_count(values[begin : begin + 256, None] ^ values[None, begin:]) <= k
            i, j = np.nonzero(near)
            later = i < j
            found_i.append(i[later] + begin)
            found_j.append(j[later] + begin)
        return np.concatenate(found_i), np.concatenate(found_j)

    return run, lambda pairs: pairs


def faiss_join(values: np.ndarray, k: int, threads: int) -> Join:
    """IndexBinaryMultiHash with k + 1 hashes, exact because k bits can't touch them all; its radius is strict."""
    import faiss

    faiss.omp_set_num_threads(threads)
    codes = values.view(np.uint8).reshape(-1, 8)

    def run() -> tuple[np.ndarray, np.ndarray]:
        index = faiss.IndexBinaryMultiHash(64, k + 1, 64 // (k + 1))
        index.nflip = 0
        index.add(codes)
        limits, _, found = index.range_search(codes, k + 1)
        return limits, found

    def pairs(answer: tuple[np.ndarray, np.ndarray]) -> Pairs:
        limits, found = answer
        rows = np.repeat(np.arange(len(values)), np.diff(limits.astype(np.int64)))
        later = rows < found
        return ordered(rows[later], found[later])

    return run, pairs


def simhash_pybind_join(values: np.ndarray, k: int) -> Join:
    """find_all of simhash-pybind, by permuted sorts, with two blocks more than differing bits."""
    import simhash as peer

    numbers = values.tolist()

    def pairs(answer: Any) -> Pairs:
        matches = np.array(list(answer), dtype=np.uint64).reshape(-1, 2)
        order = np.argsort(values)
        rows = order[np.searchsorted(values, matches, sorter=order)]
        return ordered(rows.min(axis=1), rows.max(axis=1))

    return lambda: peer.find_all(numbers, k + 2, k), pairs


def ordered(i: np.ndarray, j: np.ndarray) -> Pairs:
    """Pairs sorted by i, then j."""
    order = np.lexsort((j, i))
    return i[order], j[order]


def peers(threads: int) -> list[Peer]:
    """All peers of the join, installed or not."""
    return [
        Peer("numpy brute force", "numpy", numpy_join, most_rows=BRUTE_FORCE_ROWS),
        Peer("faiss IndexBinaryMultiHash", "faiss-cpu", lambda values, k: faiss_join(values, k, threads)),
        Peer("simhash-pybind find_all (1 thread)", "simhash-pybind", simhash_pybind_join),
    ]


def uniform(n: int, seed: int) -> np.ndarray:
    """Distinct random fingerprints, with a near neighbour for one row in ten so that there are pairs to find."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**64, n, dtype=np.uint64)
    copies = rng.integers(0, n, n // 10)
    values[: len(copies)] = values[copies] ^ (np.uint64(1) << rng.integers(0, 64, len(copies), dtype=np.uint64))
    return np.unique(values)[rng.permutation(len(np.unique(values)))]


def templates(n: int, seed: int) -> np.ndarray:
    """As uniform, but 1 % of the rows agree on 32 bits and crowd into the same buckets."""
    values = uniform(n, seed)
    values[: n // 100] = values[: n // 100] & np.uint64(0xFFFFFFFF) | np.uint64(0xABCDEF01) << np.uint64(32)
    return np.unique(values)


def best_time(run: Callable[[], Any]) -> tuple[float, Any]:
    """The shortest wall time of a few runs, in seconds, and what the last one gave."""
    best = total = 0.0
    for repeat in range(REPEATS):
        start = time.perf_counter()
        answer = run()
        seconds = time.perf_counter() - start
        best = seconds if repeat == 0 else min(best, seconds)
        total += seconds
        if total > ENOUGH_SECONDS:
            break
    return best, answer


def compare(case: str, values: np.ndarray, k: int, threads: int) -> Iterator[Result]:
    """Joins the values ourselves and with every installed peer."""
    for peer in peers(threads):
        version = peer.version()
        if version is None:
            continue
        some = values[: peer.most_rows]
        ours, (i, j, _) = best_time(lambda some=some: near_pairs(some, k, threads=threads))
        run, decode = peer.join(some, k)
        theirs, answer = best_time(run)
        pairs = decode(answer)
        same = np.array_equal(i, pairs[0]) and np.array_equal(j, pairs[1])
        ratio = theirs / ours if same else None
        name = f"{case}, n={len(some):,}, k={k}, pairs={len(i):,}"
        yield Result(
            case=name,
            peer=peer.name,
            version=version,
            ours=ours,
            theirs=theirs,
            unit="s",
            ratio=ratio,
            same_answer=same,
        )


def fingerprint_rate(threads: int) -> Result:
    """Megabytes of UTF-8 hashed in a second, half Chinese and half English; no peer hashes the same features."""
    texts = [
        "Write a short story about a fox who learns to read. " * 6,
        "请写一个关于狐狸学会读书的短篇故事，并说明道理。" * 6,
    ] * 20_000
    column = pa.array(texts)
    seconds, _ = best_time(lambda: simhash(column, threads=threads))
    rate = sum(len(text.encode()) for text in texts) / seconds / 1e6
    return Result(
        case="fingerprints, zh + en",
        peer=None,
        version=None,
        ours=rate,
        theirs=None,
        unit="MB/s",
        ratio=None,
        same_answer=None,
    )


def commit() -> str:
    """The commit of this checkout, marked where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def device(threads: int) -> str:
    """The processor, the threads used and the instruction set."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {threads} threads, {_native.active_isa()}"


def table(results: Sequence[Result]) -> str:
    """The results as aligned text."""
    rows = [("case", "peer", "version", "ours", "theirs", "ratio", "same answer")]
    for r in results:
        theirs = "" if r.theirs is None else f"{r.theirs:.4g} {r.unit}"
        ratio = "" if r.ratio is None else f"{r.ratio:.1f}x"
        same = {True: "yes", False: "NO: no ratio", None: ""}[r.same_answer]
        rows.append((r.case, r.peer or "", r.version or "", f"{r.ours:.4g} {r.unit}", theirs, ratio, same))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all cases; 1 if any peer found other pairs."""
    parser = argparse.ArgumentParser(prog="slmfast bench dedup", description=__doc__.partition("\n")[0])
    parser.add_argument("--n", type=int, default=200_000, help="fingerprints in a join (default 200000)")
    parser.add_argument("--k", type=int, default=3, choices=range(9), help="Hamming distance (default 3)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="threads on both sides")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.n < 1000:
        parser.error("--n must be at least 1000")
    results = [fingerprint_rate(options.threads)]
    for draw in (uniform, templates):
        values = draw(options.n, options.seed)
        results += compare(f"join, {draw.__name__}", values, options.k, options.threads)
    print(table(results))
    for peer in peers(options.threads):
        if peer.version() is None:
            print(f"{peer.name}: not installed; pip install {peer.package} brings it in")
    document = {"bench": "dedup", "device": device(options.threads), "commit": commit()}
    print(json.dumps(document | {"results": [asdict(result) for result in results]}))
    return 1 if any(result.same_answer is False for result in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
