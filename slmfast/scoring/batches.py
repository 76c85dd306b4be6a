"""Packs as tensors on a device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from slmfast.scoring.attention import Layout
from slmfast.scoring.last_layer import only_at
from slmfast.scoring.packing import Group, Pack, make_packs, make_rows


@dataclass(frozen=True)
class Batch:
    """What goes through the model at once. Shapes: B rows, L tokens in the longest, T targets, C continuations."""

    input_ids: Tensor  # int64 [B, L], padded on the right
    position_ids: Tensor  # int64 [B, L]
    layout: Layout | None  # of a pack (B is 1); None for rows of one sequence each
    sources: Tensor  # int64 [T]: the place in B * L at which a target is predicted
    predicting: Tensor  # int64: these places, each once
    targets: Tensor  # int64 [T]
    owners: Tensor  # int64 [T]: the continuation a target belongs to
    continuations: list[tuple[int, int]]  # C pairs: group and number in the group

    @property
    def tokens(self) -> int:
        """How many tokens go in, the padding included."""
        return self.input_ids.numel()

    def hidden(self, model: nn.Module) -> Tensor:
        """The last hidden states at the sources, [T, H]."""
        decoder = model.get_decoder()
        common = {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}
        if self.layout is None:
            states = decoder(**common)
        else:
            with only_at(self.predicting, decoder):
                states = decoder(**common, layout=self.layout)
        return states.last_hidden_state.flatten(0, 1)[self.sources]


def make_batches(groups: Sequence[Group], budget: int, *, packed: bool, device: torch.device | str) -> Iterator[Batch]:
    """Batches of at most `budget` tokens that hold every continuation once; a longer sequence is one of its own."""
    if packed:
        for pack in make_packs(groups, budget):
            yield collate([pack], Layout(pack.segments, device), device)
    else:
        for rows in make_rows(groups, budget):
            yield collate(rows, None, device)


def collate(packs: Sequence[Pack], layout: Layout | None, device: torch.device | str) -> Batch:
    """The tensors of packs, one a row."""
    longest = max(map(len, packs))
    # Padding stands on the right: causal attention never lets a real token see it, so any id and position serve.
    ids, positions = (np.zeros((len(packs), longest), dtype=np.int64) for _ in range(2))
    sources, targets, owners = [], [], []
    continuations: list[tuple[int, int]] = []
    for row, pack in enumerate(packs):
        ids[row, : len(pack)] = np.concatenate(pack.tokens)
        stretches = zip(pack.starts, pack.tokens, strict=True)
        positions[row, : len(pack)] = np.concatenate([np.arange(start, start + len(t)) for start, t in stretches])
        sources += [places + row * longest for places in pack.sources]
        targets += pack.targets
        owners += [np.full(len(t), len(continuations) + i) for i, t in enumerate(pack.targets)]
        continuations += pack.continuations
    sources, targets, owners = (np.concatenate(parts).astype(np.int64) for parts in (sources, targets, owners))
    arrays = ids, positions, sources, np.unique(sources), targets, owners
    ids, positions, *rest = (torch.from_numpy(array).to(device) for array in arrays)
    return Batch(ids, positions, layout, *rest, continuations)
