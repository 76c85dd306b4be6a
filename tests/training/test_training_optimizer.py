"""AdamW against torch's, and the steps that plain fp32 loses."""

import pytest
import torch

from slmfast.training.optimizer import AdamW, is_too_coarse, make_optimizer
from slmfast.training.settings import TrainSettings


def run(make, start: torch.Tensor, steps: int) -> torch.Tensor:
    """The weights after some steps on the same random gradients."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(start.clone())
    optimizer = make([weights])
    for _ in range(steps):
        weights.grad = torch.randn(start.shape, generator=generator).to(start.dtype)
        optimizer.step()
    return weights.detach()


def test_equals_torch_where_nothing_is_lost():
    start = torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    ours = run(lambda p: AdamW(p, lr=1e-2), start, 10)
    torchs = run(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0), start, 10)
    assert torch.allclose(ours, torchs, rtol=1e-6, atol=1e-7)


def test_compensation_keeps_what_plain_fp32_loses():
    """300 equal steps of 1e-8 move a norm's weight of 1 by 3e-6, of which fp32 alone keeps nothing."""

    def constant_run(smallest_step):
        weights = torch.nn.Parameter(torch.ones(4))
        optimizer = AdamW([weights], lr=1e-8, smallest_step=smallest_step)
        for _ in range(300):
            weights.grad = torch.ones(4)
            optimizer.step()
        return 1.0 - weights.detach().double()

    assert (constant_run(0.0) == 0).all()
    spacing = 2.0**-24  # of fp32 just below 1
    assert (constant_run(1e-8) - 3e-6).abs().max() <= spacing


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_optimizers_of_whole_weights_move_weights_too_large_for_a_step(name):
    """A norm, and a matrix whose states have 8 bits: 300 steps of 1e-8 leave their mark on 1.0, 0.5 and 0.25."""
    model = torch.nn.ParameterDict(
        {"norm": torch.ones(896), "matrix": torch.full((80, 80), 0.5), "least": torch.full((80, 80), 0.25)}
    )
    optimizer = make_optimizer(model, TrainSettings(method="sft", learning_rate=1e-8, optimizer=name), warmup_steps=1)
    start = {key: weights.detach().clone() for key, weights in model.items()}
    for _ in range(300):
        for weights in model.values():
            weights.grad = torch.ones_like(weights)
        optimizer.step()
    for key, weights in model.items():
        moved = start[key].double() - weights.detach().double()
        assert (moved - 3e-6).abs().max() <= 2.0**-24 + 0.02 * 3e-6, key  # one spacing, and 8 bits' own error


def test_compensated_weights_follow_float64():
    start = torch.linspace(-2, 2, 101)
    ours = run(lambda p: AdamW(p, lr=1e-7, smallest_step=1e-7), start, 200)
    exact = run(lambda p: torch.optim.AdamW(p, lr=1e-7, weight_decay=0.0), start.double(), 200)
    plain = run(lambda p: AdamW(p, lr=1e-7), start, 200)
    error = (ours.double() - exact).norm()
    assert error < 0.1 * (plain.double() - exact).norm()
    assert ((ours.double() - exact).abs() <= 2.0**-23).all()  # one spacing below 2


@pytest.mark.parametrize(
    ("largest", "step", "coarse"),
    [(0.3, 1e-8, True), (0.24, 1e-8, False), (0.07, 1e-8 / 3, True), (0.06, 1e-8 / 3, False), (0.0, 1e-8, False)],
)
def test_what_is_too_coarse(largest, step, coarse):
    assert is_too_coarse(torch.tensor([0.0, -largest]), step) is coarse
    if largest and coarse:
        assert torch.tensor(largest) + torch.tensor(step) == torch.tensor(largest)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_the_settings_choose_the_optimizer(name):
    model = torch.nn.Linear(80, 80)
    settings = TrainSettings(method="sft", learning_rate=1e-3, optimizer=name)
    optimizer = make_optimizer(model, settings, warmup_steps=1)
    before = model.weight.detach().clone()
    model.weight.grad = torch.randn(80, 80, generator=torch.Generator().manual_seed(2))
    optimizer.step()
    moved = (model.weight.detach() - before) / 1e-3
    # Adam's first step is the gradient's sign times the rate, whatever the precision of its states.
    assert torch.allclose(moved, -model.weight.grad.sign(), atol=0.02)
    bits = optimizer.state[model.weight]
    assert (bits["state1"].dtype == torch.uint8) if name == "adamw8bit" else (bits["exp_avg"].dtype == torch.float32)


def test_embeddings_have_8_bit_states_as_well():
    """transformers' own trainer keeps them in fp32, 8 bytes a weight where 2 do."""
    model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 80))
    optimizer = make_optimizer(model, TrainSettings(method="sft", learning_rate=1e-3, optimizer="adamw8bit"), 1)
    model(torch.arange(100)).sum().backward()
    optimizer.step()
    for weight in (model[0].weight, model[1].weight):
        assert optimizer.state[weight]["state1"].dtype == optimizer.state[weight]["state2"].dtype == torch.uint8
    assert optimizer.state[model[1].bias]["state1"].dtype == torch.float32
