"""The labelled-only, sliced head against a plain forward with full logits."""

import pytest
import torch

from slmfast.training import logprobs
from slmfast.training.logprobs import completion_logprobs, forward_precision, make_batch, token_logprobs
from slmfast.training.run import load_model

PAIRS = [([1, 9, 8, 7], [40, 41, 42]), ([1], [5]), ([1, 3, 3], [300, 12, 8, 7, 6, 2])]


def plain_logprobs(model, prompt, completion):
    """Each completion token's log-probability from the logits of one unpadded sequence."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double()
    tokens = torch.tensor(completion)
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, tokens[:, None])[:, 0]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request, make_model, tmp_path):
    return load_model(make_model(tmp_path / "model", seed=3, tied=request.param)).eval()


@pytest.mark.parametrize("per_slice", [1 << 26, 4 * 320, 1], ids=["whole", "sliced", "one at a time"])
def test_equals_a_plain_forward_and_its_gradient(model, monkeypatch, per_slice):
    expected = torch.cat([plain_logprobs(model, *pair) for pair in PAIRS])
    expected.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    monkeypatch.setattr(logprobs, "LOGITS_PER_SLICE", per_slice)
    found = token_logprobs(model, make_batch(PAIRS))
    found.sum().backward()
    assert torch.allclose(found.double(), expected, atol=2e-6)
    for name, parameter in model.named_parameters():
        error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
        assert error < 1e-5, name


def test_completions_sum_their_tokens_in_float64(model):
    sums = completion_logprobs(model, make_batch(PAIRS))
    assert sums.dtype == torch.float64
    assert sums.tolist() == pytest.approx([plain_logprobs(model, *pair).sum().item() for pair in PAIRS], abs=1e-5)


def test_neighbours_in_a_batch_change_nothing(model):
    together = completion_logprobs(model, make_batch(PAIRS))
    alone = torch.cat([completion_logprobs(model, make_batch([pair])) for pair in PAIRS])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_bf16_forward_does_not_round_the_logits(model):
    """With hidden states and weights on the bf16 grid an fp32 head loses nothing; a bf16 one loses eight bits."""
    model.get_output_embeddings().weight.data.mul_(4).copy_(model.get_output_embeddings().weight.bfloat16().float())
    batch = make_batch(PAIRS)
    with torch.no_grad(), forward_precision("bf16", "cpu"):
        found = token_logprobs(model, batch)
        hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    logits = hidden[batch.rows, batch.positions].double() @ model.get_output_embeddings().weight.double().T
    expected = logits.log_softmax(1).gather(1, batch.targets[:, None])[:, 0]
    assert (found.double() - expected).abs().max() < 1e-5
