"""Layers through oneDNN: the same results, where they serve, and nothing left behind."""

import pytest
import torch
from torch.nn import functional

from slmfast.kernels.cpu_products import linear, linear_times, serves
from slmfast.scoring import cpu_layers
from slmfast.scoring.cpu_layers import faster_layers

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
SLACK = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", SLACK)
@pytest.mark.parametrize("shape", [(7, 40), (1, 7, 40), (2, 3, 40), (0, 40), (1, 40)])
@torch.no_grad()
def test_products_equal_float64(dtype, shape):
    if dtype == torch.bfloat16 and not BF16:
        pytest.skip("this processor has no bf16 that oneDNN uses")
    generator = torch.Generator().manual_seed(3)
    x, weight, bias, other = (
        torch.randn(*size, generator=generator).to(dtype) for size in (shape, (24, 40), (24,), (*shape[:-1], 24))
    )
    plain = functional.linear(x.double(), weight.double(), bias.double())
    for got, truth in (
        (linear(x, weight, bias), plain),
        (linear(x, weight), plain - bias.double()),
        (linear(x, weight, bias, silu=True), functional.silu(plain)),
        (linear_times(x, weight, bias, other), plain * other.double()),
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), truth, rtol=SLACK[dtype], atol=SLACK[dtype])


def test_where_it_serves():
    x = torch.ones(2, 2)
    with torch.no_grad():
        assert serves(x, x) and serves(x.bfloat16()) == BF16
        assert not serves(x.double()) and not serves(x, x.bfloat16()) and not serves(x.to("meta"))
    assert not serves(x), "its products keep no gradient"


@torch.no_grad()
def test_every_layer_runs_through_it_and_gives_the_same(build_model, monkeypatch):
    model, ids = build_model(), torch.arange(30)[None]
    expected = model(ids).logits
    linears = sum(type(module) is torch.nn.Linear for module in model.modules())
    calls = {"linear": 0, "linear_times": 0}

    def counted(name, inner):
        def call(*given, **options):
            calls[name] += 1
            return inner(*given, **options)

        monkeypatch.setattr(cpu_layers, name, call)

    counted("linear", linear)
    counted("linear_times", linear_times)
    with faster_layers(model):
        got = model(ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert calls == {"linear": linears - 2, "linear_times": 2}, "each of two MLPs multiplies once by its gate"
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_forward_that_others_have_set_stays(build_model):
    model = build_model()
    layer = model.model.layers[0].mlp.down_proj
    mine = layer.forward = lambda x: x[..., :1].expand(*x.shape[:-1], 64) * 0
    with torch.no_grad(), faster_layers(model):
        assert layer.forward is mine
        model(torch.arange(5)[None])
    assert vars(layer)["forward"] is mine


def test_with_gradients_nothing_changes(build_model):
    model = build_model()
    with faster_layers(model):
        assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_a_hook_inside_an_mlp_is_called(build_model):
    """An MLP in one piece would go past it, and past what it adds."""
    model, ids = build_model(), torch.arange(30)[None]
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda module, given, output: output + 1)
    model.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    expected = model(ids).logits
    with faster_layers(model):
        got = model(ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_bf16_is_left_to_torch_where_onednn_does_not_know_it(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    x = torch.ones(2, 2)
    assert serves(x) and not serves(x.bfloat16())
