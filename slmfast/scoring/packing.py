"""How groups of sequences with a common prefix are laid out in rows and batches.

A group is a prefix and its continuations. Where the prefix is shared, a row holds it once, followed by several
continuations, each of which restarts its positions after the prefix and sees the prefix and itself (as in prefix
sharing for preference training, arXiv 2410.20305). A continuation's last token predicts nothing, so it is a target
but never an input.

Rows go into batches by length, and batches are a function of the whole set of groups alone: neither the order of the
input nor what is left to do changes what is computed together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Token ids: a prefix of at least one, and continuations of at least one each."""

    prefix: Sequence[int]
    continuations: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Row:
    """A prefix and some continuations of one group, laid out one after the other."""

    group: int
    members: tuple[int, ...]  # which of the group's continuations
    prefix: Sequence[int]
    continuations: tuple[Sequence[int], ...]  # theirs, in the order of `members`

    def __len__(self) -> int:
        return len(self.prefix) + sum(len(continuation) - 1 for continuation in self.continuations)

    def key(self) -> tuple:
        """Orders rows by length; rows of equal keys hold the same tokens."""
        return len(self), tuple(self.prefix), tuple(map(tuple, self.continuations))


@dataclass(frozen=True)
class Batch:
    """Rows as tensors. Shapes: B rows, L tokens in the longest, T targets, C continuations."""

    input_ids: Tensor  # int64 [B, L], padded on the right
    position_ids: Tensor  # int64 [B, L]
    segments: Tensor | None  # int64 [B, L]: 0 the prefix, 1.. the continuations; None where no row has two of them
    rows: Tensor  # int64 [T]: the row in which a target is predicted
    positions: Tensor  # int64 [T]: and where in it, at the token before the target
    targets: Tensor  # int64 [T]
    owners: Tensor  # int64 [T]: the continuation a target belongs to
    continuations: list[tuple[int, int]]  # C pairs: group and number in the group

    def mask(self) -> Tensor | None:
        """Which query (dimension 2) may see which key (dimension 3), bool [B, 1, L, L]; None for plain causal."""
        if self.segments is None:
            return None
        length = self.input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.segments.device).tril()
        keys, queries = self.segments[:, None, None, :], self.segments[:, None, :, None]
        return causal & ((keys == 0) | (keys == queries))


def make_rows(groups: Sequence[Group], *, share: bool, row_tokens: int) -> list[Row]:
    """Rows of all groups; with `share` several continuations a row, as long as it stays within `row_tokens`.

    A row of one continuation may be longer than that: nothing is ever cut.
    """
    rows = []
    for number, group in enumerate(groups):
        order = sorted(
            range(len(group.continuations)), key=lambda i: (len(group.continuations[i]), group.continuations[i])
        )
        taken: list[int] = []
        length = len(group.prefix)
        for member in order:
            more = len(group.continuations[member]) - 1
            if taken and (not share or length + more > row_tokens):
                rows.append(_row(number, group, taken))
                taken, length = [], len(group.prefix)
            taken.append(member)
            length += more
        if taken:
            rows.append(_row(number, group, taken))
    return rows


def _row(number: int, group: Group, members: list[int]) -> Row:
    return Row(number, tuple(members), group.prefix, tuple(group.continuations[i] for i in members))


def make_batches(rows: Sequence[Row], batch_tokens: int) -> list[list[Row]]:
    """Rows sorted by length, longest first, in batches of at most `batch_tokens` tokens with the padding.

    A row longer than that is a batch of its own.
    """
    batches: list[list[Row]] = []
    for row in sorted(rows, key=Row.key, reverse=True):
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0]) <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def collate(rows: Sequence[Row], device: torch.device | str = "cpu") -> Batch:
    """The tensors of one batch of rows."""
    longest = max(map(len, rows))
    # Padding stands on the right: causal attention never lets a real token see it, so any id and position serve.
    ids, positions, segments = (torch.zeros(len(rows), longest, dtype=torch.int64) for _ in range(3))
    where: list[tuple[int, int, int, int]] = []  # of each target: row, position, token, continuation
    continuations: list[tuple[int, int]] = []
    for r, row in enumerate(rows):
        tokens, places, parts = list(row.prefix), list(range(len(row.prefix))), [0] * len(row.prefix)
        for part, (member, continuation) in enumerate(zip(row.members, row.continuations, strict=True), start=1):
            # The first target is predicted by the prefix's last token, each later one by the target before it.
            sources = [len(row.prefix) - 1, *range(len(tokens), len(tokens) + len(continuation) - 1)]
            where += [
                (r, source, token, len(continuations)) for source, token in zip(sources, continuation, strict=True)
            ]
            continuations.append((row.group, member))
            tokens += continuation[:-1]
            places += range(len(row.prefix), len(row.prefix) + len(continuation) - 1)
            parts += [part] * (len(continuation) - 1)
        for tensor, values in ((ids, tokens), (positions, places), (segments, parts)):
            tensor[r, : len(row)] = torch.tensor(values)
    shared = any(len(row.members) > 1 for row in rows)
    table = torch.tensor(where, dtype=torch.int64).T.contiguous().to(device)
    return Batch(
        ids.to(device), positions.to(device), segments.to(device) if shared else None, *table.unbind(0), continuations
    )
