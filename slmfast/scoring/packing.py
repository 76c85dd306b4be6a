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
    """A continuation, or all those of a single token behind one prompt: they have no segment and are read together."""

    owners: tuple[tuple[int, int], ...]  # group and number in the group
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


def _leaves(groups: Sequence[Group], numbers: list[int], prompt: int) -> list[_Leaf]:
    """The continuations of all groups whose prompt, of that many tokens, is the same; ordered by what they are."""
    members = [(number, m) for number in numbers for m in range(len(groups[number].continuations))]
    lengths = {owner: len(groups[owner[0]].continuations[owner[1]]) for owner in members}
    members.sort(key=lambda owner: (lengths[owner], _content(groups, owner)))
    short = tuple(owner for owner in members if lengths[owner] == 1)
    # A cost of 1 keeps the segments above from becoming one.
    leaves = [_Leaf(short, 1)] if short else []
    for owner in members[len(short) :]:
        leaves.append(_Leaf((owner,), _segment_cost(lengths[owner] - 1, prompt + lengths[owner] - 1)))
    return leaves


def _fragment(number: int, start: int, end: int, part: list[_Fragment | _Leaf]) -> _Fragment:
    """A node with a part of what is below it; where that is one fragment, both become one segment."""
    if len(part) == 1 and isinstance(part[0], _Fragment):
        return replace(part[0], start=start)
    return _Fragment(number, start, end, part, _cost(part))


def make_packs(groups: Sequence[Group], budget: int) -> Iterator[Pack]:
    """Packs of at most `budget` tokens and KEYS_A_TOKEN * `budget` keys that hold every continuation once.

    The most expensive come first. A sequence of more tokens than the budget is a pack of its own, in two segments at
    most, and so is a prompt of more with all its continuations of one token: nothing is ever cut.
    """
    used = [i for i, group in enumerate(groups) if len(group.continuations)]
    prompts = [np.asarray(groups[i].prefix, dtype=np.int32) for i in used]
    nodes, ends = prefix_tree(prompts)
    numbers: list[list[int]] = [[] for _ in nodes]  # of the groups whose prompt ends with a node
    for number, node in zip(used, ends, strict=True):
        numbers[node].append(number)
    below: list[list[_Fragment]] = [[] for _ in nodes]
    for number in range(len(nodes) - 1, 0, -1):  # children before their parents
        node, capacity = nodes[number], max(1, budget - nodes[number].end)
        # Children were added last to first.
        items = _leaves(groups, numbers[number], node.end) + below[number][::-1]
        for part in _parts(items, capacity):
            # What has no room beside this prompt goes to the root at once: each node above would look at it again.
            alone = len(part) == 1 and part[0].cost > capacity
            parent, start = (0, 0) if alone else (node.parent, node.start)
            below[parent].append(_fragment(number, start, node.end, part))
        below[number] = []
    for part in sorted(_parts(below[0][::-1], budget), key=_cost, reverse=True):
        yield _laid_out(part, prompts, nodes, groups)


def _content(groups: Sequence[Group], owner: tuple[int, int]) -> bytes:
    """The tokens of a continuation."""
    return np.asarray(groups[owner[0]].continuations[owner[1]], dtype=np.int32).tobytes()


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
            for group, member in item.owners:
                continuation = np.asarray(groups[group].continuations[member], dtype=np.int32)
                pack.predict(continuation, len(groups[group].prefix), parent, (group, member))
    return pack


def make_rows(groups: Sequence[Group], budget: int) -> Iterator[list[Pack]]:
    """Every continuation as a pack of its own, in batches of at most `budget` tokens with the padding to the longest.

    For models whose layers can't be told what attends to what.
    """
    owners = [(g, m) for g, group in enumerate(groups) for m in range(len(group.continuations))]

    def content(owner: tuple[int, int]) -> tuple:
        group, continuation = groups[owner[0]], groups[owner[0]].continuations[owner[1]]
        prefix = np.asarray(group.prefix, dtype=np.int32).tobytes()
        return len(group.prefix) + len(continuation), prefix, _content(groups, owner)

    batch: list[Pack] = []
    for owner in sorted(owners, key=content, reverse=True):
        pack, group = Pack(), groups[owner[0]]
        root = pack.add(np.asarray(group.prefix, dtype=np.int32), 0, -1)
        continuation = np.asarray(group.continuations[owner[1]], dtype=np.int32)
        pack.predict(continuation, len(group.prefix), root, owner)
        if batch and (len(batch) + 1) * len(batch[0]) > budget:
            yield batch
            batch = []
        batch.append(pack)
    if batch:
        yield batch
