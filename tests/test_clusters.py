"""The choice of representatives on dense sets of pairs, against the rule written out in Python."""

import random

import numpy as np
import pyarrow as pa
import pytest

from slmfast import _native
from slmfast.arrow_texts import native_texts

WORDS = [f"w{n}x" for n in range(12)]
FULL = 3  # the native RowState
ROWS = 1500


@pytest.fixture(scope="module")
def dense():
    """Texts of few words, and fingerprints of 13 varying bits, so that 1,500 rows have more than 50,000 near pairs."""
    rng = random.Random(3)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(4, 7))) for _ in range(ROWS)]
    values = np.random.default_rng(3).integers(0, 1 << 13, ROWS, np.uint64)
    return texts, values


def cluster(dense, threads, *, verify, components=False, pair_budget=0):
    texts, values = dense
    none = native_texts(pa.chunked_array([[]], pa.string()))
    return _native.cluster(
        native_texts(pa.chunked_array([texts])),
        none,
        np.empty(0, np.int64),
        values,
        np.full(ROWS, FULL, np.uint8),
        3,
        components,
        verify,
        3,
        threads,
        pair_budget,
    )


def similar_pairs(dense, verify):
    texts, values = dense
    near = np.bitwise_count(values[:, None] ^ values[None, :]) <= 3
    assert np.count_nonzero(near) > 2 * 50_000
    grams = [{text[i : i + 3] for i in range(len(text) - 2)} for text in texts]

    def verified(a, b):
        if verify is None:
            return True
        both = len(grams[a] & grams[b])
        return both / (len(grams[a]) + len(grams[b]) - both) >= verify

    return {
        row: [other for other in np.flatnonzero(near[row, :row]).tolist() if verified(row, other)]
        for row in range(ROWS)
    }


@pytest.mark.parametrize("verify", [None, 0.5, 0.8])
@pytest.mark.parametrize("pair_budget", [0, 1000])
def test_the_earliest_kept_row_stands_for_a_row(dense, verify, pair_budget):
    kept, expected = set(), []
    for row, earlier in similar_pairs(dense, verify).items():
        stand_in = next((other for other in earlier if other in kept), row)
        expected.append(stand_in)
        if stand_in == row:
            kept.add(row)
    assert len(kept) < ROWS
    for threads in (1, 2, 7):
        places, distance = cluster(dense, threads, verify=verify, pair_budget=pair_budget)
        assert places.tolist() == expected
        assert distance.tolist() == np.bitwise_count(dense[1] ^ dense[1][expected]).tolist()


@pytest.mark.parametrize("verify", [None, 0.5, 0.8])
def test_rows_that_a_chain_connects_are_one_component(dense, verify):
    root = list(range(ROWS))
    for row, earlier in similar_pairs(dense, verify).items():
        joined = {root[row], *(root[other] for other in earlier)}
        root = [min(joined) if r in joined else r for r in root]
    for threads in (1, 2, 7):
        assert cluster(dense, threads, verify=verify, components=True)[0].tolist() == root
