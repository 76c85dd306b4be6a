"""Every path, shape, length and number of replies against a plain fp32 forward, token by token.

Groups have 1 to 8 replies, sequences of 2 tokens up to the window, prompts that begin alike and prompts of one token.
"""

import math

import numpy as np
import pytest
import torch

from slmfast.kernels import eager_logprob
from slmfast.scoring import attention, cpu_layers, forward, head
from slmfast.scoring.forward import continuation_logprobs
from slmfast.scoring.packing import Group

LONGEST = 48
SHAPES = {
    "tied, a key head for each": ("tied", {}),
    "untied, two queries a key": ("gqa", {}),
    "tied, one key for six": ("mqa", {}),
    "untied, three queries a key": ("gqa", {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96}),
    "tied, seven queries a key": ("tied", {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 112}),
}
PATHS = ["packs", "packs without oneDNN", "packs by variable lengths", "rows"]
BUDGETS = [1, 150]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models as small as these only wait for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=SHAPES)
def model(request, build_model):
    shape, changes = SHAPES[request.param]
    return build_model(shape, max_position_embeddings=LONGEST, **changes)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    if request.param == "rows":
        monkeypatch.setattr(forward, "why_not_packed", lambda model: "the test wants rows")
    elif request.param == "packs without oneDNN":
        for module in (cpu_layers, eager_logprob):
            monkeypatch.setattr(module, "serves", lambda *_: False)
    elif request.param == "packs by variable lengths":
        varlen = pytest.importorskip("torch.nn.attention.varlen")
        monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
        monkeypatch.setattr(attention, "_variable_length", lambda *_: attention._torch_varlen)
    return request.param


def varlen_attn(q, k, v, q_bounds, k_bounds, most_q, most_k, *, scale, window_size, enable_gqa):
    """What its documentation says, by a softmax over a mask: causal attention aligned at the sequences' ends."""
    assert window_size == (-1, 0) and enable_gqa
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    output = []
    bounds = zip(q_bounds[:-1], q_bounds[1:], k_bounds[:-1], k_bounds[1:], strict=True)
    for q0, q1, k0, k1 in (map(int, four) for four in bounds):
        scores = torch.einsum("ahd,bhd->hab", q[q0:q1], k[k0:k1]) * scale
        later = torch.arange(k1 - k0) > torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None]
        output.append(torch.einsum("hab,bhd->ahd", scores.masked_fill(later, -math.inf).softmax(-1), v[k0:k1]))
    return torch.cat(output)


@pytest.fixture(scope="module")
def groups():
    rng = np.random.default_rng(11)

    def tokens(count):
        return rng.integers(0, 773, count).tolist()

    stem = tokens(15)
    prompts = [tokens(1), tokens(LONGEST - 1), stem, *(stem + tokens(n) for n in (1, 9, 20)), tokens(7), tokens(26)]
    return [
        Group(prompt, [tokens(rng.integers(1, LONGEST - len(prompt) + 1)) for _ in range(several)] + [tokens(room)])
        for several, prompt in enumerate(prompts)
        for room in [LONGEST - len(prompt)]
    ]


@pytest.fixture(scope="module")
def plain(model, groups, plain_logprobs):
    """The oracle's log-probabilities of single tokens, by group and number in the group."""
    return {
        (g, c): plain_logprobs(model, group.prefix, continuation).numpy()
        for g, group in enumerate(groups)
        for c, continuation in enumerate(group.continuations)
    }


@pytest.fixture
def recorded(monkeypatch):
    """The log-probabilities of single tokens, by group and number in the group, of all batches that ran."""
    found = {}
    whole = head.linear_logprob

    def run(model, weight, batch):
        logprobs = whole(batch.hidden(model), weight, batch.targets).double()
        for number, owner in enumerate(batch.continuations):
            assert owner not in found
            found[owner] = logprobs[batch.owners == number].numpy()
        return [(float(found[owner].sum()), False) for owner in batch.continuations]

    monkeypatch.setattr(forward, "_sums", run)
    return found


def test_every_token_is_within_1e5_of_a_plain_forward(model, path, groups, recorded, plain):
    lengths = {len(group.prefix) + len(c) for group in groups for c in group.continuations}
    assert {len(group.continuations) for group in groups} == set(range(1, 9)) and max(lengths) == LONGEST
    sums = continuation_logprobs(model, groups, batch_tokens=150)
    assert recorded.keys() == plain.keys()
    for (g, c), expected in plain.items():
        np.testing.assert_allclose(recorded[g, c], expected, rtol=0, atol=1e-5)
        assert sums[g][c] == pytest.approx(expected.sum(), abs=1e-5 * len(expected))


def test_order_packing_and_batch_size_change_no_score(model, path, groups):
    reference = continuation_logprobs(model, groups)
    rng = np.random.default_rng(3)
    for budget in BUDGETS:
        order = rng.permutation(len(groups))
        inner = [rng.permutation(len(groups[i].continuations)) for i in order]
        shuffled = [
            Group(groups[i].prefix, [groups[i].continuations[j] for j in js])
            for i, js in zip(order, inner, strict=True)
        ]
        got = continuation_logprobs(model, shuffled, batch_tokens=budget)
        for scores, i, js in zip(got, order, inner, strict=True):
            np.testing.assert_allclose(scores, reference[i][js], rtol=1e-6)
