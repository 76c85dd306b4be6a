"""Packed attention against softmax over a dense mask, by every path."""

import math
import random
import sys
import types

import pytest
import torch

from slmfast import UserError
from slmfast.scoring import attention
from slmfast.scoring.attention import NAME, Layout, packed_attention, packing
from slmfast.scoring.packing import Group, make_packs


@pytest.fixture
def segments():
    rng = random.Random(1)

    def tokens(least, most):
        return [rng.randrange(50) for _ in range(rng.randint(least, most))]

    stem = tokens(20, 20)
    groups = [Group(stem + tokens(1, 30), [tokens(1, 15) for _ in range(3)]) for _ in range(4)]
    groups.append(Group(tokens(1, 1), [tokens(2, 2), tokens(9, 9)]))
    (pack,) = make_packs(groups, 10_000)
    return pack.segments


def dense_mask(segments, window):
    """Bool [L, L] by walking up from every token: what it sees, and how far away that is."""
    length = segments[-1].end
    mask = torch.zeros(length, length, dtype=torch.bool)
    for segment in segments:
        path, above = list(range(segment.begin, segment.end)), segment.parent
        while above >= 0:
            path = [*range(segments[above].begin, segments[above].end), *path]
            above = segments[above].parent
        for query in range(segment.begin, segment.end):
            place = path.index(query)
            seen = path[: place + 1] if window is None else path[max(0, place - window + 1) : place + 1]
            mask[query, seen] = True
    return mask


def states(segments, heads, key_heads, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    length = segments[-1].end
    return [torch.randn(1, n, length, width, generator=generator) for n in (heads, key_heads, key_heads)]


def dense(query, key, value, mask, scaling):
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = (query.double() @ key.transpose(2, 3) * scaling).masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def variable_length(q, k, v, q_bounds, k_bounds, window, scaling):
    """What FlashAttention's variable-length call computes: causal attention aligned at the sequences' ends."""
    output = torch.full_like(q, math.nan)
    bounds = zip(q_bounds[:-1], q_bounds[1:], k_bounds[:-1], k_bounds[1:], strict=True)
    for q0, q1, k0, k1 in (map(int, four) for four in bounds):
        n, m = q1 - q0, k1 - k0
        away = (torch.arange(n)[:, None] + m - n) - torch.arange(m)[None]
        mask = (away >= 0) & ((away <= window[0]) | (window[0] < 0))
        one = [x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1])]
        output[q0:q1] = dense(*one, mask, scaling)[0].float()
    return output


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("way", ["segments", "flash-attn", "torch", "torch 2.11"])
def test_equals_softmax_over_the_dense_mask(segments, window, heads, key_heads, way, monkeypatch):
    """The CUDA paths run with stand-ins that compute what their documentation says."""
    if way == "flash-attn":

        def flash_attn_varlen_func(q, k, v, queries, keys, most_q, most_k, *, softmax_scale, causal, window_size):
            assert causal and window_size[1] == 0
            assert most_q == queries.diff().max() and most_k == keys.diff().max() and queries.dtype == torch.int32
            return variable_length(q, k, v, queries, keys, window_size, softmax_scale)

        fake = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
        monkeypatch.setitem(sys.modules, "flash_attn", fake)
        monkeypatch.setattr(attention, "_variable_length", lambda *_: attention._flash_attention)
    elif way != "segments":
        varlen = pytest.importorskip("torch.nn.attention.varlen")

        def varlen_attn(q, k, v, queries, keys, most_q, most_k, *, scale, window_size, enable_gqa):
            assert enable_gqa and window_size[1] == 0
            assert most_q == queries.diff().max() and most_k == keys.diff().max()
            return variable_length(q, k, v, queries, keys, window_size, scale)

        def without_gqa(q, k, v, *bounds, scale, window_size):
            assert q.shape[1] == k.shape[1] == v.shape[1]
            return varlen_attn(q, k, v, *bounds, scale=scale, window_size=window_size, enable_gqa=True)

        monkeypatch.setattr(varlen, "varlen_attn", without_gqa if way == "torch 2.11" else varlen_attn)
        monkeypatch.setattr(attention, "_variable_length", lambda *_: attention._torch_varlen)
    query, key, value = states(segments, heads, key_heads)
    layout = Layout(segments)
    got, _ = packed_attention(None, query, key, value, None, layout=layout, scaling=0.3, sliding_window=window)
    truth = dense(query, key, value, dense_mask(segments, window), 0.3)
    assert got.shape == truth.shape
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=2e-6)


def test_gradients_equal_those_of_the_dense_mask(segments):
    inputs = [x.double().requires_grad_() for x in states(segments, 4, 2)]
    pull = torch.randn(1, segments[-1].end, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    got, _ = packed_attention(None, *inputs, None, layout=Layout(segments), scaling=0.3)
    ours = torch.autograd.grad(got, inputs, pull)
    truth = torch.autograd.grad(dense(*inputs, dense_mask(segments, None), 0.3), inputs, pull)
    for mine, theirs in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_the_machine_decides_which_path_runs(monkeypatch):
    choose = attention._variable_length.__wrapped__
    there = {"flash_attn", "torch.nn.attention.varlen"}
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object() if name in there else None)
    assert choose("cuda", torch.bfloat16) is attention._flash_attention
    there.remove("flash_attn")
    assert choose("cuda", torch.float16) is attention._torch_varlen
    assert choose("cuda", torch.float32) is choose("cpu", torch.bfloat16) is attention._segment_by_segment
    there.clear()
    assert choose("cuda", torch.bfloat16) is attention._segment_by_segment


@pytest.mark.parametrize(
    "more", [{"softcap": 30.0}, {"s_aux": torch.ones(4)}, {"position_bias": torch.ones(1)}, {"is_causal": False}]
)
def test_a_layer_that_wants_more_is_refused(segments, more):
    inputs = states(segments, 4, 2)
    with pytest.raises(UserError, match="asks its attention for"):
        packed_attention(torch.nn.Linear(1, 1), *inputs, None, layout=Layout(segments), **more)


def test_the_models_own_attention_comes_back(build_model):
    model = build_model()
    model.set_attn_implementation("eager")
    with pytest.raises(ZeroDivisionError), packing(model):
        assert model.config._attn_implementation == NAME
        raise ZeroDivisionError
    assert model.config._attn_implementation == "eager"
