"""AdamW with 8-bit states on split fp32 weights: 10 bytes a weight and a thirty-second, gradient included.

2 for each half of the weight, 4 for the gradient, 1 for each state and 8 for every 256 weights. bitsandbytes' 8-bit
AdamW on fp32 weights takes 10 as well, but a bf16 forward then makes copies of the weights, and transformers keeps
every embedding's states in fp32 beside it. Here embeddings have 8-bit states as all other matrices.

Blocks of 256 weights in which a step at the peak rate could vanish even in fp32 carry 16 more bits a weight. During
warm-up, when steps are shorter still, only tensors of less than 4,096 weights are compensated for that.
"""

from typing import Any

import torch
from torch import Tensor

from slmfast.kernels.adamw8bit_op import adamw8bit
from slmfast.kernels.dynamic_codes import BLOCK
from slmfast.training.optimizer import BETAS, EPS, AdamW, half_spacing
from slmfast.training.split_weights import SplitWeights, has_values

_STATES = ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "slots", "lowest")


class SplitAdamW8bit(AdamW):
    """Adam with 8-bit states where `masters` has split a parameter, and as `AdamW` on the others.

    The state of a split parameter is there from the start: "low", its low half; "exp_avg" and "exp_avg_sq", 8-bit
    codes; "exp_avg_scale" and "exp_avg_sq_scale", fp32, one to a block of 256; "slots" and "lowest", which blocks are
    compensated and their bits below fp32. A state that is saved and loaded goes on bit for bit.

    Args:
        parameters: all that is trained.
        masters: who split some of them.
        lr: the peak rate, which decides which blocks are compensated.
        smallest_step: as for `AdamW`, for the parameters that are not split.
    """

    def __init__(
        self,
        parameters: Any,
        masters: SplitWeights,
        lr: float,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
        smallest_step: float = 0.0,
    ):
        super().__init__(parameters, lr=lr, betas=betas, eps=eps, smallest_step=smallest_step)
        self._masters = masters
        for parameter in self._parameters():
            if parameter in masters.low:
                self.state[parameter].update(_fresh_state(parameter, masters, lr))

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @property
    def compensated(self) -> int:
        """How many split weights carry more bits than fp32."""
        return sum(state["lowest"].numel() for state in self.state.values() if "lowest" in state)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        if parameter not in self._masters.low:
            super()._update(parameter, group)
            return
        state = self.state[parameter]
        state["step"] += 1
        adamw8bit(
            parameter.detach().view(torch.int16).view(-1),
            state["low"].view(-1),
            parameter.grad.reshape(-1),
            *(state[name] for name in _STATES),
            group["lr"],
            *group["betas"],
            group["eps"],
            state["step"],
        )

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a saved state bit for bit; torch's own would cast it to the parameters' type."""
        before = dict(self.state)
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        parameters = self._parameters()
        for number, saved in state_dict["state"].items():
            parameter = parameters[int(number)]
            state = {
                key: value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                for key, value in saved.items()
            }
            if parameter in self._masters.low:
                # The low half is one tensor with the forward pass's, and stays it.
                state["low"] = before[parameter]["low"].copy_(state["low"])
            self.state[parameter].update(state)


def _fresh_state(parameter: Tensor, masters: SplitWeights, rate: float) -> dict[str, Any]:
    """The state before the first step."""
    count, device = parameter.numel(), parameter.device
    rows = -(-count // BLOCK)
    slots = _slots(masters.merged(parameter).view(-1), rate)
    compensated = int(slots.max()) + 1 if len(slots) else 0
    return {
        "step": 0,
        "low": masters.low[parameter],
        "exp_avg": torch.zeros(count, dtype=torch.uint8, device=device),
        "exp_avg_sq": torch.zeros(count, dtype=torch.uint8, device=device),
        "exp_avg_scale": torch.zeros(rows, device=device),
        "exp_avg_sq_scale": torch.zeros(rows, device=device),
        "slots": slots,
        "lowest": torch.zeros(compensated, BLOCK, dtype=torch.int16, device=device),
    }


def coarse_blocks(weights: Tensor, rate: float) -> int:
    """How many blocks of flat fp32 weights a step of `rate` could leave as they are."""
    return int((_slots(weights, rate) >= 0).sum())


def _slots(weights: Tensor, rate: float) -> Tensor:
    """Numbers the blocks [B] that a step of `rate` could leave as they are; -1 for the others, [0] if there is none."""
    none = torch.empty(0, dtype=torch.int32, device=weights.device)
    if not has_values(weights):
        return none
    whole = len(weights) // BLOCK * BLOCK
    largest = weights[:whole].view(-1, BLOCK).abs().amax(1)
    if whole < len(weights):
        largest = torch.cat([largest, weights[whole:].abs().amax()[None]])
    coarse = half_spacing(largest) >= rate
    if not coarse.any():
        return none
    return torch.where(coarse, coarse.cumsum(0) - 1, -1).to(torch.int32)
