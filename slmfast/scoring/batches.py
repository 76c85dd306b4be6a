"""Packs as tensors on a device, and whether a model can run them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slmfast.errors import UserError
from slmfast.scoring.attention import LAYER_TYPES, Layout, packing
from slmfast.scoring.cpu_layers import faster_layers
from slmfast.scoring.last_layer import only_at
from slmfast.scoring.loading import evaluating
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


def can_pack(model: nn.Module) -> bool:
    """Whether packs give this model the separate sequences' result.

    Its layers must attend through transformers' registry, all over the whole sequence or a window, and its rotations
    must not depend on the longest position of a call. A few tokens are run both ways: what a model's code does beside
    that is found by its result.
    """
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if others or rotates_by_length(model) or not getattr(model, "_supports_attention_backend", False):
        return False
    if len({parameter.device for parameter in model.parameters()}) > 1:  # a layout lies on one
        return False
    return _packs_agree(model, config)


def rotates_by_length(model: nn.Module) -> bool:
    """Whether a token's rotation depends on the longest position of a call: then no sequence may share one."""
    rotation = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    several = [rotation, *(some for some in rotation.values() if isinstance(some, dict))]  # one for each kind of layer
    return any({some.get("rope_type"), some.get("type")} & {"dynamic", "longrope"} for some in several)


def _packs_agree(model: nn.Module, config: Any) -> bool:
    """Whether a prompt with two continuations has the same hidden states in a pack and as two sequences."""
    vocabulary = config.vocab_size
    prompt, *continuations = ([token % vocabulary for token in some] for some in ((0, 1, 2), (3, 4, 5), (6, 7)))
    group = Group(prompt, continuations)
    device = model.get_output_embeddings().weight.device
    (apart,) = make_batches([group], 64, packed=False, device=device)
    (together,) = make_batches([group], 64, packed=True, device=device)
    with evaluating(model):
        expected = _in_order(apart, apart.hidden(model))
        try:
            with packing(model), faster_layers(model):
                found = _in_order(together, together.hidden(model))
        except (TypeError, UserError):  # its forward takes no layout, or its attention wants more than a pack gives
            return False
    # A window is longer than these few tokens: a model that hides its own in a mask gives the same states here.
    if sum(window is not None for window in together.layout.windows) < _windowed_layers(config):
        return False
    slack = 1e-4 if expected.dtype == torch.float32 else 2e-2
    # States may be no numbers: that is for the score itself to find.
    largest = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return torch.allclose(found.float(), expected.float(), rtol=slack, atol=slack * largest, equal_nan=True)


def _windowed_layers(config: Any) -> int:
    """How many layers see a sliding window alone."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return config.num_hidden_layers if getattr(config, "sliding_window", None) else 0
    return sum(kind == "sliding_attention" for kind in kinds)


def _in_order(batch: Batch, states: Tensor) -> Tensor:
    """States [T, H] by the number of the continuation that they belong to."""
    numbers = [batch.continuations[owner] for owner in batch.owners.tolist()]
    return states[sorted(range(len(numbers)), key=numbers.__getitem__)]
