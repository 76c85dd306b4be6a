"""100,000 rows against brute force over all five thousand million pairs, for every k, on five distributions.

One pass over a distribution lists the pairs within 8, and with them what near_pairs must give for every k, and what
clustering must give in both modes for three of them. Sizes and free bits are such that these lists fit in memory. Of
all-equal rows they cannot: 100,000 of them are 5,000 million pairs, 85 GB in near_pairs' answer. Those are clustered at
100,000 rows, where no pair need be held, and joined at 3,000.
"""

from typing import NamedTuple

import numba
import numpy as np
import pyarrow as pa
import pytest

from slmfast import _native, near_pairs
from slmfast.arrow_texts import native_texts

ROWS = 100_000
MOST_PAIRS = 40_000_000
TILE = 1024
FULL = 3  # the native RowState of a row with enough grams

pytestmark = pytest.mark.slow


class Pairs(NamedTuple):
    """i < j, sorted by i and then j, with their distances."""

    i: np.ndarray
    j: np.ndarray
    distance: np.ndarray

    def within(self, k: int) -> "Pairs":
        near = self.distance <= k
        return Pairs(*(column[near] for column in self))


@numba.njit
def popcount(x: np.uint64) -> np.uint64:
    """Bits set, by sums over ever wider fields."""
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * np.uint64(0x0101010101010101)) >> np.uint64(56)


@numba.njit
def list_pairs(values, k, i, j, distance):
    """Writes every pair within k; returns how many there are, also where they outgrow the arrays."""
    count = 0
    tile = np.empty(TILE, np.uint64)
    for a in range(len(values)):
        for begin in range(a + 1, len(values), TILE):
            size = min(TILE, len(values) - begin)
            least = np.uint64(64)
            for b in range(size):
                tile[b] = popcount(values[a] ^ values[begin + b])
                least = min(least, tile[b])
            if least > k:
                continue
            for b in range(size):
                if tile[b] <= k:
                    if count < len(i):
                        i[count], j[count], distance[count] = a, begin + b, tile[b]
                    count += 1
    return count


@numba.njit
def greedy_stand_ins(n, i, j):
    """The earliest kept row within reach of each row. Pairs come by ascending i, so i's own fate is known in time."""
    stand_in = np.arange(n)
    for pair in range(len(i)):
        if stand_in[i[pair]] == i[pair] and stand_in[j[pair]] == j[pair]:
            stand_in[j[pair]] = i[pair]
    return stand_in


@numba.njit
def components(n, i, j):
    """The earliest row of each row's connected component."""
    root = np.arange(n)
    for pair in range(len(i)):
        a, b = i[pair], j[pair]
        while root[a] != a:
            a = root[a]
        while root[b] != b:
            b = root[b]
        root[max(a, b)] = min(a, b)
    for row in range(n):  # roots are earlier rows, so theirs are final
        root[row] = root[root[row]]
    return root


def uniform(rng: np.random.Generator, n: int) -> np.ndarray:
    """Nearly no pair but the planted ones: every twentieth row lies at distance 0 to 9 from an earlier one."""
    values = rng.integers(0, 2**64, n, dtype=np.uint64)
    for row in range(20, n, 20):
        flips = rng.choice(64, row // 20 % 10, replace=False).astype(np.uint64)
        values[row] = values[rng.integers(0, row)] ^ np.bitwise_or.reduce(np.uint64(1) << flips, initial=np.uint64(0))
    return values


def clustered(rng: np.random.Generator, n: int) -> np.ndarray:
    """About twenty rows to a centre, up to six flipped bits from it."""
    values = rng.integers(0, 2**64, n // 20, dtype=np.uint64)[rng.integers(0, n // 20, n)]
    for _ in range(6):
        values ^= (rng.random(n) < 0.5).astype(np.uint64) << rng.integers(0, 64, n, dtype=np.uint64)
    return values


def low_entropy(rng: np.random.Generator, n: int) -> np.ndarray:
    """Half of the bits are the same in all rows."""
    free = np.uint64(0xF0F1_0FF1_81FF_30F5)
    return rng.integers(0, 2**64, n, dtype=np.uint64) & free | np.uint64(0x0A0A_A00A_5200_CC02) & ~free


def adversarial_buckets(rng: np.random.Generator, n: int) -> np.ndarray:
    """Whatever blocks a join cuts, many rows agree on most of them; and a ball of 1 % about one template."""
    values = rng.integers(0, 2**64, n, dtype=np.uint64)
    kind = rng.integers(0, 5, n)
    masks = (0xFFFF_FFFF, 0xFFFF_FFFF << 32, 0x0000_FFFF_FFFF_0000, 0x5555_5555_5555_5555, 0xFF0F_00FF_0F00_00FF)
    for number, free in enumerate(masks):
        values[kind == number] &= np.uint64(free)
    template = np.flatnonzero(rng.random(n) < 0.01)
    values[template] = values[0]
    for _ in range(8):
        values[template] ^= np.uint64(1) << rng.integers(0, 64, len(template), dtype=np.uint64)
    return values


DISTRIBUTIONS = [uniform, clustered, low_entropy, adversarial_buckets]


def brute_force(values: np.ndarray) -> Pairs:
    pairs = Pairs(np.empty(MOST_PAIRS, np.int32), np.empty(MOST_PAIRS, np.int32), np.empty(MOST_PAIRS, np.uint8))
    count = list_pairs(values, np.uint64(8), *pairs)
    assert count <= MOST_PAIRS
    return Pairs(*(column[:count] for column in pairs))


def cluster(values: np.ndarray, k: int, connected: bool) -> tuple[np.ndarray, np.ndarray]:
    """Plain SimHash clusters of given fingerprints; the texts are not looked at."""
    texts = native_texts(pa.chunked_array([pa.array(["x"] * len(values))]))
    nothing = native_texts(pa.chunked_array([pa.array([], pa.string())]))
    states = np.full(len(values), FULL, dtype=np.uint8)
    settings = {"k": k, "components": connected, "verify": None, "ngram": 3, "threads": 0}
    return _native.cluster(texts, nothing, np.empty(0, np.int64), values, states, **settings)


def test_the_brute_force_agrees_with_numpy():
    values = clustered(np.random.default_rng(1), 3000)
    distance = np.bitwise_count(values[:, None] ^ values[None])
    i, j = np.nonzero(np.triu(distance <= 8, 1))
    assert all(map(np.array_equal, brute_force(values), (i, j, distance[i, j])))


@pytest.mark.parametrize("draw", DISTRIBUTIONS, ids=lambda draw: draw.__name__)
def test_a_hundred_thousand_rows(draw):
    values = draw(np.random.default_rng(2), ROWS)
    values[-200:] = values[:200]  # distance 0 is rare in most of them
    every = brute_force(values)
    assert np.bincount(every.distance, minlength=9).all(), "pairs at every distance, so that every k is put to the test"
    for k in range(9):
        expected = every.within(k)
        found = near_pairs(values, k)
        assert [column.dtype for column in found] == [np.int64, np.int64, np.uint8]
        assert all(map(np.array_equal, found, expected)), k
        for connected, oracle in ((False, greedy_stand_ins), (True, components)) if k in (0, 3, 6) else ():
            stand_in, distance = cluster(values, k, connected)
            assert np.array_equal(stand_in, oracle(ROWS, expected.i, expected.j)), (k, connected)
            assert np.array_equal(distance, np.bitwise_count(values ^ values[stand_in]))


@pytest.mark.parametrize("value", [0, 0x0123456789ABCDEF])
def test_all_equal(value):
    n = 3000
    i, j = np.triu_indices(n, 1)
    values = np.full(ROWS, value, dtype=np.uint64)
    for k in range(9):
        found = near_pairs(values[:n], k)
        assert np.array_equal(found[0], i) and np.array_equal(found[1], j) and not found[2].any()
        for connected in (False, True):
            stand_in, distance = cluster(values, k, connected)
            assert not stand_in.any() and not distance.any()


def test_twelve_free_bits_at_a_hundred_thousand_rows():
    """4,096 values, each some 24 times: the pairs are too many to list, their clusters are few."""
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2, (ROWS, 12), dtype=np.uint64)
    values = np.bitwise_or.reduce(bits << np.arange(0, 60, 5, dtype=np.uint64), axis=1)
    for k in range(9):
        kept: list[int] = []
        expected = np.empty(ROWS, np.int64)
        known: dict[int, int] = {}
        for row, value in enumerate(values.tolist()):
            if value not in known:
                near = np.flatnonzero(np.bitwise_count(values[kept] ^ np.uint64(value)) <= k) if kept else []
                if not len(near):
                    kept.append(row)
                known[value] = kept[near[0]] if len(near) else row
            expected[row] = known[value]
        stand_in, distance = cluster(values, k, connected=False)
        assert np.array_equal(stand_in, expected), k
        assert np.array_equal(distance, np.bitwise_count(values ^ values[stand_in]))
