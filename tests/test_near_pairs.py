"""The join against brute force, on distributions made to break it."""

import numpy as np
import pytest

from slmfast import _native, near_pairs


def brute_force(fingerprints: np.ndarray, k: int) -> tuple[np.ndarray, ...]:
    parts = []
    for begin in range(0, len(fingerprints), 512):
        distance = np.bitwise_count(fingerprints[begin : begin + 512, None] ^ fingerprints[None, begin:])
        i, j = np.nonzero(distance <= k)
        upper = i < j
        parts.append((i[upper] + begin, j[upper] + begin, distance[i[upper], j[upper]]))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def uniform(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(0, 2**64, n, dtype=np.uint64)


def clustered(rng: np.random.Generator, n: int) -> np.ndarray:
    values = uniform(rng, n // 20)[rng.integers(0, n // 20, n)]
    for _ in range(5):
        values = values ^ (np.uint64(1) << rng.integers(0, 64, n, dtype=np.uint64)) * (rng.random(n) < 0.5)
    return values


def low_entropy(rng: np.random.Generator, n: int) -> np.ndarray:
    return uniform(rng, n) & uniform(rng, n) & uniform(rng, n) & np.uint64(0x0FF1_0FF1_00FF_70F7)


def shared_blocks(rng: np.random.Generator, n: int) -> np.ndarray:
    """Half of the rows agree on 48 bits, a quarter on other 48 bits: every block is one huge bucket."""
    values = uniform(rng, n)
    kind = rng.integers(0, 4, n)
    values[kind < 2] &= np.uint64(0xFFFF)
    values[kind == 2] |= np.uint64(0xFFFFFFFFFFFF)
    return values


def templates(rng: np.random.Generator, n: int) -> np.ndarray:
    """A dense ball: one value with up to eight flipped bits, beside uniform rows."""
    values = uniform(rng, n)
    dense = rng.random(n) < 0.1
    values[dense] = values[0]
    for _ in range(8):
        values[dense] ^= np.uint64(1) << rng.integers(0, 64, dense.sum(), dtype=np.uint64)
    return values


def families(rng: np.random.Generator, n: int, low: int = 32, flips: int = 3) -> np.ndarray:
    """Eight families that agree on all but the low bits; every second row is the one before it with flips in a byte."""
    tops = uniform(rng, 8)[rng.integers(0, 8, n // 2)] << np.uint64(low)
    values = tops | rng.integers(0, 2**low, n // 2, dtype=np.uint64)
    near = values.copy()
    for _ in range(flips):
        near ^= np.uint64(1) << rng.integers(0, 8, n // 2, dtype=np.uint64)
    return np.stack([values, near], axis=1).ravel()


DISTRIBUTIONS = [uniform, clustered, low_entropy, shared_blocks, templates, families]


def assert_equal_to_brute_force(values: np.ndarray, k: int, threads: int = 0) -> int:
    found = near_pairs(values, k, threads=threads)
    expected = brute_force(values, k)
    assert [column.dtype for column in found] == [np.int64, np.int64, np.uint8]
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours, theirs)
    return len(found[0])


@pytest.mark.parametrize("draw", DISTRIBUTIONS, ids=lambda draw: draw.__name__)
def test_twenty_thousand_rows_at_k_3(draw):
    assert_equal_to_brute_force(draw(np.random.default_rng(1), 20_000), 3)


@pytest.mark.parametrize("k", range(9))
@pytest.mark.parametrize("draw", DISTRIBUTIONS, ids=lambda draw: draw.__name__)
def test_every_k(draw, k):
    assert_equal_to_brute_force(draw(np.random.default_rng(k), 2500), k)


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize(("low", "seed"), [(26, 1), (26, 2), (28, 1), (28, 2), (30, 2)])
def test_no_bit_counts_twice_where_few_are_left_to_tell_apart(isa, low, seed, monkeypatch):
    monkeypatch.setenv("SLMFAST_ISA", isa)
    values = families(np.random.default_rng(seed), 20_000, low, flips=1)
    assert assert_equal_to_brute_force(values, 1) >= 10_000


def test_values_that_only_a_hash_confuses_end():
    """0 and 513 differ in bits that share a bucket under the hash of scattered bits: the group can't be cut there."""
    assert assert_equal_to_brute_force(np.array([0, 513] * 750, np.uint64), 0) == 2 * (750 * 749 // 2)


@pytest.mark.parametrize("isa", _native.available_isas())
def test_crowds_of_equal_fingerprints(isa, monkeypatch):
    """Two to five values a few bits apart, each hundreds of times: all that the join can cut is used up at once."""
    monkeypatch.setenv("SLMFAST_ISA", isa)
    rng = np.random.default_rng(4)
    for k in (0, 1, 2, 3, 6, 8):
        for _ in range(8):
            crowds = np.full(rng.integers(2, 6), rng.integers(0, 2**64, dtype=np.uint64))
            for _ in range(rng.integers(1, 6)):
                crowds ^= np.uint64(1) << rng.integers(0, 64, len(crowds), dtype=np.uint64)
            assert_equal_to_brute_force(crowds[rng.integers(0, len(crowds), 900)], k)


def test_rows_that_recur_at_a_stride_do_not_mislead_the_plan():
    values = uniform(np.random.default_rng(5), 1 << 14)
    values[::4] = 7
    assert_equal_to_brute_force(values, 3)


def test_clusters_give_pairs_so_that_equality_means_something():
    assert assert_equal_to_brute_force(clustered(np.random.default_rng(2), 5000), 3) > 1000


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_every_instruction_set_and_number_of_threads(isa, threads, monkeypatch):
    monkeypatch.setenv("SLMFAST_ISA", isa)
    for draw in (clustered, shared_blocks):
        for k in (0, 3, 5, 8):
            assert_equal_to_brute_force(draw(np.random.default_rng(3), 3000), k, threads)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 8, 9, 63, 64, 65, 66, 130])
def test_few_rows(n):
    rng = np.random.default_rng(n)
    for k in (0, 1, 8):
        values = rng.integers(0, 4, n, dtype=np.uint64) << np.uint64(61)
        assert_equal_to_brute_force(values, k) if n else np.testing.assert_equal(len(near_pairs(values, k)[0]), 0)


def test_all_equal_rows_give_every_pair():
    i, j, distance = near_pairs(np.full(700, 0xDEADBEEF, dtype=np.uint64), 3)
    assert len(i) == 700 * 699 // 2 and (i < j).all() and not distance.any()
    assert (np.diff(i * 700 + j) > 0).all()


def test_order_of_rows_does_not_matter():
    rng = np.random.default_rng(6)
    values = clustered(rng, 4000)
    order = rng.permutation(len(values))
    i, j, _ = near_pairs(values, 3)
    a, b, _ = near_pairs(values[order], 3)
    back = {(min(x, y), max(x, y)) for x, y in zip(order[a].tolist(), order[b].tolist(), strict=True)}
    assert back == set(zip(i.tolist(), j.tolist(), strict=True))


def test_a_strided_array_is_read_right():
    values = clustered(np.random.default_rng(7), 2000)
    assert_equal_to_brute_force(values[::2], 3)


@pytest.mark.parametrize(("k", "threads"), [(-1, 0), (9, 0), (3, -1), (3, 1000)])
def test_settings_out_of_range(k, threads):
    with pytest.raises(ValueError, match="must lie between"):
        near_pairs(np.zeros(2, dtype=np.uint64), k, threads=threads)


@pytest.mark.parametrize("setting", ["k", "threads"])
@pytest.mark.parametrize("value", [2.5, None, "3"])
def test_settings_that_are_no_whole_numbers(setting, value):
    with pytest.raises(TypeError, match=f"{setting} must be a whole number, not {value!r}"):
        near_pairs(np.zeros(2, dtype=np.uint64), **{setting: value})


def test_wrong_fingerprints():
    with pytest.raises(ValueError, match="one dimension"):
        near_pairs(np.uint64(5))
    with pytest.raises(TypeError, match="uint64, not int64"):
        near_pairs(np.zeros(2, dtype=np.int64))
    with pytest.raises(ValueError, match="one dimension"):
        near_pairs(np.zeros((2, 2), dtype=np.uint64))
