"""Water-filling gives exactly N rows, as evenly as they can be, whatever the order of the rows."""

import itertools

import numpy as np
import pytest

from slmfast.sampling import balanced, drawn, entropy, gini, seeded_hashes, smallest, water_fill


def fill_one_by_one(counts, target):
    """The definition by hand: pour row by row into the label that has least, the largest label first among equals."""
    quota = [0] * len(counts)
    for _ in range(min(target, sum(counts))):
        open_labels = [i for i, count in enumerate(counts) if quota[i] < count]
        level = min(quota[i] for i in open_labels)
        chosen = max((i for i in open_labels if quota[i] == level), key=lambda i: (counts[i], -i))
        quota[chosen] += 1
    return quota


@pytest.mark.parametrize("seed", range(30))
def test_water_fill_equals_pouring(seed):
    random = np.random.default_rng(seed)
    counts = random.integers(0, 12, size=random.integers(1, 9))
    target = int(random.integers(0, counts.sum() + 5))
    assert water_fill(counts, target).tolist() == fill_one_by_one(counts.tolist(), target)


@pytest.mark.parametrize("seed", range(40))
def test_water_fill_is_as_even_as_any_choice(seed):
    """Against all possible quotas: the sum is exact, and no choice of that sum has a smaller sum of squares."""
    random = np.random.default_rng(100 + seed)
    counts = random.integers(0, 7, size=random.integers(1, 6))
    target = int(random.integers(0, counts.sum() + 3))
    total = min(target, int(counts.sum()))
    possible = [q for q in itertools.product(*(range(count + 1) for count in counts)) if sum(q) == total]
    quota = water_fill(counts, target)
    assert tuple(quota.tolist()) in possible
    assert (quota**2).sum() == min(sum(n * n for n in q) for q in possible)


@pytest.mark.parametrize("seed", range(20))
def test_water_fill_is_exact_at_full_size(seed):
    """Thousands of labels: exactly N, and whoever could still give stands at the top, or one row below it."""
    random = np.random.default_rng(seed)
    counts = (random.pareto(0.7, size=5000) * 3).astype(np.int64)
    target = int(random.integers(1, counts.sum()))
    quota = water_fill(counts, target)
    assert quota.sum() == target and (quota <= counts).all() and (quota >= 0).all()
    assert (quota[quota < counts] >= quota.max() - 1).all()


def test_balanced_is_exact_and_order_free():
    random = np.random.default_rng(0)
    labels = random.choice(6, p=[0.6, 0.2, 0.1, 0.05, 0.04, 0.01], size=2000)
    labels[::50] = -1
    ids = [f"{i:x}" for i in range(2000)]
    hashes = seeded_hashes(ids, 7, "test")
    keep = balanced(labels, hashes, 300)
    assert keep.sum() == 300
    assert not keep[labels < 0].any()
    order = random.permutation(2000)
    assert (balanced(labels[order], hashes[order], 300) == keep[order]).all()
    for label in range(6):
        chosen, left = hashes[keep & (labels == label)], hashes[~keep & (labels == label)]
        assert len(left) == 0 or chosen.max() < left.min()


@pytest.mark.parametrize("choose", [balanced, drawn])
def test_no_rows(choose):
    assert choose(np.array([-1, -1]), np.array([1, 2], np.uint64), 5).tolist() == [False, False]
    assert choose(np.zeros(0, np.int64), np.zeros(0, np.uint64), 5).tolist() == []


def test_drawn_is_even_on_average_and_order_free():
    labels = np.repeat(np.arange(5), [8000, 4000, 3000, 900, 100])
    labels[::100] = -1
    sizes = np.bincount(labels[labels >= 0])
    hashes = seeded_hashes((f"{i:x}" for i in range(len(labels))), 7, "test")
    keep = drawn(labels, hashes, 7000)
    counts = np.bincount(labels[keep], minlength=5)
    assert counts[3:].tolist() == sizes[3:].tolist(), "labels under the cap keep all they have"
    expected = (7000 - sizes[3:].sum()) / 3
    spread = np.sqrt(expected * (1 - expected / sizes[:3]))
    assert (np.abs(counts[:3] - expected) < 4 * spread).all()
    assert not keep[labels < 0].any() and keep.sum() != 7000
    order = np.random.default_rng(0).permutation(len(labels))
    assert (drawn(labels[order], hashes[order], 7000) == keep[order]).all()
    assert (drawn(labels, hashes, 10**6) == (labels >= 0)).all()


def test_smallest_takes_the_smallest():
    hashes = np.array([5, 1, 4, 1], np.uint64)
    assert smallest(hashes, 2).tolist() == [False, True, False, True]
    assert smallest(hashes, 9).all()


def test_hashes_differ_by_seed_and_purpose():
    ids = ["a", "b"]
    assert (seeded_hashes(ids, 0, "x") == seeded_hashes(ids, 0, "x")).all()
    assert (seeded_hashes(ids, 0, "x") != seeded_hashes(ids, 1, "x")).all()
    assert (seeded_hashes(ids, 0, "x") != seeded_hashes(ids, 0, "y")).all()


def test_entropy_and_gini():
    assert entropy(np.array([1, 1, 1, 1])) == pytest.approx(2)
    assert entropy(np.array([4, 0])) == 0
    assert gini(np.array([3, 3, 3])) == pytest.approx(0)
    counts = np.array([1, 2, 9])
    by_definition = np.abs(counts[:, None] - counts[None]).sum() / (2 * 9 * counts.mean())
    assert gini(counts) == pytest.approx(by_definition)
