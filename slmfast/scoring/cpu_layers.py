"""A model's linear layers and gated MLPs through oneDNN while it scores on a CPU; elsewhere nothing changes."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from slmfast.kernels.cpu_products import linear, linear_times, serves

ROWS = 1024  # of an MLP's input at once: at Qwen2-0.5B its two inner arrays then take 40 MB, of which caches hold most


@contextmanager
def faster_layers(model: nn.Module) -> Iterator[None]:
    """Inside, the layers that oneDNN serves run through it; no gradient can be taken there."""
    changed = []
    for module in model.modules():
        forward = _faster(module)
        if forward is not None and "forward" not in vars(module):  # what others have put there stays
            module.forward = forward
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _faster(module: nn.Module):
    if is_gated(module) and all(_is_plain(part) and serves(part.weight) for part in _parts(module)):
        return functools.partial(_gated, module)
    if type(module) is nn.Linear and serves(module.weight):
        return functools.partial(_linear, module)
    return None


def is_gated(module: nn.Module) -> bool:
    """Whether a module has the parts of a SwiGLU (Shazeer 2020) as Llama, Qwen2, Mistral and their like name them."""
    return (
        isinstance(getattr(module, "act_fn", None), nn.SiLU | SiLUActivation)
        and all(isinstance(part, nn.Module) for part in _parts(module))
        and len(list(module.children())) == 4
    )


def _parts(module: nn.Module) -> list[object]:
    return [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]


def _is_plain(part: object) -> bool:
    """Whether a layer does nothing but its product: an MLP in one piece calls none of its hooks."""
    return type(part) is nn.Linear and not (part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


def _gated(module: nn.Module, x: Tensor) -> Tensor:
    gate, up = module.gate_proj, module.up_proj
    output = []
    for rows in x.flatten(0, -2).split(ROWS):
        opened = linear(rows, gate.weight, gate.bias, silu=True)
        output.append(module.down_proj(linear_times(rows, up.weight, up.bias, opened)))
    return torch.cat(output).view(*x.shape[:-1], -1)
