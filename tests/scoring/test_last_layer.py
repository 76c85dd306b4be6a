"""The last layer's MLP runs where something is predicted, and nothing that is read changes by it."""

import numpy as np
import pytest
import torch

from slmfast.scoring.attention import packing
from slmfast.scoring.batches import make_batches
from slmfast.scoring.cpu_layers import faster_layers
from slmfast.scoring.last_layer import only_at
from slmfast.scoring.loading import evaluating
from slmfast.scoring.packing import Group


@pytest.fixture
def groups():
    rng = np.random.default_rng(2)
    return [Group(rng.integers(0, 700, 30), [rng.integers(0, 700, n) for n in (1, 9, 4)]) for _ in range(3)]


def rows_through(model, groups, layer):
    """How many rows a layer's MLP multiplies, and how many tokens there are."""
    (batch,) = make_batches(groups, 4096, packed=True, device="cpu")
    rows = []
    hook = model.model.layers[layer].mlp.down_proj.register_forward_hook(
        lambda module, given, output: rows.append(output.shape[-2])
    )
    with evaluating(model), packing(model):
        batch.hidden(model)
    hook.remove()
    return sum(rows), batch.tokens


def test_only_what_predicts_goes_through_the_last_mlp(build_model, groups):
    model = build_model()
    # Of every prompt the last token, and of each continuation all but its last.
    assert rows_through(model, groups, -1)[0] == sum(1 + sum(len(c) - 1 for c in g.continuations) for g in groups)
    rows, tokens = rows_through(model, groups, 0)
    assert rows == tokens


@pytest.mark.parametrize("faster", [False, True])
@torch.no_grad()
def test_the_states_that_are_read_stay_and_the_mlp_comes_back(build_model, faster):
    model, ids, places = build_model(), torch.arange(40)[None], torch.tensor([3, 4, 17, 39])
    expected = model.model(ids).last_hidden_state
    with faster_layers(model) if faster else evaluating(model):
        before = model.model.layers[-1].mlp.forward
        with only_at(places, model.model):
            got = model.model(ids).last_hidden_state
        assert model.model.layers[-1].mlp.forward == before
    torch.testing.assert_close(got[:, places], expected[:, places], rtol=0, atol=1e-5)
    assert not torch.isclose(got[:, 5], expected[:, 5], rtol=0, atol=1e-3).all(), "elsewhere nothing is computed"
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_another_kind_of_mlp_computes_all_places(build_model):
    model = build_model()
    model.model.layers[-1].mlp.act_fn = torch.nn.Tanh()
    expected = model.model(torch.arange(9)[None]).last_hidden_state
    with only_at(torch.tensor([1]), model.model):
        got = model.model(torch.arange(9)[None]).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@torch.no_grad()
def test_an_mlp_that_layers_share_computes_all_places(build_model):
    model = build_model()
    model.model.layers[0].mlp = model.model.layers[-1].mlp
    expected = model.model(torch.arange(9)[None]).last_hidden_state
    with only_at(torch.tensor([1]), model.model):
        got = model.model(torch.arange(9)[None]).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
