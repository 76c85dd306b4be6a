"""One step of 8-bit block-wise AdamW as an operator of torch, `slmfast::adamw8bit`: one name on every device.

On CUDA the Triton kernel, on a CPU its compiled twin, which gives the same bits. As a custom operator it has a fake
twin, so that a plan of memory can take a step without doing anything.

Kingma and Ba 2014, "Adam", arXiv 1412.6980, with the states of Dettmers et al. 2022, "8-bit Optimizers via Block-wise
Quantization", arXiv 2110.02861. Without weight decay.

Shapes: N weights, B = ceil(N / 256) blocks, C compensated blocks.
"""

import math

import torch
from torch import Tensor

from .dynamic_codes import BLOCK

# Steps of the sequence that decides which sums are rounded the other way (see adamw8bit.py), in 2^-32: the golden
# ratio's over the steps, for which it is the most even, and another irrational number's over the weights.
STEP_STRIDE = 0x9E3779B9
PLACE_STRIDE = 0xC13FA9A9
_LAYOUT = {
    "high": torch.int16,
    "low": torch.int16,
    "gradient": torch.float32,
    "first": torch.uint8,
    "second": torch.uint8,
    "first_scale": torch.float32,
    "second_scale": torch.float32,
    "slots": torch.int32,
    "lowest": torch.int16,
}


@torch.library.custom_op(
    "slmfast::adamw8bit", mutates_args=("high", "low", "first", "second", "first_scale", "second_scale", "lowest")
)
def adamw8bit(
    high: Tensor,
    low: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    first_scale: Tensor,
    second_scale: Tensor,
    slots: Tensor,
    lowest: Tensor,
    rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    number: int,
) -> None:
    """Moves weights and states in place by one step; all tensors are contiguous and on one device.

    The weight is the fp32 number whose bits are (high << 16) + low, high being a bf16 number's bits.

    Args:
        high: int16 [N].
        low: int16 [N].
        gradient: fp32 [N].
        first: uint8 [N], the codes of exp_avg.
        second: uint8 [N], the codes of exp_avg_sq.
        first_scale: fp32 [B], the largest magnitude of each block of exp_avg.
        second_scale: fp32 [B], and of exp_avg_sq.
        slots: int32 [B], the block's row in `lowest`, -1 for none; [0] where no block is compensated.
        lowest: int16 [C, 256], the bits below fp32 of compensated blocks, in 2^-16 of the weight's spacing.
        rate, beta1, beta2, epsilon: Adam's.
        number: which step this is, from 1.

    Raises:
        ValueError: types, shapes or devices don't fit.
    """
    moments = (first, second, first_scale, second_scale)
    _check(dict(zip(_LAYOUT, (high, low, gradient, *moments, slots, lowest), strict=True)))
    size, inverse_root = -rate / (1 - beta1**number), 1 / math.sqrt(1 - beta2**number)
    scalars = (beta1, 1 - beta1, beta2, 1 - beta2, size, inverse_root, epsilon)
    if high.is_cuda:
        from . import adamw8bit as path
    else:
        from . import eager_adamw8bit as path
    path.step(high, low, gradient, moments, slots, lowest, scalars, number)


@adamw8bit.register_fake
def _(*arguments: object) -> None:
    return None


def _check(tensors: dict[str, Tensor]) -> None:
    """Raises ValueError where the tensors are not what the kernels walk over."""
    count = tensors["high"].numel()
    rows = -(-count // BLOCK)
    shapes = {name: (count,) for name in ("high", "low", "gradient", "first", "second")}
    shapes |= {"first_scale": (rows,), "second_scale": (rows,)}
    shapes["slots"] = (rows,) if len(tensors["slots"]) else (0,)
    shapes["lowest"] = (len(tensors["lowest"]), BLOCK)
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name] or tensor.dtype != _LAYOUT[name] or not tensor.is_contiguous():
            dtype = str(_LAYOUT[name]).removeprefix("torch.")
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}: give a contiguous {dtype} {shapes[name]}"
            )
        if tensor.device != tensors["high"].device:
            raise ValueError(f"{name} lies on {tensor.device}, high on {tensors['high'].device}")
