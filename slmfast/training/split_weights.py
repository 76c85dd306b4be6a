"""Masters of fp32 in two halves: the bf16 number that a forward pass reads, and the 16 bits that it does not.

The bits of an fp32 weight are (high << 16) + low. High is the bits of the nearest bf16 number and low a signed 16-bit
integer, so every fp32 number has one pair. A number halfway between two of bf16 goes away from zero: to even it could
not go, since 65,537 fp32 numbers round to each even one and low has 65,536 values.

The matrices of linear layers and embeddings are split in place: a parameter stays what it is, tied ones stay tied, and
only its data become bf16. Its gradient is fp32 (torch's `grad_dtype`), so packs accumulate and clipping works as with
fp32 weights. All other parameters stay fp32, those of layers that are subclasses of the two as well.
"""

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from slmfast.errors import UserError
from slmfast.kernels.planned import like_cuda

FORWARDS = ("bf16", "split", "fp32")
KINDS = (nn.Linear, nn.Embedding)  # and none of their subclasses
LEAST = 4096  # weights: smaller tensors are not split and have fp32 states, as bitsandbytes' do


def split(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of fp32 weights: high, bf16, and low, int16, both of the weights' shape and contiguous.

    Numbers that bf16 can't hold keep their low half beside an infinity, and merge back exactly as well.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    weights = weights.detach().contiguous()
    if has_values(weights) and not torch.isfinite(torch.stack(weights.aminmax())).all():
        raise UserError("a weight is NaN or infinite: train from a model whose weights are finite")
    bits = weights.view(torch.int32)
    buffer = (bits + 0x8000).bitwise_right_shift_(16)  # the one temporary of the weights' size
    high = buffer.to(torch.int16)
    low = torch.sub(bits, buffer.bitwise_left_shift_(16), out=buffer).to(torch.int16)
    return high.view(torch.bfloat16), low


def merge(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 weights of the halves, new and bit for bit what was split."""
    bits = high.detach().view(torch.int16).to(torch.int32)
    return bits.bitwise_left_shift_(16).add_(low).view(torch.float32)


def seen_by_split(weights: Tensor) -> Tensor:
    """What a "split" forward multiplies by in place of fp32 weights, float64: high and the bf16 number nearest to low.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    high = split(weights)[0].float()
    return (weights.detach() - high).bfloat16().double().add_(high)


def has_values(tensor: Tensor) -> bool:
    """Whether there is anything to look at: not in an empty tensor, nor in the fake ones that a plan of memory uses."""
    return tensor.numel() > 0 and not isinstance(tensor, FakeTensor)


def fp32_grad(parameter: Tensor) -> Tensor:
    """The parameter's gradient, fp32, zeros if it has none yet: what a fused backward adds into, in place."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
    return parameter.grad


_masters: WeakKeyDictionary[nn.Module, "SplitWeights"] = WeakKeyDictionary()


def masters_of(model: nn.Module) -> "SplitWeights | None":
    """Who has split a model's weights; None where they are whole."""
    return _masters.get(model)


def splittable(model: nn.Module) -> set[Tensor]:
    """The parameters of a model, whole or fake, that are split: large, fp32, trained, of linear layers and embeddings.

    Of a subclass of theirs, such as an embedding that scales its rows, nobody here knows what it computes: its weight
    stays whole, and so does one that it shares with a plain layer.
    """
    plain, other = set(), set()
    for module in model.modules():
        if type(module) in KINDS:
            plain.add(module.weight)
        else:
            other.update(module.parameters(recurse=False))
    fit = lambda weight: weight.numel() >= LEAST and weight.dtype == torch.float32 and weight.requires_grad  # noqa: E731
    return {weight for weight in plain - other if fit(weight)}


class SplitWeights:
    """Splits a model's fp32 matrices and keeps their low halves. Make it when the model is on its device.

    Embeddings give the merged fp32 rows of their tokens. With `forward` one decides what linear layers compute with:

    - "bf16": the high halves; call the model under bf16 autocast. The result is that of fp32 weights under autocast.
    - "split": x_bf16 @ high + x_bf16 @ low, the low part as the bf16 number nearest to it; products in fp32.
    - "fp32": the merged weights, a matrix at a time, forward and again backward.

    Raises:
        UserError: a weight is not finite.
    """

    def __init__(self, model: nn.Module, forward: str = "bf16"):
        if forward not in FORWARDS:
            raise UserError(f"forward is {forward!r}: set it to one of {', '.join(FORWARDS)}")
        self.low: dict[Tensor, Tensor] = {}
        """The low half of each parameter that is split, by the parameter; int16, updated in place."""
        self.packable: bool | None = None
        """Whether the model's sequences may share a pack, from who asked before its weights were split."""
        taken = splittable(model)
        for module in model.modules():
            if type(module) in KINDS and module.weight in taken:
                self._take(module.weight)
                self._patch(module, forward)
        _masters[model] = self

    def _take(self, weight: nn.Parameter) -> None:
        """Splits a weight, once where it is tied."""
        if weight not in self.low:
            high, self.low[weight] = split(weight)
            weight.data = high
            weight.grad_dtype = torch.float32

    def _patch(self, module: nn.Linear | nn.Embedding, forward: str) -> None:
        # The new forward holds what it needs and not the module, which would keep itself alive.
        weight, low = module.weight, self.low[module.weight]
        if isinstance(module, nn.Embedding):
            if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
                raise UserError("an embedding has max_norm, scale_grad_by_freq or sparse: take another optimizer")
            padding = module.padding_idx
            module.forward = lambda ids: _Embedding.apply(weight, low, ids, padding)
        elif forward != "bf16":
            product, bias = _Fp32Linear if forward == "fp32" else _SplitLinear, module.bias
            module.forward = lambda x: _linear(product, x, weight, low, bias)

    def merged(self, parameter: Tensor) -> Tensor:
        """The parameter in fp32: new memory if it is split, else itself, detached."""
        if parameter in self.low:
            return merge(parameter, self.low[parameter])
        return parameter.detach()

    def full(self, parameter: Tensor) -> Tensor:
        """The same as part of a graph: a gradient for it is the parameter's, in fp32."""
        return _Merged.apply(parameter, self.low[parameter]) if parameter in self.low else parameter

    def fp32_parameters(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Names and fp32 values of all parameters, merged one at a time: what is saved."""
        for name, parameter in model.named_parameters():
            yield name, self.merged(parameter)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, low: Tensor) -> Tensor:
        return merge(weight, low)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Embedding(torch.autograd.Function):
    """Rows in fp32. Their gradients go straight into the weight's, with no second matrix of the vocabulary's size."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, low: Tensor, ids: Tensor, padding: int | None) -> Tensor:
        ctx.weight, ctx.padding = weight, padding
        ctx.save_for_backward(ids)
        return merge(F.embedding(ids, weight.detach()), F.embedding(ids, low))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        (ids,) = ctx.saved_tensors
        rows, places = gradient.reshape(-1, gradient.shape[-1]), ids.reshape(-1)
        if ctx.padding is not None:
            rows = rows.masked_fill((places == ctx.padding)[:, None], 0.0)
        total = fp32_grad(ctx.weight)
        # In an order that does not change from run to run: each device has its own operator for that.
        if total.is_cuda:
            total.index_put_((places,), rows, accumulate=True)
        else:
            total.index_add_(0, places, rows)
        return None, None, None, None


def _linear(product: Any, x: Tensor, weight: Tensor, low: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        y = product.apply(x.reshape(-1, x.shape[-1]), weight, low)
        return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


class _Fp32Linear(torch.autograd.Function):
    """x [N, I] by the merged weight [O, I]; the weight's gradient is added to where it accumulates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, low: Tensor) -> Tensor:
        x = x.float()
        ctx.weight, ctx.low = weight, low
        ctx.save_for_backward(x)
        return x @ merge(weight, low).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        fp32_grad(ctx.weight).addmm_(gradient.T, x)
        return gradient @ merge(ctx.weight, ctx.low), None, None


class _SplitLinear(torch.autograd.Function):
    """x [N, I], rounded to bf16, by both halves of the weight [O, I]; for its gradient the weight is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, low: Tensor) -> Tensor:
        x = x.bfloat16()
        ctx.weight, ctx.low = weight, low
        ctx.save_for_backward(x)
        return _times_both(x, weight.detach(), low, transposed=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        gradient = gradient.bfloat16()
        fp32_grad(ctx.weight).add_(_product(gradient.T, x))
        return _times_both(gradient, ctx.weight.detach(), ctx.low, transposed=False), None, None


def _times_both(x: Tensor, high: Tensor, low: Tensor, transposed: bool) -> Tensor:
    """x by the high halves and by the low ones' bf16 value, or by both transposed; fp32."""
    rest = merge(high, low).sub_(high).bfloat16()
    halves = (high.T, rest.T) if transposed else (high, rest)
    return _product(x, halves[0]).add_(_product(x, halves[1]))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of bf16 matrices in fp32: on tensor cores where there are any."""
    if like_cuda(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
