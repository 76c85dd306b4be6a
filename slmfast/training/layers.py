"""What some layers of a model do while it trains: the same results with fewer arrays and fewer passes over memory.

- The gradient of a weight is added into its `.grad` where it is made, so that no pack makes a second copy of it; for
  the tied embedding of Qwen2-0.5B that would be 545 MB, nearly all of it zero.
- On a CPU products go through oneDNN, and a gated MLP keeps what its two inner products give and nothing else.
- With checkpointing a decoder layer keeps its input alone and runs again when its gradient is taken. The last one does
  not: its turn comes first.

All other layers are the model's own code, or what `split_weights` has put there.

Shapes: L tokens, H hidden width, I inner width of an MLP.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from slmfast.kernels.cpu_products import linear, serves
from slmfast.scoring.cpu_layers import ROWS, is_gated
from slmfast.training.split_weights import fp32_grad

Forward = Callable[..., Any]


@contextmanager
def training_layers(model: nn.Module, *, plain_fp32: bool, checkpointing: bool) -> Iterator[None]:
    """Inside, the layers of `model` compute as this module says; backward passes belong inside as well.

    Args:
        plain_fp32: the forward is that of the fp32 weights without autocast: oneDNN is given no other.
        checkpointing: decoder layers run again in the backward pass.
    """
    changed = []
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    again = set(layers[:-1]) if checkpointing else set()
    with torch.no_grad():  # oneDNN serves only there, as it does within these functions
        for module in model.modules():
            forward = _embedding(module)
            if forward is None and plain_fp32:
                forward = _product(module)
            if module in again:
                forward = functools.partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
            if forward is not None and "forward" not in vars(module):  # what others have put there stays
                module.forward = forward
                changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _add_product(weight: Tensor, gradient: Tensor, x: Tensor) -> None:
    """Adds gradient.T @ x, of outputs [L, out] and inputs [L, in], to what a weight [out, in] learns."""
    if not weight.requires_grad:
        return
    if weight.grad is None:
        weight.grad = gradient.T @ x
    else:
        weight.grad.addmm_(gradient.T, x)


def _embedding(module: nn.Module) -> Forward | None:
    if type(module) is not nn.Embedding or module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return None
    return lambda ids: _Embed.apply(module.weight, ids, module.padding_idx)


def _product(module: nn.Module) -> Forward | None:
    if is_gated(module):
        parts = module.gate_proj, module.up_proj, module.down_proj
        if all(_is_product(part) and part.bias is None for part in parts):
            return lambda x: _Gated.apply(x, *(part.weight for part in parts))
    if _is_product(module):
        return lambda x: _Linear.apply(x, module.weight, module.bias)
    return None


def _is_product(module: nn.Module) -> bool:
    """Whether a layer is a product that oneDNN serves, and does nothing else."""
    bare = type(module) is nn.Linear and not (module._forward_hooks or module._forward_pre_hooks)
    return bare and "forward" not in vars(module) and serves(module.weight)


# A parameter is kept as an attribute of its context: what checkpointing gives back for a saved tensor is another
# tensor of the same values, whose `.grad` nobody reads.


class _Embed(torch.autograd.Function):
    """Rows of a table [V, H]; the gradient goes to these rows of its buffer and touches no other."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table, ctx.padding = table, padding
        return nn.functional.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        buffer, ids = fp32_grad(ctx.table), ids.flatten()
        rows = gradient.flatten(0, -2).to(buffer.dtype)
        if ctx.padding is not None:  # torch's embedding does not learn that row
            rows = rows.masked_fill((ids == ctx.padding)[:, None], 0.0)
        if buffer.is_cuda:  # each of the two adds in a fixed order on its own device alone
            buffer.index_put_((ids,), rows, accumulate=True)
        else:
            buffer.index_add_(0, ids, rows)
        return None, None, None


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias = weight, bias
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        _add_product(ctx.weight, gradient.flatten(0, -2), x.flatten(0, -2))
        if ctx.bias is not None and ctx.bias.requires_grad:
            fp32_grad(ctx.bias).add_(gradient.flatten(0, -2).sum(0))
        return (linear(gradient, ctx.weight.T) if ctx.needs_input_grad[0] else None), None, None


class _Gated(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)), SwiGLU (Shazeer 2020), in pieces of ROWS whose inner arrays the caches hold."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        output = torch.empty(len(rows), len(down), dtype=x.dtype)
        kept = []
        for piece, place in zip(rows.split(ROWS), output.split(ROWS), strict=True):
            opened, raised = linear(piece, gate), linear(piece, up)
            kept += [opened, raised]
            place.copy_(linear(nn.functional.silu(opened).mul_(raised), down))
        ctx.save_for_backward(x, *kept)
        ctx.weights = gate, up, down
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        x, *kept = ctx.saved_tensors
        gate, up, down = ctx.weights
        output = torch.empty_like(x)
        arrays = (x.flatten(0, -2), gradient.flatten(0, -2), output.flatten(0, -2))
        pieces = zip(*(array.split(ROWS) for array in arrays), kept[::2], kept[1::2], strict=True)
        for rows, above, place, opened, raised in pieces:
            activated = nn.functional.silu(opened)
            _add_product(down, above, activated * raised)
            inner = linear(above, down.T)
            by_raised = activated.mul_(inner)
            by_opened = torch.ops.aten.silu_backward(inner.mul_(raised), opened)
            _add_product(gate, by_opened, rows)
            _add_product(up, by_raised, rows)
            torch.add(linear(by_opened, gate.T), linear(by_raised, up.T), out=place)
        return output, None, None, None
