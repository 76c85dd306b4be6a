"""How groups become packs: nothing lost, nothing cut, every token seen by the right ones, and beginnings shared."""

import random

import numpy as np
import pytest

from slmfast.scoring import best_fit, packing
from slmfast.scoring.attention import Layout
from slmfast.scoring.best_fit import FEW, best_fit_decreasing
from slmfast.scoring.packing import KEYS_A_TOKEN, Group, make_packs, make_rows
from slmfast.scoring.prefix_tree import LEAST_SHARED, prefix_tree


def tokens(rng, most, least=1):
    return [rng.randrange(1, 50) for _ in range(rng.randint(least, most))]


@pytest.fixture
def groups():
    """Prompts of which some begin alike, some are equal, and one is the beginning of others."""
    rng = random.Random(3)
    preamble = tokens(rng, 12, 12)
    stems = [preamble + tokens(rng, 30, 10) for _ in range(4)]
    prompts = [tokens(rng, 20) for _ in range(10)] + [rng.choice(stems) + tokens(rng, 20) for _ in range(24)]
    prompts += [prompts[-1], stems[0], stems[0]]
    return [Group(prompt, [tokens(rng, 12) for _ in range(rng.randint(1, 5))]) for prompt in prompts]


def expected(groups):
    return {
        (g, c): ([*group.prefix, *continuation[:-1]], list(continuation))
        for g, group in enumerate(groups)
        for c, continuation in enumerate(group.continuations)
    }


def found(packs):
    """What each continuation's last input token sees, in order, and the continuation's targets."""
    seen = {}
    for pack in packs:
        ids = np.concatenate(pack.tokens)
        stretches = zip(pack.starts, pack.tokens, strict=True)
        positions = np.concatenate([np.arange(start, start + len(t)) for start, t in stretches])
        layout = Layout(pack.segments)
        holders = np.concatenate([np.full(len(t), i) for i, t in enumerate(pack.tokens)])
        for owner, sources, targets in zip(pack.continuations, pack.sources, pack.targets, strict=True):
            last = sources[-1]
            path = [place for begin, end in layout.paths[holders[last]] for place in range(begin, end) if place <= last]
            assert owner not in seen
            assert positions[path].tolist() == list(range(len(path)))
            assert sources.tolist() == path[len(path) - len(targets) :], "each target is predicted by the token before"
            seen[owner] = ids[path].tolist(), targets.tolist()
    return seen


@pytest.mark.parametrize("budget", [1, 30, 90, 10_000])
def test_every_continuation_is_predicted_once_from_the_right_tokens(groups, budget):
    packs = list(make_packs(groups, budget))
    assert found(packs) == expected(groups)
    for pack in packs:
        # One of a single token is no input and may go along.
        assert len(pack) <= budget or sum(len(targets) > 1 for targets in pack.targets) <= 1


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_rows_hold_one_sequence_each(groups, budget):
    batches = list(make_rows(groups, budget))
    assert found([pack for batch in batches for pack in batch]) == expected(groups)
    for batch in batches:
        assert len(batch) * max(map(len, batch)) <= budget or len(batch) == 1
        assert all(len(pack.continuations) == 1 for pack in batch)


def test_what_prompts_begin_with_is_computed_once(groups):
    (pack,) = make_packs(groups, 10_000)
    prompts = {tuple(group.prefix) for group in groups}
    inputs = sum(len(c) - 1 for group in groups for c in group.continuations)
    # The nodes of an uncompressed trie; what is shared by fewer than LEAST_SHARED tokens may be computed again.
    trie = {prompt[:length] for prompt in prompts for length in range(1, len(prompt) + 1)}
    assert len(trie) <= len(pack) - inputs <= len(trie) + LEAST_SHARED * len(prompts)
    assert len(pack) - inputs < sum(map(len, prompts)) / 1.5, "these prompts have much in common"


def test_the_order_of_the_groups_does_not_change_a_pack(groups):
    def ids(order):
        packs = make_packs([groups[i] for i in order], 100)
        return [(np.concatenate(pack.tokens).tolist(), pack.segments) for pack in packs]

    assert ids(range(37)) == ids(random.Random(5).sample(range(37), 37))


def test_groups_without_continuations_need_no_pack():
    assert list(make_packs([], 10)) == list(make_packs([Group([1, 2], [])], 10)) == []
    (pack,) = make_packs([Group([1, 2], []), Group([1], [[4]])], 10)
    assert found([pack]) == {(1, 0): ([1], [4])}


@pytest.mark.parametrize("length", [60, 63, 64, 65, 200])
def test_choices_of_one_token_are_read_off_one_prompt(length):
    """However long the prompt is beside the budget, it is computed once for all of them."""
    (pack,) = make_packs([Group(list(range(length)), [[token] for token in range(40)])], 64)
    assert len(pack) == length and len(pack.continuations) == 40


def test_a_chain_of_beginnings_is_no_recursion():
    """Each prompt begins the next one, deeper than Python would recurse."""
    whole = list(np.random.default_rng(0).integers(0, 1000, 20_000))
    groups = [Group(whole[: 10 * (i + 1)], [[1, 2]]) for i in range(2000)]
    (pack,) = make_packs(groups, 10**9)
    assert len(pack) == 20_000 + 2000
    assert max(map(len, (path for path in Layout(pack.segments).paths))) <= 2000


def keys_of(pack):
    """How many keys all segments see together, by walking up from each."""
    seen = 0
    for segment in pack.segments:
        seen += segment.end - segment.begin
        while segment.parent >= 0:
            segment = pack.segments[segment.parent]
            seen += segment.end - segment.begin
    return seen


def chain(count, step=10):
    """Prompts of which each begins the next one."""
    whole = np.random.default_rng(0).integers(0, 1000, step * count)
    return [Group(whole[: step * (i + 1)], [[1, 2, 3]]) for i in range(count)]


@pytest.mark.parametrize("budget", [100, 700, 4000])
@pytest.mark.parametrize("kind", ["many short choices", "choices of one token", "a chain", "mixed"])
def test_a_packs_keys_are_bounded(groups, budget, kind):
    rng = random.Random(6)
    long = tokens(rng, 500, 500)
    some = {
        "many short choices": [Group(long, [tokens(rng, 3, 2) for _ in range(2000)])],
        "choices of one token": [Group(long[: 5 * n], [[n], [n + 1]]) for n in range(1, 101)],
        "a chain": chain(100),
        "mixed": [*groups, Group(long, [tokens(rng, 30) for _ in range(200)])],
    }[kind]
    packs = list(make_packs(some, budget))
    assert found(packs) == expected(some)
    for pack in packs:
        # a continuation, or choices of one token behind one prompt, which cost no more than the prompt
        alone = len(pack.continuations) == 1 or len(pack.segments) == 1
        assert keys_of(pack) <= KEYS_A_TOKEN * budget or (alone and keys_of(pack) <= 2 * len(pack))
        assert len(pack) <= budget or alone


def test_packing_a_chain_of_beginnings_takes_linear_work(monkeypatch):
    """Long prompts that have no room in a pack are not looked at again by every shorter one."""
    placed = []

    def counted(sizes, capacity):
        placed.append(len(sizes))
        return best_fit_decreasing(sizes, capacity)

    monkeypatch.setattr(packing, "best_fit_decreasing", counted)

    def work(count):
        placed.clear()
        assert sum(len(pack.continuations) for pack in make_packs(chain(count), 500)) == count
        return sum(placed)

    assert work(800) < 2.2 * work(400)


def test_the_tree_is_that_of_the_definition():
    a, b, c = ([9] * LEAST_SHARED + more for more in ([1, 2], [1, 3], []))
    nodes, ends = prefix_tree([np.array(x, dtype=np.int32) for x in (a, b, c, a)])
    stretches = [(node.parent, node.start, node.end) for node in nodes]
    eight = LEAST_SHARED
    # a and b also share the 1, which is too little for a node of its own.
    assert stretches == [(-1, 0, 0), (0, 0, eight), (1, eight, eight + 2), (1, eight, eight + 2)]
    assert ends == [2, 3, 1, 2]


def slow_best_fit(sizes, capacity):
    bins, rooms = {}, []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fitting = [b for b, room in enumerate(rooms) if room >= sizes[item]]
        if fitting:
            chosen = min(fitting, key=lambda b: rooms[b])
        else:
            chosen = len(rooms)
            rooms.append(max(capacity, sizes[item]))
        rooms[chosen] -= sizes[item]
        bins[item] = chosen
    return rooms


def test_compiled_or_not_the_bins_are_the_same():
    rng = np.random.default_rng(0)
    for capacity in (1, 64, 4096):
        sizes = rng.integers(0, capacity + 2, FEW + 1)
        order = np.argsort(-sizes, kind="stable")
        interpreted = np.empty(len(sizes), np.int64)
        interpreted[order] = best_fit._pack(sizes[order], capacity)
        np.testing.assert_array_equal(best_fit_decreasing(sizes, capacity), interpreted)


@pytest.mark.parametrize("seed", range(30))
def test_best_fit_leaves_the_room_that_its_definition_leaves(seed):
    rng = random.Random(seed)
    capacity = rng.randint(1, 70)
    sizes = [rng.randint(0, capacity + 3 * (seed % 3 == 0)) for _ in range(rng.randint(1, 60))]
    bins = best_fit_decreasing(np.array(sizes), capacity)
    rooms = [max(capacity, *(s for s, b in zip(sizes, bins, strict=True) if b == n)) for n in range(max(bins) + 1)]
    for size, number in zip(sizes, bins, strict=True):
        rooms[number] -= size
    assert min(rooms) >= 0
    # Which of two bins with equal room an item goes into is free.
    assert sorted(rooms) == sorted(slow_best_fit(sizes, capacity))
