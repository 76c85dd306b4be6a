"""Paired differences against the textbook's formulas, a bootstrap written out, and how often an interval is right."""

import numpy as np
import pyarrow as pa
import pytest

from slmfast.errors import UserError
from slmfast.evaluation.paired import format_differences, paired_difference, paired_differences


def items(values, task="t", subset=None):
    rows = [{"task": task, "item": i, "value": float(v)} for i, v in enumerate(values)]
    return pa.Table.from_pylist([row | ({"subset": subset} if subset else {}) for row in rows])


def answers(n, seed, shift=0.0):
    """Two models' values, right or wrong, that go together."""
    rng = np.random.default_rng(seed)
    hardness = rng.random(n)
    return (rng.random(n) < hardness + shift).astype(float), (rng.random(n) < hardness).astype(float)


@pytest.mark.parametrize("n", [30, 1000])
def test_the_error_is_that_of_the_mean_of_differences(n):
    a, b = answers(n, 1)
    found = paired_difference(items(a), items(b), 0, samples=40_000)
    steps = a - b
    assert found.difference == pytest.approx(a.mean() - b.mean())
    assert found.n == n
    assert found.stderr == pytest.approx(steps.std(ddof=0) / n**0.5, rel=0.02)
    assert found.low < found.difference < found.high
    # smaller than that of two samples of their own
    assert found.stderr < 0.95 * ((a.var() + b.var()) / n) ** 0.5


def test_it_equals_a_bootstrap_over_indices():
    rng = np.random.default_rng(3)
    a, b = rng.random(40), rng.random(40)  # values of any kind, not only 0 and 1
    found = paired_difference(items(a), items(b), 5, samples=40_000)
    drawn = (a - b)[rng.integers(0, 40, (40_000, 40))].mean(1)
    assert found.stderr == pytest.approx(drawn.std(ddof=1), rel=0.02)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.01)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Over many draws of items with a true difference of 0: 95 % within, but for the chance of 400 draws."""
    inside = 0
    for seed in range(400):
        a, b = answers(200, seed)
        found = paired_difference(items(a), items(b), seed, samples=1000)
        inside += found.low <= 0 <= found.high
    assert 0.95 - 3 * (0.05 * 0.95 / 400) ** 0.5 <= inside / 400


def test_it_depends_on_the_seed_and_not_on_the_order():
    a, b = answers(100, 2)
    table = items(a)
    shuffled = table.take(pa.array(np.random.default_rng(0).permutation(100)))
    assert paired_difference(table, items(b), 7) == paired_difference(shuffled, items(b), 7)
    assert paired_difference(table, items(b), 7) != paired_difference(table, items(b), 8)
    there, back = paired_difference(items(a), items(b)), paired_difference(items(b), items(a))
    assert there.difference == -back.difference and there.stderr == pytest.approx(back.stderr, rel=0.05)
    assert paired_difference(items(a), items(a)) == (0.0, 0.0, 0.0, 0.0, 100)


def test_items_of_subsets_are_told_apart():
    """Two subjects number their items alike."""
    a = pa.concat_tables([items([1, 1], subset="x"), items([0, 0], subset="y")])
    b = pa.concat_tables([items([0, 0], subset="y"), items([0, 1], subset="x")])
    assert paired_difference(a, b).difference == 0.25
    assert paired_difference(a, b).n == 4


def test_other_items_are_refused():
    with pytest.raises(UserError, match="not answered the same items"):
        paired_difference(items([1, 0, 1]), items([1, 0]))
    with pytest.raises(UserError, match="no items"):
        paired_difference(items([1]).slice(1), items([1]).slice(1))


def test_every_pair_of_models_on_every_task():
    table = {
        name: pa.concat_tables([items(np.roll([1, 0, 0, 1], turn), "one"), items([turn == 2] * 3, "two")])
        for turn, name in enumerate(["base", "S1", "S2"])
    }
    rows = paired_differences(table, 0)
    pairs = [("S1", "base"), ("S2", "base"), ("S2", "S1")]
    assert [(r["task"], r["model"], r["less"]) for r in rows] == [(t, *p) for t in ("one", "two") for p in pairs]
    assert [row["difference"] for row in rows[3:]] == [0.0, 1.0, 1.0]
    lines = format_differences(rows).splitlines()
    assert len(lines) == 7 and "S2 - base" in lines[5] and "+100.0" in lines[5]
