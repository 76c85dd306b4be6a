"""The optimizers and the schedule.

A step at a rate of 1e-8 is smaller than half the spacing of an fp32 weight of 0.25, and a warm-up step than that of
0.06: norms, large biases and some rows would stand still. AdamW here keeps what rounding lost of such tensors and adds
it to the next step (Kahan summation, as Zamirai et al., "Revisiting BFloat16 Training", arXiv 2010.06192, use it).
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slmfast.errors import UserError
from slmfast.training.settings import TrainSettings
from slmfast.training.split_weights import SplitWeights, has_values

BETAS = (0.9, 0.999)
EPS = 1e-8


class AdamW(torch.optim.Optimizer):
    """Adam on fp32 weights with fp32 states, as torch.optim.AdamW without weight decay, but losing no small step.

    Decoupled weight decay is left out: 1 - rate * decay rounds to 1 at the rates this is for, and the method uses none.

    Args:
        smallest_step: tensors are compensated whose largest weight is too coarse for a step of this size.
    """

    def __init__(
        self,
        parameters: Any,
        lr: float,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
        smallest_step: float = 0.0,
    ):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "smallest_step": smallest_step})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Moves every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            if is_too_coarse(parameter, group["smallest_step"]):
                state["residual"] = torch.zeros_like(parameter)
        state["step"] += 1
        (beta1, beta2), gradient = group["betas"], parameter.grad
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = math.sqrt(1 - beta2 ** state["step"])
        denominator = state["exp_avg_sq"].sqrt().div_(root).add_(group["eps"])
        size = -group["lr"] / (1 - beta1 ** state["step"])
        if "residual" not in state:
            parameter.addcdiv_(state["exp_avg"], denominator, value=size)
            return
        wanted = state["residual"].addcdiv_(state["exp_avg"], denominator, value=size)
        state["residual"] = _add_compensated(parameter, wanted)


def _add_compensated(parameter: Tensor, wanted: Tensor) -> Tensor:
    """Adds to a parameter what fp32 can add of `wanted`, and returns the rest, in the memory of `wanted`."""
    moved = parameter + wanted
    rest = wanted.sub_(moved - parameter)
    parameter.copy_(moved)
    return rest


def is_too_coarse(weights: Tensor, step: float) -> bool:
    """Does half the fp32 spacing at the largest weight reach `step`, so that adding it may change nothing?"""
    if not has_values(weights) or step <= 0:
        return False
    return bool(half_spacing(weights.detach().abs().max()) >= step)


def half_spacing(weights: Tensor) -> Tensor:
    """Half the distance from each weight to the next larger fp32 number, float64; 0 for a weight of 0."""
    _, exponent = torch.frexp(weights.double())  # a weight lies in [2^(exponent-1), 2^exponent)
    return torch.where(weights == 0, 0.0, torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - 25))


def make_optimizer(
    model: nn.Module, settings: TrainSettings, warmup_steps: int, masters: SplitWeights | None = None
) -> torch.optim.Optimizer:
    """The optimizer of the settings over a model's parameters: fp32, or split by `masters`.

    Raises:
        UserError: the optimizer and the masters don't belong together.
    """
    if settings.splits_weights != (masters is not None):
        raise UserError(
            f"optimizer is {settings.optimizer!r} for weights that are {'split' if masters else 'whole'}: "
            'split weights, and they alone, take "adamw8bit-split"'
        )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    smallest = settings.learning_rate / max(1, warmup_steps)
    if settings.optimizer == "adamw":
        return AdamW(parameters, lr=settings.learning_rate, smallest_step=smallest)
    if masters is not None:
        # It builds on this module, and brings in the compiler of the CPU's kernel.
        from slmfast.training.split_adamw import SplitAdamW8bit

        return SplitAdamW8bit(parameters, masters, lr=settings.learning_rate, smallest_step=smallest)
    return _adamw8bit_class()(parameters, settings.learning_rate, smallest)


@functools.cache
def _adamw8bit_class() -> type[torch.optim.Optimizer]:
    # On a machine without a GPU it reports, at import, kernels that 8-bit optimizers don't need.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    import bitsandbytes

    class AdamW8bit(bitsandbytes.optim.AdamW8bit):
        """bitsandbytes' optimizer, with the compensation of `AdamW`: states of 8 bits, small tensors' of 32.

        It adds its step to whatever it is given as the weights. Without weight decay the step does not depend on
        them, so a coarse tensor's step is taken on the residual, where nothing is lost.
        """

        def __init__(self, parameters: Any, lr: float, smallest_step: float):
            super().__init__(parameters, lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0)
            self._smallest_step = smallest_step

        @torch.no_grad()
        def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
            super().init_state(group, p, gindex, pindex)
            if is_too_coarse(p, self._smallest_step):
                self.state[p]["residual"] = torch.zeros_like(p)

        @torch.no_grad()
        def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
            residual = self.state[p].get("residual")
            if residual is None:
                super().update_step(group, p, gindex, pindex)
                return
            weights = p.data
            p.data = residual
            super().update_step(group, p, gindex, pindex)
            wanted, p.data = p.data, weights
            self.state[p]["residual"] = _add_compensated(p, wanted)

    return AdamW8bit


def rate_factor(settings: TrainSettings, total: int) -> Callable[[int], float]:
    """The share of the peak rate at each step, counted from 0, of a run of `total` steps.

    With W warm-up steps the rate is 1/W at step 0, so that no sample is thrown away, and 1 at step W - 1; from there
    a cosine or a line leads to 0 just after the last step.
    """
    warmup = settings.warmup_steps(total)
    peak = max(0, warmup - 1)

    def factor(step: int) -> float:
        if step < peak:
            return (step + 1) / warmup
        if settings.schedule == "constant":
            return 1.0
        left = min(1.0, (step - peak) / max(1, total - peak))
        return 1.0 - left if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * left))

    return factor
