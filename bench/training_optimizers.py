"""The case of the optimizer's step: our 8-bit AdamW beside bitsandbytes' on fp32 weights, time and bytes.

Both have seen the same gradients from the same start. They round their states, each in its way, so the answer is the
update, and the truth Adam in float64: ours may err by no more than the peer does.
"""

import copy
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from result_table import Result
from scoring_model import random_model, with_layers
from timing import stopwatch
from torch import Tensor, nn
from training_context import Context

from slmfast.training.optimizer import BETAS, EPS, make_optimizer
from slmfast.training.settings import TrainSettings
from slmfast.training.split_weights import SplitWeights

STEPS = 7  # the first, which makes the states, is not timed
RATE = 1e-8  # the paper's for KTO
WORDS = 1024  # of the vocabulary: an embedding costs what another matrix does
A_LITTLE = 1.05  # times the peer's error: what ours may err
PEER = "bitsandbytes AdamW8bit on fp32 weights"
OURS = ("adamw8bit-split", "adamw8bit")


@dataclass(eq=False)
class Side:
    """A model with its optimizer."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    weights: Callable[[], Iterator[tuple[str, Tensor]]]
    """Names and fp32 values."""

    def bytes_of_all(self) -> int:
        """Of weights, gradients and states."""
        parameters = list(self.model.parameters())
        held = [t for p in parameters for t in (p, p.grad)]
        held += _tensors(list(self.optimizer.state.values()))
        unique = {t.data_ptr(): t.numel() * t.element_size() for t in held if t.numel()}
        return sum(unique.values())


def optimizer_case(context: Context) -> Iterator[Result]:
    """One row for each of our 8-bit optimizers and each of time, bytes."""
    config = copy.deepcopy(context.config)
    inner = config.get_text_config()
    inner.vocab_size = WORDS
    if context.device.type == "cpu":
        with_layers(config, 1)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(inner, key, None)  # they lie beyond the words that are left
    base = random_model(config, torch.float32, context.device, context.seed)
    context.say(f"optimizer: {STEPS} steps of {PEER} and {' and '.join(OURS)}")
    sides = {name: _side(copy.deepcopy(base), name) for name in (*OURS, PEER)}
    seconds, truth = _run(sides, base, context.seed)
    count = sum(parameter.numel() for parameter in base.parameters())
    errors = {name: _error(side, base, truth) for name, side in sides.items()}
    what = (
        f"optimizer step, {inner.num_hidden_layers} layers of H={inner.hidden_size:,}, {count:,} weights, rate {RATE}"
    )
    for name in OURS:
        same = errors[name] <= A_LITTLE * errors[PEER]
        says = f"update off by {errors[name]:.2%} and {errors[PEER]:.2%}"
        common = {
            "group": "optimizer",
            "peer": PEER,
            "version": importlib.metadata.version("bitsandbytes"),
            "same_answer": same,
        }
        mine, theirs = (float(np.median(seconds[side])) for side in (name, PEER))
        ratio = theirs / mine if same else None
        case = f"{what}: {name} (p50 of {STEPS - 1} steps; {says})"
        yield Result(**common, case=case, ours=mine, theirs=theirs, unit="s", ratio=ratio)
        mine, theirs = (sides[side].bytes_of_all() / count for side in (name, PEER))
        case = f"{what}: {name}, weights, gradients and states (ratio = ours / theirs)"
        common |= {"unit": "bytes a weight", "ratio": mine / theirs if same else None, "ratio_says": "their memory"}
        yield Result(**common, case=case, ours=mine, theirs=theirs)


def _side(model: nn.Module, name: str) -> Side:
    if name == PEER:
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(model.parameters(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=0.0)
        return Side(model, optimizer, lambda: model.named_parameters())
    settings = TrainSettings(method="kto", learning_rate=RATE, optimizer=name)
    masters = SplitWeights(model, "fp32") if name == "adamw8bit-split" else None
    optimizer = make_optimizer(model, settings, 1, masters)
    weights = model.named_parameters if masters is None else (lambda: masters.fp32_parameters(model))
    return Side(model, optimizer, weights)


def _run(sides: dict[str, Side], base: nn.Module, seed: int) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """(the seconds of each side's steps but the first, the updates of Adam in float64)."""
    device = next(base.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    moments = {
        name: [torch.zeros_like(p, dtype=torch.float64) for _ in range(3)] for name, p in base.named_parameters()
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1, STEPS + 1):
        gradients = {
            name: torch.randn(p.shape, generator=generator, device=device) * 1e-4 for name, p in base.named_parameters()
        }
        for name, gradient in gradients.items():
            _adam(*moments[name], gradient.double(), number)
        for name, side in sides.items():
            for key, parameter in side.model.named_parameters():
                parameter.grad = gradients[key].clone()
            taken, _ = stopwatch(lambda side=side: _step(side.optimizer, device))
            if number > 1:
                seconds[name].append(taken)
    return seconds, {name: update for name, (_, _, update) in moments.items()}


def _step(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _adam(first: Tensor, second: Tensor, update: Tensor, gradient: Tensor, number: int) -> None:
    """One step of Adam (Kingma and Ba, 2015), whose update is added up in float64."""
    beta1, beta2 = BETAS
    first.mul_(beta1).add_(gradient, alpha=1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (second / (1 - beta2**number)).sqrt_().add_(EPS)
    update.addcdiv_(first, root, value=-RATE / (1 - beta1**number))


@torch.no_grad()
def _error(side: Side, base: nn.Module, truth: dict[str, Tensor]) -> float:
    """How far the update is from the truth, as a share of its norm."""
    before = dict(base.named_parameters())
    off = sum(
        float((weights.double() - before[name].double() - truth[name]).square().sum())
        for name, weights in side.weights()
    )
    return (off / sum(float(update.square().sum()) for update in truth.values())) ** 0.5


def _tensors(content: Any) -> list[Tensor]:
    """All tensors inside dictionaries and lists."""
    if isinstance(content, Tensor):
        return [content]
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else []
    return [tensor for part in inner for tensor in _tensors(part)]
