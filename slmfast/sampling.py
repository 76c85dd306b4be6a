"""Seeded choices that depend on the rows themselves and never on their order or number of threads."""

import hashlib
from collections.abc import Iterable

import numpy as np


def seeded_hashes(ids: Iterable[str], seed: int, purpose: str) -> np.ndarray:
    """A uniform 64-bit number for every id, uint64 [n]; another purpose gives an unrelated order of the same ids."""
    key = hashlib.blake2b(f"{purpose} {seed}".encode(), digest_size=32).digest()
    data = b"".join(hashlib.blake2b(i.encode(), digest_size=8, key=key).digest() for i in ids)
    return np.frombuffer(data, dtype="<u8")


def smallest(hashes: np.ndarray, count: int) -> np.ndarray:
    """A mask of the `count` smallest hashes, bool [n]; equal hashes are taken in row order."""
    keep = np.zeros(len(hashes), dtype=bool)
    keep[np.argsort(hashes, kind="stable")[:count]] = True
    return keep


def water_fill(counts: np.ndarray, target: int) -> np.ndarray:
    """How many rows each label may keep, int64 [labels], so that the kept rows are as even as they can be.

    Finds the cap c with sum(min(counts, c)) = target; what a whole c leaves over goes one each to the largest labels
    (the first among equals), so that the sum is exactly min(target, sum(counts)).
    """
    counts = np.asarray(counts, dtype=np.int64)
    target = min(int(target), int(counts.sum()))
    quota = np.minimum(counts, _whole_cap(counts, target))
    left = target - int(quota.sum())
    order = np.argsort(-counts, kind="stable")[:left]
    quota[order] += 1
    return quota


def _whole_cap(counts: np.ndarray, target: int) -> int:
    """The largest whole cap c with sum(min(counts, c)) <= target, at most the largest count."""
    low, high = 0, int(counts.max(initial=0))
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(counts, middle).sum() <= target:
            low = middle
        else:
            high = middle - 1
    return low


def drawn(labels: np.ndarray, hashes: np.ndarray, target: int) -> np.ndarray:
    """A mask of about `target` rows, each accepted by itself, bool [n]: the random twin of `balanced`.

    A row of a label with n rows is accepted with probability min(1, c / n), for the c at which `target` are expected.
    """
    keep = np.zeros(len(labels), dtype=bool)
    rows = np.flatnonzero(labels >= 0)
    counts = np.bincount(labels[rows])
    cap = float(_whole_cap(counts, target))
    if open_labels := int((counts > cap).sum()):
        cap += (target - np.minimum(counts, cap).sum()) / open_labels
    share = cap / np.maximum(counts, 1)
    uniform = (hashes[rows] >> np.uint64(11)) * 2.0**-53  # in [0, 1): a share of 1 takes all
    keep[rows] = uniform < share[labels[rows]]
    return keep


def balanced(labels: np.ndarray, hashes: np.ndarray, target: int) -> np.ndarray:
    """A mask of `target` rows, water-filled over labels: of each label the smallest hashes, bool [n].

    `labels` are label codes, int [n], from 0; a negative code takes no part.
    """
    keep = np.zeros(len(labels), dtype=bool)
    rows = np.flatnonzero(labels >= 0)
    if len(rows) == 0:
        return keep
    rows = rows[np.lexsort((rows, hashes[rows], labels[rows]))]
    counts = np.bincount(labels[rows])
    quota = water_fill(counts, target)
    starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
    rank = np.arange(len(rows)) - starts[labels[rows]]
    keep[rows[rank < quota[labels[rows]]]] = True
    return keep


def entropy(counts: np.ndarray) -> float:
    """Shannon entropy in bits of a distribution given by counts."""
    p = np.asarray(counts, dtype=np.float64)
    p = p[p > 0] / p.sum()
    return float(-(p * np.log2(p)).sum()) if len(p) else 0.0


def gini(counts: np.ndarray) -> float:
    """The Gini coefficient of counts: 0 where all are equal, towards 1 where one has everything."""
    x = np.sort(np.asarray(counts, dtype=np.float64))
    if len(x) == 0 or x.sum() == 0:
        return 0.0
    n = len(x)
    return float((2 * (np.arange(1, n + 1) * x).sum() / (n * x.sum())) - (n + 1) / n)
