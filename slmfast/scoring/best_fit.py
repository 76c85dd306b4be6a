"""Bin packing: items into as few bins of one capacity as best fit makes (Johnson 1974: at most 11/9 of the fewest + 4).

The largest item goes first, each into the fullest bin that still has room for it. A segment tree over the room that
bins have left finds that bin in O(log capacity), so that a million items take well under a second.
"""

import functools
from collections.abc import Callable

import numpy as np

FEW = 2000  # items; that many are packed sooner than the loop is compiled


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The number of the bin that each item goes into, int64 [n]; bins are numbered from 0 in the order of opening.

    Items of equal size are taken in their given order. An item over the capacity gets a bin of its own.

    Args:
        sizes: int64 [n], none below 0.
        capacity: at least 1.
    """
    order = np.argsort(-sizes, kind="stable")
    bins = np.empty(len(sizes), np.int64)
    pack = _pack if len(sizes) <= FEW else _compiled()
    bins[order] = pack(np.ascontiguousarray(sizes[order], dtype=np.int64), int(capacity))
    return bins


@functools.cache
def _compiled() -> Callable[[np.ndarray, int], np.ndarray]:
    import numba

    return numba.njit(_pack)


def _pack(sizes, capacity):
    # Leaves of the tree are the amounts of room 0..capacity; a node says how many open bins lie under it.
    leaves = 1
    while leaves <= capacity:
        leaves *= 2
    tree = np.zeros(2 * leaves, np.int64)
    newest = np.full(leaves, -1, np.int64)  # of each amount of room the bin last added, the head of a linked list
    older = np.empty(len(sizes), np.int64)
    bins = np.empty(len(sizes), np.int64)

    def count(node, change):
        while node:
            tree[node] += change
            node //= 2

    def least_room(size):
        """The least room of an open bin that is at least `size`, or -1."""
        node = leaves + size
        if size >= leaves or tree[node]:
            return size if size < leaves else -1
        # Up until a right-hand neighbour holds a bin, then down to its leftmost one.
        while node > 1 and (node % 2 == 1 or tree[node + 1] == 0):
            node //= 2
        if node <= 1:
            return -1
        node += 1
        while node < leaves:
            node = 2 * node if tree[2 * node] else 2 * node + 1
        return node - leaves

    opened = 0
    for item in range(len(sizes)):
        room = least_room(sizes[item])
        if room < 0:
            chosen, room = opened, max(capacity, sizes[item])
            opened += 1
        else:
            chosen = newest[room]
            newest[room] = older[chosen]
            count(leaves + room, -1)
        bins[item] = chosen
        left = room - sizes[item]
        older[chosen] = newest[left]
        newest[left] = chosen
        count(leaves + left, 1)
    return bins
