"""The truth that recall is measured against: all pairs of texts whose sets of character 3-grams are alike enough.

Exact, and independent of the native module: Python normalises, numpy cuts the grams, an inverted index over the rarest
grams of each text gives the candidates (prefix filter: Bayardo, Ma and Srikant, 2007), and each one is counted out.
"""

from collections.abc import Sequence

import numpy as np
from numba import njit

from slmfast.arrow_texts import normalise

GRAM = 3
ROUNDING = 1e-9  # keeps a bound from cutting off what equals it


def jaccard_pairs(texts: Sequence[str], least: float) -> tuple[np.ndarray, np.ndarray]:
    """All pairs i < j with Jaccard similarity of at least `least` (above 0), sorted by i and then j.

    A text of fewer than 3 code points is one gram; an empty one has none and is in no pair.
    """
    rows, grams = gram_sets(texts)
    starts = np.searchsorted(rows, np.arange(len(texts) + 1))
    pairs = np.array(_pairs(grams, starts, *_postings(rows, grams, starts, least), least), dtype=np.int64)
    pairs.sort()
    return pairs >> 32, pairs & 0xFFFFFFFF


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


def _postings(
    rows: np.ndarray, grams: np.ndarray, starts: np.ndarray, least: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """An inverted index over each text's rarest grams.

    Two sets with similarity s share one of the first size - ceil(s size) + 1 grams of either.

    Returns:
        (gram, row, places, begins): gram and row of each posting, by gram, the smaller sets first; row r's own postings
        stand at places[begins[r]:begins[r + 1]].
    """
    sizes = np.diff(starts)
    prefix = sizes - np.ceil(least * sizes - ROUNDING).astype(np.int64) + 1
    early = np.arange(len(rows)) - starts[rows] < prefix[rows]
    gram, row = grams[early], rows[early]
    order = np.lexsort((row, sizes[row], gram))
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    return gram[order], row[order], places, np.searchsorted(row, np.arange(len(starts)))


@njit
def _pairs(
    grams: np.ndarray,
    starts: np.ndarray,
    posting_gram: np.ndarray,
    posting_row: np.ndarray,
    places: np.ndarray,
    begins: np.ndarray,
    least: float,
) -> list[int]:
    """Every row against the smaller sets that stand before it under one of its grams, each other row once."""
    found = [np.int64(0) for _ in range(0)]
    seen = np.full(len(starts), -1, dtype=np.int64)
    for row in range(len(starts) - 1):
        size = starts[row + 1] - starts[row]
        for at in places[begins[row] : begins[row + 1]]:
            before = at - 1
            while before >= 0 and posting_gram[before] == posting_gram[at]:
                other = posting_row[before]
                other_size = starts[other + 1] - starts[other]
                if other_size < least * size - ROUNDING:
                    break  # sizes ascend within a gram: those before are smaller still
                before -= 1
                if seen[other] == row:
                    continue
                seen[other] = row
                both = _common(grams, starts, row, other, least / (1 + least) * (size + other_size) - ROUNDING)
                if both / (size + other_size - both) >= least:
                    found.append(min(row, other) << 32 | max(row, other))
    return found


@njit
def _common(grams: np.ndarray, starts: np.ndarray, a: int, b: int, needed: float) -> int:
    """How many grams two rows share; less than that where it turns out that they are fewer than `needed`."""
    both = 0
    x, y = starts[a], starts[b]
    end_x, end_y = starts[a + 1], starts[b + 1]
    while x < end_x and y < end_y and both + min(end_x - x, end_y - y) >= needed:
        if grams[x] == grams[y]:
            both += 1
            x += 1
            y += 1
        elif grams[x] < grams[y]:
            x += 1
        else:
            y += 1
    return both
