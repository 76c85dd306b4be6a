"""How groups become rows and batches: nothing lost, nothing cut, and the mask is the definition's."""

import random

import pytest

from slmfast.scoring.packing import Group, collate, make_batches, make_rows


@pytest.fixture
def groups():
    rng = random.Random(3)

    def tokens(most):
        return [rng.randrange(1, 50) for _ in range(rng.randint(1, most))]

    return [Group(tokens(20), [tokens(12) for _ in range(rng.randint(1, 5))]) for _ in range(40)]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [1, 30, 90, 10_000])
def test_every_continuation_is_predicted_once_from_the_right_tokens(groups, share, budget):
    found = {}
    batches = make_batches(make_rows(groups, share=share, row_tokens=budget), budget)
    for rows in batches:
        longest = max(map(len, rows))
        assert len(rows) * longest <= budget or len(rows) == 1
        batch = collate(rows)
        assert batch.input_ids.shape == (len(rows), longest)
        mask = batch.mask()
        for owner, owned in enumerate(batch.continuations):
            mine = batch.owners == owner
            row, last = batch.rows[mine][0], batch.positions[mine][-1]
            if mask is None:
                seen = list(range(last + 1))
            else:
                seen = mask[row, 0, last].nonzero().ravel().tolist()
            context = batch.input_ids[row, seen].tolist()
            assert owned not in found
            found[owned] = context, batch.targets[mine].tolist()
            assert batch.position_ids[row, seen].tolist() == list(range(len(seen)))
    assert found == {
        (g, c): ([*group.prefix, *continuation[:-1]], list(continuation))
        for g, group in enumerate(groups)
        for c, continuation in enumerate(group.continuations)
    }


def test_sharing_computes_a_prefix_once(groups):
    def computed(share):
        return sum(map(len, make_rows(groups, share=share, row_tokens=10_000)))

    saved = sum(len(group.prefix) * (len(group.continuations) - 1) for group in groups)
    assert computed(False) - computed(True) == saved > 0


def test_no_query_is_without_a_key(groups):
    """A row of the mask that is all False gives NaN in attention, padding included."""
    for rows in make_batches(make_rows(groups, share=True, row_tokens=200), 200):
        mask = collate(rows).mask()
        if mask is not None:
            assert mask.any(-1).all()


def test_the_order_of_the_groups_does_not_change_a_batch(groups):
    def tensors(order):
        rows = make_rows([groups[i] for i in order], share=True, row_tokens=100)
        return [collate(batch).input_ids.tolist() for batch in make_batches(rows, 100)]

    assert tensors(range(40)) == tensors(random.Random(5).sample(range(40), 40))
