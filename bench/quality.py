"""Precision and recall of near-duplicates against exact Jaccard similarity, ours and the peers'.

A pair is right when its texts' sets of normalised character 3-grams have a Jaccard similarity of at least 0.8. What a
peer finds are the pairs within k of the fingerprints that it made itself: its own search, being exact, gives the same.
On the miniature the rows that go are also held against the near-duplicates that were planted there.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from context import Context
from exact_jaccard import jaccard_pairs
from inputs import data_folder, prompts
from peers import DATA_JUICER, GAOYA, SIMHASH, PeerFailed
from result_table import Result, aligned

from slmfast.arrow_texts import normalise
from slmfast.near_duplicates import dedup, near_pairs, simhash

DISTANCES = (3, 5, 7)
SIMILAR = 0.8
OURS = "slmfast, verify=0.8"
PLAIN = "slmfast, verify=None"
PRECISION_NOTE = (
    f"The precision of {OURS!r} among pairs is 1 by construction: it keeps the pairs by the criterion that they are\n"
    "judged by. Its recall, and both figures on planted rows, are not."
)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Texts with what is true of them."""

    name: str
    texts: list[str]
    truth: np.ndarray
    """int64, ascending: the pairs that are right, i << 32 | j."""
    planted: np.ndarray | None
    """bool[n]: the rows that were planted as near-duplicates; None where nobody planted any."""


@dataclass(frozen=True)
class Quality:
    """How right one tool is at one distance."""

    corpus: str
    tool: str
    version: str | None
    k: int
    pairs: int
    precision: float | None
    """Of the pairs; None where none was found."""
    recall: float
    planted_precision: float | None
    planted_recall: float | None
    featureless: int
    """Pairs in which a text has no features at all."""


def corpora(context: Context) -> Iterator[Corpus]:
    """The miniature's world, and the bilingual Alpaca where it is there."""
    texts, planted = miniature()
    yield Corpus("miniature", texts, keyed(*jaccard_pairs(texts, SIMILAR)), planted)
    if data_folder() is not None:
        name, texts = prompts()
        context.say(f"exact Jaccard join of {len(texts):,} prompts")
        yield Corpus(name, texts, keyed(*jaccard_pairs(texts, SIMILAR)), None)


def miniature() -> tuple[list[str], np.ndarray]:
    """The well-formed prompts of the miniature in order of priority, and which of them were planted."""
    from slmfast.miniature.raw_files import SOURCES
    from slmfast.miniature.world import write_world

    with tempfile.TemporaryDirectory(prefix="slmfast-bench-") as scratch:
        write_world(scratch)
        rows = pq.read_table(Path(scratch) / "truth.parquet", columns=["source", "source_row", "kind", "prompt"])
    order = list(SOURCES)
    well_formed = [row for row in rows.to_pylist() if row["kind"] != "malformed"]
    well_formed.sort(key=lambda row: (order.index(row["source"]), row["source_row"]))
    planted = np.array([row["kind"] == "near_duplicate" for row in well_formed])
    return [row["prompt"] for row in well_formed], planted


def quality(context: Context, corpus: Corpus) -> Iterator[Quality]:
    """Ours with and without verification, and every peer that makes its own fingerprints, at each distance."""
    empty = np.array([not normalise(text) for text in corpus.texts])
    for tool, verify in ((OURS, SIMILAR), (PLAIN, None)):
        pairs, distances = our_pairs(corpus.texts, verify, context.threads)
        for k in DISTANCES:
            gone = ~dedup(corpus.texts, k=k, verify=verify, threads=context.threads).keep
            yield _judged(corpus, tool, None, k, pairs[distances <= k], gone, empty)
    column = pa.chunked_array([pa.array(corpus.texts, pa.string())])
    for peer in (SIMHASH, GAOYA, DATA_JUICER):
        if not context.peers.has(peer):
            continue
        context.say(f"{peer.title}: fingerprints of {corpus.name}")
        try:
            answer = context.peers.ask(peer, "fingerprints", column, {"threads": context.threads})
        except PeerFailed as failure:
            context.fail(peer, f"quality on {corpus.name}", failure)
            continue
        values, has_features = answer.value
        for k in DISTANCES:
            i, j, _ = near_pairs(values, k, threads=context.threads)
            gone = stood_for(len(values), i, j)
            yield _judged(corpus, peer.title, answer.version, k, keyed(i, j), gone, has_features == 0)


def our_pairs(texts: Sequence[str], verify: float | None, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """(pairs, distances) up to the greatest distance of which dedup, given the two texts alone, drops the second."""
    most = max(DISTANCES)
    i, j, distances = near_pairs(simhash(texts, threads=threads), most, threads=threads)
    good = np.zeros(len(i), dtype=bool)
    for row, (a, b) in enumerate(zip(i.tolist(), j.tolist(), strict=True)):
        good[row] = not dedup([texts[a], texts[b]], k=most, verify=verify, threads=1).keep[1]
    return keyed(i[good], j[good]), distances[good]


def keyed(i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Pairs as one number each, i << 32 | j."""
    return i << 32 | j


def stood_for(n: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """bool[n]: the rows that go when each goes for an earlier kept row that it makes a pair with.

    i < j, sorted by i and then j.
    """
    gone = np.zeros(n, dtype=bool)
    for a, b in zip(i.tolist(), j.tolist(), strict=True):
        if not gone[a]:  # all pairs that could drop a came before
            gone[b] = True
    return gone


def _judged(
    corpus: Corpus,
    tool: str,
    version: str | None,
    k: int,
    pairs: np.ndarray,
    gone: np.ndarray,
    featureless: np.ndarray,
) -> Quality:
    right = int(np.isin(pairs, corpus.truth, assume_unique=True).sum())
    planted_precision = planted_recall = None
    if corpus.planted is not None:
        hit = int((gone & corpus.planted).sum())
        planted_precision = hit / gone.sum() if gone.any() else None
        planted_recall = hit / int(corpus.planted.sum())
    without = int((featureless[pairs >> 32] | featureless[pairs & 0xFFFFFFFF]).sum())
    precision = right / len(pairs) if len(pairs) else None
    recall = right / len(corpus.truth)
    return Quality(
        corpus.name, tool, version, k, len(pairs), precision, recall, planted_precision, planted_recall, without
    )


def quality_table(rows: Sequence[Quality]) -> str:
    """Aligned text: pairs against exact Jaccard >= 0.8, dropped rows against those planted."""
    cells = [("texts", "k", "tool", "pairs", "precision", "recall", "planted: precision", "recall", "no features")]
    for row in sorted(rows, key=lambda row: (row.corpus != "miniature", row.k)):
        shares = [_percent(x) for x in (row.precision, row.recall, row.planted_precision, row.planted_recall)]
        cells.append((row.corpus, str(row.k), row.tool, f"{row.pairs:,}", *shares, f"{row.featureless:,}"))
    return f"{aligned(cells)}\n{PRECISION_NOTE}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def quality_results(rows: Sequence[Quality]) -> Iterator[Result]:
    """The same figures as rows of the last line: `ours` with verification, `theirs` the other tool's."""
    ours = {(row.corpus, row.k): row for row in rows if row.tool == OURS}
    measures = {
        "precision": "pairs against exact Jaccard >= 0.8",
        "recall": "pairs against exact Jaccard >= 0.8",
        "planted_precision": "dropped rows against planted near-duplicates",
        "planted_recall": "dropped rows against planted near-duplicates",
        "featureless": "pairs with an empty feature set",
    }
    for row in rows:
        for measure, of in measures.items():
            mine, theirs = getattr(ours[row.corpus, row.k], measure), getattr(row, measure)
            if mine is None or theirs is None:
                continue
            name = measure.removeprefix("planted_")
            unit = "pairs" if name == "featureless" else name
            case = f"quality, {row.corpus}, k={row.k}, {of}"
            other = None if row.tool == OURS else theirs
            peer = None if row.tool == OURS else row.tool
            yield Result(group="quality", case=case, peer=peer, version=row.version, ours=mine, theirs=other, unit=unit)
