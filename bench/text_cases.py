"""Texts: fingerprints by the megabyte, deduplication from end to end, and an index that grows.

No peer hashes the features that we hash, so their answers differ and `same_answer` is null: what the difference is
worth stands in the quality table.
"""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from context import Context, Meeting, available_memory, meet
from inputs import belle_prompts, prompts, short_texts
from own_child import ChildFailed, measured
from peers import DATA_JUICER, GAOYA, SIMHASH, Peer, PeerFailed
from result_table import Result
from timing import best_of, best_time, described_runs, stopwatch

from slmfast.near_duplicates import DedupIndex, dedup, simhash

INDEX_BYTES_A_ROW = 200  # of memory, and of disk, that the index case may need before it is tried
SCALAR_RUNS = 3


def fingerprint_cases(context: Context, rounds: int) -> Iterator[Result]:
    """Real prompts, on one thread and on all, beside our own scalar code and the peers.

    All of them once take milliseconds, in which a thread's start counts: `rounds` takes them so many times over.
    """
    name, texts = prompts()
    more = belle_prompts()
    name, texts = f"{name} and BELLE" if more else name, (texts + more) * rounds
    name += f", {rounds} times over" if rounds > 1 else ""
    order = np.random.default_rng(context.seed).permutation(len(texts))
    column = pa.chunked_array([pa.array([texts[i] for i in order], pa.string())])
    try:
        yield from _beside_scalar(context, name, column)
    except ChildFailed as failure:
        context.fail_ourselves("fingerprints by the scalar oracle", failure)
    for peer in (SIMHASH, GAOYA):
        if context.peers.has(peer):
            try:
                yield from _fingerprints_beside(context, peer, name, column)
            except PeerFailed as failure:
                context.fail(peer, "fingerprints", failure)


def _beside_scalar(context: Context, name: str, column: pa.ChunkedArray) -> Iterator[Result]:
    """Our fastest instruction set against the scalar oracle: the same bits, or no ratio."""
    with tempfile.TemporaryDirectory(prefix="slmfast-bench-") as scratch:
        source, output = Path(scratch) / "input.arrow", Path(scratch) / "answer.npy"
        table = pa.table({"text": column})
        with pa.OSFile(str(source), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        found = measured("fingerprints", source, output, 1, SCALAR_RUNS, environment={"SLMFAST_ISA": "scalar"})
        oracle, theirs = np.load(output), found["seconds"]
    seconds, values = best_of(SCALAR_RUNS, lambda: simhash(column, threads=1))
    same = bool(np.array_equal(values, oracle))
    remark = f"ratio to our scalar oracle ({described_runs(SCALAR_RUNS)})"
    case = f"fingerprints, {_described(name, column)}, 1 thread; {remark}"
    yield _rates("fingerprints", case, column, seconds, theirs, same_answer=same)
    seconds, _ = best_time(lambda: simhash(column, threads=context.threads))
    case = f"fingerprints, {_described(name, column)}, {context.threads} threads"
    yield _rates("fingerprints", case, column, seconds, None)


def _fingerprints_beside(context: Context, peer: Peer, name: str, column: pa.ChunkedArray) -> Iterator[Result]:
    met = _meet_fingerprints(replace(context, threads=1), peer, column)
    yield _fingerprint_row(peer, name, met, met.ours, threads=1)
    if context.threads > 1 and peer.one_thread:  # its measurement serves for both rows
        seconds, _ = best_of(met.runs, lambda: simhash(met.source, threads=context.threads))
        yield _fingerprint_row(peer, name, met, seconds, threads=context.threads)
    elif context.threads > 1:
        met = _meet_fingerprints(context, peer, column)
        yield _fingerprint_row(peer, name, met, met.ours, threads=context.threads)


def _fingerprint_row(peer: Peer, name: str, met: Meeting, ours: float, threads: int) -> Result:
    remark = f" ({met.settings})" if met.settings else ""
    case = f"fingerprints, {_described(name, met.source)}, {threads} thread{'s' * (threads > 1)}{remark}"
    row = _rates("fingerprints", case, met.source, ours, met.theirs)
    return replace(row, peer=peer.title, version=met.answer.version)


def _meet_fingerprints(context: Context, peer: Peer, column: pa.ChunkedArray) -> Meeting:
    return meet(
        context,
        peer,
        "fingerprints",
        len(column),
        [{}],
        lambda n: column.slice(0, n),
        lambda some: simhash(some, threads=context.threads),
    )


def _described(name: str, column: pa.ChunkedArray) -> str:
    return f"{name}, n={len(column):,}, {_megabytes(column):.1f} MB"


def _megabytes(column: pa.ChunkedArray) -> float:
    """Of UTF-8."""
    return pc.sum(pc.binary_length(column)).as_py() / 1e6


def _rates(
    group: str, case: str, column: pa.ChunkedArray, ours: float, theirs: float | None, same_answer: bool | None = None
) -> Result:
    size = _megabytes(column)
    ratio = None if theirs is None or same_answer is False else theirs / ours
    rate = None if theirs is None else size / theirs
    return Result(
        group=group, case=case, ours=size / ours, theirs=rate, unit="MB/s", ratio=ratio, same_answer=same_answer
    )


def end_to_end_case(context: Context, n: int) -> Iterator[Result]:
    """An Arrow column in, the keep mask and the stand-ins out; data-juicer's operator over the same rows."""
    context.say(f"{n:,} short texts are made")
    column = short_texts(n, context.seed)

    def ours(some: pa.ChunkedArray) -> np.ndarray:
        return dedup(some, k=context.k, threads=context.threads).keep

    seconds, keep = best_time(lambda: ours(column))
    case = f"end to end, short texts, n={n:,}, k={context.k}, kept {keep.sum():,}: {seconds:.3f} s"
    context.say(f"ours: {case}")
    yield Result(group="end to end", case=case, ours=n / seconds, unit="rows/s")
    if not context.peers.has(DATA_JUICER):
        return
    blocks = context.k + 2
    choices = [{"processes": count, "blocks": blocks} for count in dict.fromkeys((1, context.threads))]
    try:
        met = meet(context, DATA_JUICER, "dedup", n, choices, lambda size: column.slice(0, size), ours)
    except PeerFailed as failure:
        context.fail(DATA_JUICER, "end to end", failure)
        return
    kept = f"kept {met.our_answer.sum():,} and {met.answer.value.sum():,}"
    yield Result(
        group="end to end",
        case=f"end to end, short texts, n={met.n:,}, k={context.k}, {kept} ({met.settings})",
        peer=DATA_JUICER.title,
        version=met.answer.version,
        ours=met.n / met.ours,
        theirs=met.n / met.theirs,
        unit="rows/s",
        ratio=met.theirs / met.ours,
    )


def index_case(context: Context, n: int) -> Iterator[Result]:
    """1 % more rows for an index of n, from opening it to its being on disk, against building all of it anew."""
    with tempfile.TemporaryDirectory(prefix="slmfast-bench-") as scratch:
        most = int(min(available_memory() * 0.9, shutil.disk_usage(scratch).free * 0.5)) // INDEX_BYTES_A_ROW
        if n > most:
            context.say(f"index of {n:,}: memory or disk for {most:,} only; that many are taken")
            n = most
        more = n // 100
        context.say(f"{n + more:,} short texts are made")
        texts = short_texts(n + more, context.seed)
        ids = np.arange(n + more)
        base, anew = Path(scratch) / "base.index", Path(scratch) / "anew.index"

        def add(path: Path, begin: int, end: int) -> tuple[float, np.ndarray]:
            some, numbers = texts.slice(begin, end - begin), ids[begin:end]

            def run() -> np.ndarray:
                return DedupIndex(path, context.k).add(some, numbers, threads=context.threads).duplicate_of

            return stopwatch(run)

        context.say(f"ours: index of {n:,} rows")
        add(base, 0, n)
        appended, tail = add(base, n, n + more)
        context.say("ours: the same index built anew")
        rebuilt, whole = add(anew, 0, n + more)
    same = bool(np.array_equal(tail, whole[n:]))
    yield Result(
        group="index",
        case=f"index, append {more:,} to {n:,} rows, k={context.k} (ratio = append / building anew; 1 run each)",
        ours=appended,
        theirs=rebuilt,
        unit="s",
        ratio=appended / rebuilt if same else None,
        ratio_says="the time of building anew",
        same_answer=same,
    )
