"""Attention over a pack: each segment sees the segments above it and itself, causally, and nothing else.

A segment's queries meet the keys of its whole path, from the root down; aligned at their ends, that is causal attention
of the last n of m tokens, which variable-length FlashAttention computes as it is. So one layout serves all of them:
flash-attn or torch's own `varlen_attn` on CUDA, scaled dot-product attention segment by segment elsewhere.

`transformers` calls `packed_attention` through its registry of attention functions; the model's code stays its own.

Shapes: L tokens of a pack, S segments, K keys of all their paths together, A and B query and key heads, D width of one.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from transformers import AttentionInterface

from slmfast.errors import UserError
from slmfast.kernels.planned import like_cuda
from slmfast.scoring.packing import Segment

NAME = "slmfast_packed"
LAYER_TYPES = {"full_attention", "sliding_attention"}
# What a model may hand to its attention beside these would change the scores: a soft cap, sinks, a position bias.
_HARMLESS = {"position_ids", "use_cache", "cache_position", "output_attentions"}


@dataclass
class Layout:
    """Who sees whom in one pack, and what follows from it, made once for all layers."""

    segments: Sequence[Segment]
    device: torch.device | str = "cpu"
    windows: list[int | None] = field(default_factory=list)  # what each layer has named as its sliding window
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    @functools.cached_property
    def paths(self) -> list[list[tuple[int, int]]]:
        """The keys of each segment as stretches of the pack, from the root down; neighbours joined."""
        paths: list[list[tuple[int, int]]] = []
        for segment in self.segments:
            above = paths[segment.parent] if segment.parent >= 0 else []
            if above and above[-1][1] == segment.begin:
                paths.append([*above[:-1], (above[-1][0], segment.end)])
            else:
                paths.append([*above, (segment.begin, segment.end)])
        return paths

    @functools.cached_property
    def key_lengths(self) -> list[int]:
        """How many keys each segment sees, its own included."""
        return [sum(end - begin for begin, end in path) for path in self.paths]

    @functools.cached_property
    def query_lengths(self) -> list[int]:
        """How many tokens each segment has."""
        return [segment.end - segment.begin for segment in self.segments]

    @functools.cached_property
    def keys(self) -> Tensor:
        """The places of the keys of all segments one after the other, int64 [K]."""
        return torch.cat([torch.arange(begin, end) for path in self.paths for begin, end in path]).to(self.device)

    @functools.cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Where each segment's queries and keys begin, int32 [S + 1] each, the ends last."""
        queries, keys = (
            torch.tensor([0, *lengths]).cumsum(0).to(self.device, torch.int32)
            for lengths in (self.query_lengths, self.key_lengths)
        )
        return queries, keys

    def mask(self, queries: int, keys: int, window: int | None) -> Tensor:
        """Which of the last `queries` of `keys` tokens sees which, bool [queries, keys]."""
        shape = queries, keys, window
        if shape not in self._masks:
            ones = torch.ones(queries, keys, dtype=torch.bool, device=self.device)
            seen = ones.tril(keys - queries)
            self._masks[shape] = seen if window is None else seen.triu(keys - queries - window + 1)
        return self._masks[shape]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = True,
    **others: Any,
) -> tuple[Tensor, None]:
    """What a layer of `transformers` asks for: [1, L, A, D] from query [1, A, L, D], key and value [1, B, L, D].

    Raises:
        UserError: the layer wants more of its attention than this one does.
    """
    wanted = [name for name, given in others.items() if given is not None and name not in _HARMLESS]
    if wanted or attention_mask is not None or dropout or is_causal is False:
        more = ", ".join(wanted) or "a mask, dropout, or sight of later tokens"
        raise UserError(f"{type(module).__name__} asks its attention for {more}: packs don't give it that")
    layout.windows.append(sliding_window)
    device, dtype = query.device.type, _product_dtype(query)
    attend = _variable_length("fake" if isinstance(query, FakeTensor) else device, dtype)
    if attend is not _segment_by_segment:  # rotated queries and keys are fp32 under autocast, values are not
        query, key, value = (x.to(dtype) for x in (query, key, value))
    return attend(query, key, value, layout, scaling, sliding_window), None


def _product_dtype(query: Tensor) -> torch.dtype:
    """The dtype of attention's products: autocast's where it is on, as in torch's own attention."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


AttentionInterface.register(NAME, packed_attention)

Attend = Callable[[Tensor, Tensor, Tensor, Layout, float | None, int | None], Tensor]


@functools.cache
def _variable_length(device: str, dtype: torch.dtype) -> Attend:
    """The fastest that the machine has: FlashAttention knows two dtypes and CUDA alone.

    Fake tensors stand for CUDA's, and take torch's own, which knows them.
    """
    if device in ("cuda", "fake") and dtype in (torch.bfloat16, torch.float16):
        if device == "cuda" and importlib.util.find_spec("flash_attn") is not None:
            return _flash_attention
        if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
            return _torch_varlen
    return _segment_by_segment


def _flash_attention(query, key, value, layout, scaling, window):
    from flash_attn import flash_attn_varlen_func

    (q, k, v), (queries, keys) = _side_by_side(query, key, value, layout), layout.bounds
    seen = (-1 if window is None else window - 1, 0)
    longest = max(layout.query_lengths), max(layout.key_lengths)
    return flash_attn_varlen_func(
        q, k, v, queries, keys, *longest, softmax_scale=scaling, causal=True, window_size=seen
    )[None]


def _torch_varlen(query, key, value, layout, scaling, window):
    from torch.nn.attention.varlen import varlen_attn

    (q, k, v), (queries, keys) = _side_by_side(query, key, value, layout), layout.bounds
    seen = (-1 if window is None else window - 1, 0)
    longest = max(layout.query_lengths), max(layout.key_lengths)
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        shared = {"enable_gqa": True}
    else:  # torch 2.11: every query head needs a key head of its own
        shared = {}
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return varlen_attn(q, k, v, queries, keys, *longest, scale=scaling, window_size=seen, **shared)[None]


def _side_by_side(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [L, A, D], and keys and values [K, B, D] with every segment's path in full."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return q.contiguous(), k.index_select(0, layout.keys), v.index_select(0, layout.keys)


def _segment_by_segment(query, key, value, layout, scaling, window):
    shared = query.shape[1] != key.shape[1]
    if shared and like_cuda(query):  # its kernels for fp32 know no shared heads: torch would take one with N^2 scores
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        shared = False
    output = []
    # Taken apart in one piece each, so that a backward pass writes one array and not one for every segment.
    parts = [x.index_select(2, layout.keys).split(layout.key_lengths, dim=2) for x in (key, value)]
    for q, k, v in zip(query.split(layout.query_lengths, dim=2), *parts, strict=True):
        queries, keys = q.shape[2], k.shape[2]
        narrow = window is not None and keys > window
        causal = queries == keys > 1 and not narrow
        mask = None if causal or (queries == 1 and not narrow) else layout.mask(queries, keys, window)
        seen = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=shared
        )
        output.append(seen.transpose(1, 2))
    return torch.cat(output, dim=1)


@contextmanager
def packing(model: nn.Module) -> Iterator[None]:
    """Inside, the model's layers attend by `packed_attention` and its forward takes `layout=`; its own way returns."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
