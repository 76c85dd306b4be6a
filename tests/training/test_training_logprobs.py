"""Packs, the head on targets alone, and the layers of training against a plain forward with full logits."""

from contextlib import nullcontext

import pytest
import torch

from slmfast.training import layers
from slmfast.training.loading import load_model
from slmfast.training.logprobs import forward_precision, target_logprobs
from slmfast.training.passes import Passes, numbers

CPU = torch.device("cpu")
STEM = [1, 9, 8, 7, 11, 12, 13, 14, 15, 16]
PAIRS = [
    (STEM, [40, 41, 42]),
    ([1], [5]),
    ([1, 3, 3], [300, 12, 8, 7, 6, 2]),
    (STEM, [5, 5, 5, 5]),  # shares its prompt
    ([*STEM[:-1], 3], [40, 0, 41]),  # shares a beginning; 0 is the padding
]


def plain_logprobs(model, prompt, completion):
    """Each completion token's log-probability from the logits of one unpadded sequence."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double()
    tokens = torch.tensor(completion)
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, tokens[:, None])[:, 0]


def plain_sums(model):
    return torch.stack([plain_logprobs(model, *pair).sum() for pair in PAIRS])


def packed_sums(model, passes, budget, then=lambda loss: None):
    """The log-probability of each pair, and `then` called with the weighted sum of every pack."""
    found = torch.zeros(len(PAIRS), dtype=torch.float64)
    with passes.training(model, PAIRS, budget) as packs:
        for batch in packs:
            mine = passes.train_logprobs(model, batch)
            found[numbers(batch)] = mine.detach()
            then((mine * WEIGHTS[numbers(batch)]).sum())
    return found


WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5], dtype=torch.float64)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request, make_model, tmp_path):
    return load_model(make_model(tmp_path / "model", seed=3, tied=request.param)).eval()


def taken(model):
    """The gradients, which it also removes from the model."""
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("rows", [1024, 3], ids=["MLP whole", "MLP in pieces"])
@pytest.mark.parametrize("budget", [1, 14, 1000])
def test_equals_a_plain_forward_and_its_gradient(model, monkeypatch, budget, rows):
    expected = plain_sums(model)
    (expected * WEIGHTS).sum().backward()
    gradients = taken(model)

    monkeypatch.setattr(layers, "ROWS", rows)
    found = packed_sums(model, Passes("fp32", False, CPU), budget, torch.Tensor.backward)
    assert torch.allclose(found, expected.detach(), atol=2e-6)
    for name, gradient in taken(model).items():
        error = (gradient - gradients[name]).norm() / gradients[name].norm()
        assert error < 1e-5, name


def test_checkpointed_layers_change_no_bit(model):
    runs = []
    for checkpointing in (False, True):
        sums = packed_sums(model, Passes("fp32", checkpointing, CPU), 20, torch.Tensor.backward)
        runs.append((sums, taken(model)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(gradient, runs[1][1][name]) for name, gradient in runs[0][1].items())


def test_checkpointing_runs_every_layer_but_the_last_again(model, monkeypatch):
    packed_sums(model, Passes("fp32", False, CPU), 1000)  # finds out, with calls of its own, that the model packs
    calls, kind = [], type(model.model.layers[0].self_attn)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *args, **named: calls.append(1) or forward(*args, **named))
    for checkpointing, expected in ((False, 2), (True, 3)):
        calls.clear()
        packed_sums(model, Passes("fp32", checkpointing, CPU), 1000, torch.Tensor.backward)
        assert len(calls) == expected


def test_frozen_weights_learn_nothing_and_the_others_as_before(model):
    packed_sums(model, Passes("fp32", False, CPU), 1000, torch.Tensor.backward)
    every = taken(model)
    frozen = [name for name, _ in model.named_parameters() if "up_proj" in name or "v_proj" in name]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    packed_sums(model, Passes("fp32", False, CPU), 1000, torch.Tensor.backward)
    assert len(frozen) == 6
    for name, parameter in model.named_parameters():
        assert parameter.grad is None if name in frozen else torch.equal(parameter.grad, every[name]), name


def test_without_gradients_the_values_are_the_same_to_the_bit(model):
    passes = Passes("fp32", False, CPU)
    with_gradient = packed_sums(model, passes, 20, torch.Tensor.backward)
    assert torch.equal(passes.same_without_gradient(model, PAIRS, 20), with_gradient)


@pytest.mark.parametrize("budget", [1, 20, 1000])
def test_scores_are_those_of_a_plain_forward(model, budget):
    found = Passes("fp32", False, CPU).score(model, PAIRS, budget)
    assert found.dtype == torch.float64 and not found.requires_grad
    assert found.tolist() == pytest.approx(plain_sums(model).tolist(), abs=1e-5)


def test_layers_come_back_as_they_were(model):
    with pytest.raises(ZeroDivisionError), Passes("fp32", True, CPU).training(model, PAIRS, 20):
        assert any("forward" in vars(module) for module in model.modules())
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.config._attn_implementation == "sdpa"


def test_a_forward_that_somebody_has_put_there_stays(model):
    layer = model.model.layers[0].mlp
    layer.forward = lambda x: x * 0
    expected = plain_sums(model)
    assert torch.allclose(packed_sums(model, Passes("fp32", False, CPU), 1000), expected.detach(), atol=2e-6)


def test_a_bf16_forward_does_not_round_the_logits(model):
    """With hidden states and weights on the bf16 grid an fp32 head loses nothing; a bf16 one loses eight bits."""
    model.get_output_embeddings().weight.data.mul_(4).copy_(model.get_output_embeddings().weight.bfloat16().float())
    passes = Passes("bf16", False, CPU)
    with torch.no_grad(), passes.training(model, PAIRS, 1000) as packs:
        (batch,) = packs
        found = target_logprobs(model, batch, "bf16")
        with forward_precision("bf16", "cpu"):
            hidden = batch.hidden(model)
    logits = hidden.double() @ model.get_output_embeddings().weight.double().T
    expected = logits.log_softmax(1).gather(1, batch.targets[:, None])[:, 0]
    assert hidden.dtype == torch.bfloat16 or not torch.equal(hidden, hidden.bfloat16().float())
    assert (found.double() - expected).abs().max() < 1e-5


def test_only_bf16_autocasts():
    assert isinstance(forward_precision("fp32", "cpu"), nullcontext)
    assert isinstance(forward_precision("split", "cpu"), nullcontext)
    with forward_precision("bf16", "cpu"):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
