"""The truth that recall is measured against: all pairs of texts whose sets of character 3-grams are alike enough.

Exact, and independent of the native module: Python normalises, numpy cuts the grams, an inverted index over the rarest
grams of each text gives the candidates (prefix filter: Bayardo, Ma and Srikant, 2007), and each one is counted out.
"""

from collections.abc import Sequence

import numpy as np
from numba import njit

from slmfast.arrow_texts import normalise

GRAM = 3


def jaccard_pairs(texts: Sequence[str], least: float) -> tuple[np.ndarray, np.ndarray]:
    """All pairs i < j with Jaccard similarity of at least `least` (above 0), sorted by i and then j.

    A text of fewer than 3 code points is one gram; an empty one has none and is in no pair.
    """
    rows, grams = gram_sets(texts)
    starts = np.searchsorted(rows, np.arange(len(texts) + 1))
    i, j = _candidates(rows, grams, starts, least)
    both = _common(grams, starts, i, j)
    sizes = np.diff(starts)
    good = both >= least * (sizes[i] + sizes[j] - both)
    return i[good], j[good]


def gram_sets(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(row int64[m], gram int64[m]): the set of each text, rows ascending, each row's grams ascending.

    Grams are numbered by how many texts hold them, the rarest first.
    """
    normal = [normalise(text) for text in texts]
    lengths = np.array([len(text) for text in normal], dtype=np.int64)
    points = np.frombuffer("".join(normal).encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    points = np.concatenate([points, np.zeros(GRAM, np.uint64)])
    row_of = np.repeat(np.arange(len(normal)), lengths)
    place = np.arange(len(row_of)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    left = lengths[row_of] - place  # code points from here to the text's end
    begins = np.flatnonzero((left >= GRAM) | (place == 0))
    packed = np.zeros(len(begins), dtype=np.uint64)
    for offset in range(GRAM):
        inside = left[begins] > offset
        packed |= np.where(inside, points[begins + offset], 0).astype(np.uint64) << np.uint64(21 * offset)
    _, number = np.unique(packed, return_inverse=True)
    keys = np.unique(row_of[begins] * (number.max(initial=0) + 1) + number)
    rows, number = np.divmod(keys, number.max(initial=0) + 1)
    rank = np.empty(number.max(initial=-1) + 1, dtype=np.int64)
    rank[np.argsort(np.bincount(number, minlength=len(rank)), kind="stable")] = np.arange(len(rank))
    number = rank[number]
    order = np.lexsort((number, rows))
    return rows[order], number[order]


def _candidates(rows: np.ndarray, grams: np.ndarray, starts: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs i < j that share a gram among their rarest and whose sizes allow the similarity.

    Two sets with similarity s share a gram among the first size - ceil(s size) + 1 of either.
    """
    sizes = np.diff(starts)
    prefix = sizes - np.ceil(least * sizes - 1e-9).astype(np.int64) + 1
    early = np.arange(len(rows)) - starts[rows] < prefix[rows]
    posting_gram, posting_row = grams[early], rows[early]
    order = np.lexsort((posting_row, sizes[posting_row], posting_gram))
    posting_gram, posting_row = posting_gram[order], posting_row[order]
    first = np.arange(len(posting_row))
    found = [np.zeros(0, dtype=np.int64)]
    step = 0
    while len(first):  # sizes ascend within a gram: where one step is too far, so is the next
        step += 1
        first = first[first + step < len(posting_row)]
        second = first + step
        near = posting_gram[first] == posting_gram[second]
        near &= sizes[posting_row[first]] >= least * sizes[posting_row[second]] - 1e-9
        first = first[near]
        a, b = posting_row[first], posting_row[first + step]
        found.append(np.minimum(a, b) << 32 | np.maximum(a, b))
        if len(found) > 64:
            found = [np.unique(np.concatenate(found))]
    keys = np.unique(np.concatenate(found))
    return keys >> 32, keys & 0xFFFFFFFF


@njit(cache=False)
def _common(grams: np.ndarray, starts: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    both = np.zeros(len(i), dtype=np.int64)
    for pair in range(len(i)):
        x, y = starts[i[pair]], starts[j[pair]]
        while x < starts[i[pair] + 1] and y < starts[j[pair] + 1]:
            if grams[x] == grams[y]:
                both[pair] += 1
                x += 1
                y += 1
            elif grams[x] < grams[y]:
                x += 1
            else:
                y += 1
    return both
