"""How prompts and their continuations are laid out in packs: one row of tokens each, without padding.

What several sequences begin with stands in a pack once, and everything that follows it attends to it: a prompt to
its replies (as in prefix sharing for preference training, arXiv 2410.20305), the template's preamble to all prompts.
Positions restart after what is shared. A continuation's last token predicts nothing, so it is a target but never an
input.

Packs are a function of the whole set of groups alone: neither the order of the input nor what is left to do changes
what is computed together.

Attention by variable lengths copies the keys of each segment's whole path, so that thousands of short choices behind a
long prompt would take memory which their few tokens don't show. A pack's keys are bounded with its tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from slmfast.scoring.best_fit import best_fit_decreasing
from slmfast.scoring.prefix_tree import Node, prefix_tree

Tokens = Sequence[int] | np.ndarray
KEYS_A_TOKEN = 16  # keys, all segments' paths together, that a pack may have for each token of its budget


@dataclass(frozen=True)
class Group:
    """Token ids: a prompt of at least one, and continuations of at least one each."""

    prefix: Tokens
    continuations: Sequence[Tokens]


@dataclass(frozen=True)
class Segment:
    """Tokens begin..end-1 of a pack, which attend to the segments above them and to one another, causally."""

    begin: int
    end: int
    parent: int  # the number of the segment above; -1 for none


@dataclass
class Pack:
    """Segments one after the other, parents first, and the targets that are predicted in them.

    Shapes: L tokens, T targets, C continuations.
    """

    tokens: list[np.ndarray] = field(default_factory=list)  # of each segment
    starts: list[int] = field(default_factory=list)  # the position of each segment's first token
    segments: list[Segment] = field(default_factory=list)
    sources: list[np.ndarray] = field(default_factory=list)  # int64, T in all: the place that predicts each target
    targets: list[np.ndarray] = field(default_factory=list)  # T in all
    continuations: list[tuple[int, int]] = field(default_factory=list)  # C pairs: group and number in the group

    def __len__(self) -> int:
        return self.segments[-1].end if self.segments else 0

    def add(self, tokens: np.ndarray, start: int, parent: int) -> int:
        """Appends a segment of at least one token; its number."""
        begin = len(self)
        self.tokens.append(tokens)
        self.starts.append(start)
        self.segments.append(Segment(begin, begin + len(tokens), parent))
        return len(self.segments) - 1

    def predict(self, continuation: np.ndarray, start: int, parent: int, owner: tuple[int, int]) -> None:
        """Appends a continuation of a segment: its targets, and all of its tokens but the last."""
        first = self.segments[parent].end - 1
        begin = len(self)
        if len(continuation) > 1:
            self.add(continuation[:-1], start, parent)
        self.sources.append(np.concatenate([[first], np.arange(begin, begin + len(continuation) - 1)]))
        self.targets.append(continuation)
        self.continuations.append(owner)


@dataclass(frozen=True)
class _Leaf:
    """A continuation."""

    group: int
    member: int
    cost: int


@dataclass(frozen=True)
class _Fragment:
    """A stretch of a prompt with some of what is below it: what goes into one pack together."""

    node: int  # of the prefix tree: the stretch ends with it
    start: int
    end: int
    below: list["_Fragment | _Leaf"]
    below_cost: int

    @property
    def cost(self) -> int:
        """What all of it takes of a pack's budget."""
        return _segment_cost(self.end - self.start, self.end) + self.below_cost


def _segment_cost(tokens: int, end: int) -> int:
    """What a segment of so many tokens takes of a budget, if the last of them sees `end` keys."""
    return max(tokens, -(-end // KEYS_A_TOKEN))


def _leaf(group: int, member: int, prompt: int, length: int) -> _Leaf:
    # One of a single token has no segment, but keeps those above it from becoming one.
    return _Leaf(group, member, _segment_cost(length - 1, prompt + length - 1) if length > 1 else 1)


def _fragment(number: int, start: int, end: int, part: list[_Fragment | _Leaf]) -> _Fragment:
    """A node with a part of what is below it; where that is one fragment, both become one segment."""
    if len(part) == 1 and isinstance(part[0], _Fragment):
        return replace(part[0], start=start)
    return _Fragment(number, start, end, part, _cost(part))


def make_packs(groups: Sequence[Group], budget: int) -> Iterator[Pack]:
    """Packs of at most `budget` tokens and KEYS_A_TOKEN * `budget` keys that hold every continuation once.

    The most expensive come first. A sequence of more tokens than the budget is a pack of its own, in two segments at
    most: nothing is ever cut.
    """
    used = [i for i, group in enumerate(groups) if len(group.continuations)]
    prompts = [np.asarray(groups[i].prefix, dtype=np.int32) for i in used]
    nodes, ends = prefix_tree(prompts)
    below: list[list[_Fragment | _Leaf]] = [[] for _ in nodes]
    for number, node in zip(used, ends, strict=True):
        length = nodes[node].end
        below[node] += [_leaf(number, m, length, len(c)) for m, c in enumerate(groups[number].continuations)]
    for number in range(len(nodes) - 1, 0, -1):  # children before their parents
        node, capacity = nodes[number], max(1, budget - nodes[number].end)
        leaves = sorted((x for x in below[number] if isinstance(x, _Leaf)), key=lambda leaf: _content(groups, leaf))
        # Children were added last to first.
        items = leaves + [x for x in reversed(below[number]) if isinstance(x, _Fragment)]
        for part in _parts(items, capacity):
            # What has no room beside this prompt goes to the root at once: each node above would look at it again.
            alone = len(part) == 1 and part[0].cost > capacity
            parent, start = (0, 0) if alone else (node.parent, node.start)
            below[parent].append(_fragment(number, start, node.end, part))
        below[number] = []
    for part in sorted(_parts(below[0][::-1], budget), key=_cost, reverse=True):
        yield _laid_out(part, prompts, nodes, groups)


def _content(groups: Sequence[Group], leaf: _Leaf) -> tuple:
    """Orders the continuations of a prompt by what they are; those of equal keys hold the same tokens."""
    return leaf.cost, np.asarray(groups[leaf.group].continuations[leaf.member], dtype=np.int32).tobytes()


def _cost(items: Sequence[_Fragment | _Leaf]) -> int:
    return sum(item.cost for item in items)


def _parts(items: list[_Fragment | _Leaf], capacity: int) -> list[list[_Fragment | _Leaf]]:
    """Items in as few parts as best fit makes; all together where they have room."""
    if not items or _cost(items) <= capacity:
        return [items] if items else []
    bins = best_fit_decreasing(np.array([item.cost for item in items], dtype=np.int64), capacity)
    parts: list[list[_Fragment | _Leaf]] = [[] for _ in range(int(bins.max()) + 1)]
    for item, number in zip(items, bins.tolist(), strict=True):
        parts[number].append(item)
    return parts


def _laid_out(
    part: list[_Fragment | _Leaf], prompts: list[np.ndarray], nodes: list[Node], groups: Sequence[Group]
) -> Pack:
    pack = Pack()
    waiting: list[tuple[_Fragment | _Leaf, int]] = [(item, -1) for item in reversed(part)]  # and the segment above
    while waiting:
        item, parent = waiting.pop()
        if isinstance(item, _Fragment):
            prompt = prompts[nodes[item.node].example]
            segment = pack.add(prompt[item.start : item.end], item.start, parent)
            waiting += [(below, segment) for below in reversed(item.below)]
        else:
            continuation = np.asarray(groups[item.group].continuations[item.member], dtype=np.int32)
            start = len(groups[item.group].prefix)
            pack.predict(continuation, start, parent, (item.group, item.member))
    return pack


def make_rows(groups: Sequence[Group], budget: int) -> Iterator[list[Pack]]:
    """Every continuation as a pack of its own, in batches of at most `budget` tokens with the padding to the longest.

    For models whose layers can't be told what attends to what.
    """
    leaves = [
        _Leaf(g, m, len(group.prefix) + len(continuation) - 1)
        for g, group in enumerate(groups)
        for m, continuation in enumerate(group.continuations)
    ]

    def content(leaf: _Leaf) -> tuple:
        group = groups[leaf.group]
        ids = (np.asarray(x, dtype=np.int32).tobytes() for x in (group.prefix, group.continuations[leaf.member]))
        return leaf.cost, *ids

    batch: list[Pack] = []
    for leaf in sorted(leaves, key=content, reverse=True):
        pack, group = Pack(), groups[leaf.group]
        root = pack.add(np.asarray(group.prefix, dtype=np.int32), 0, -1)
        continuation = np.asarray(group.continuations[leaf.member], dtype=np.int32)
        pack.predict(continuation, len(group.prefix), root, (leaf.group, leaf.member))
        if batch and (len(batch) + 1) * len(batch[0]) > budget:
            yield batch
            batch = []
        batch.append(pack)
    if batch:
        yield batch
