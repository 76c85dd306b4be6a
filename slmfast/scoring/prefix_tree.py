"""The tree of the beginnings that prompts have in common, so that each is computed once.

All prompts of a chat begin with the template's preamble, the judge's questions about one reply begin with the
instruction and the reply, few-shot items with their examples. Sorted token sequences that begin alike lie side by side,
and the lengths of their common beginnings give the tree (a compressed trie; Kasai et al. 2001 build suffix trees from
suffix arrays in the same way).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_SHARED = 8  # tokens: what is shorter is computed again, for every node costs each layer a call of attention


@dataclass
class Node:
    """A stretch of tokens below a parent: those at the places start..end-1 of every prompt that runs through it."""

    parent: int  # the number of the parent's node; -1 for the root, which holds no token
    start: int
    end: int
    example: int  # a prompt that runs through it


def prefix_tree(prompts: Sequence[np.ndarray]) -> tuple[list[Node], list[int]]:
    """The nodes, parents before their children, and for every prompt the number of the node that it ends with.

    The first node is the root. Neither the order of the prompts nor how often one occurs changes the tree's tokens.

    Args:
        prompts: int32 arrays of at least one token id each.
    """
    # Big-endian bytes compare as the sequences do, a beginning before what it begins.
    keys = [np.asarray(prompt).astype(">i4").tobytes() for prompt in prompts]
    order = sorted(range(len(prompts)), key=keys.__getitem__)
    nodes = [Node(-1, 0, 0, order[0] if order else 0)]
    ends = [0] * len(prompts)
    path = [0]  # the nodes from the root to the last prompt's end
    for place, number in enumerate(order):
        previous = order[place - 1]
        if place and keys[number] == keys[previous]:
            ends[number] = ends[previous]
            continue
        common = _common(prompts[previous], prompts[number]) if place else 0
        left = None
        while nodes[path[-1]].end > common:
            left = path.pop()
        top = path[-1]
        if left is not None and common - nodes[top].end >= LEAST_SHARED:
            nodes.append(Node(top, nodes[top].end, common, nodes[left].example))
            nodes[left].parent, nodes[left].start = len(nodes) - 1, common
            top = len(nodes) - 1
            path.append(top)
        nodes.append(Node(top, nodes[top].end, len(prompts[number]), number))
        path.append(len(nodes) - 1)
        ends[number] = path[-1]
    return _parents_first(nodes, ends, {number: place for place, number in enumerate(order)})


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences share at their beginnings."""
    length = min(len(a), len(b))
    differ = np.asarray(a[:length]) != np.asarray(b[:length])
    return int(differ.argmax()) if differ.any() else length


def _parents_first(nodes: list[Node], ends: list[int], rank: dict[int, int]) -> tuple[list[Node], list[int]]:
    """Numbers the nodes anew, depth first, children by their tokens: a node split off later has a later number."""
    order = [0, *sorted(range(1, len(nodes)), key=lambda i: (rank[nodes[i].example], nodes[i].start))]
    numbers = {old: new for new, old in enumerate(order)}
    for node in nodes[1:]:
        node.parent = numbers[node.parent]
    return [nodes[old] for old in order], [numbers[end] for end in ends]
