"""Matrix products on a CPU through oneDNN, with what follows them fused in.

torch sends fp32 products to its BLAS. On an AMD EPYC oneDNN, which torch carries as well, is 7 to 14 % faster at the
shapes of Qwen2-0.5B and thousands of rows, and nearly three times at five; what acts on each element of a result
costs nothing while the result is in registers. These operators of torch are those that its compiler emits; they keep
no gradient.
"""

import torch
from torch import Tensor

from .planned import like_cuda


def serves(*tensors: Tensor) -> bool:
    """Whether oneDNN multiplies these without a gradient: a CPU's, all fp32, or all bf16 where the CPU knows it."""
    kinds = {(x.device.type, x.dtype) for x in tensors}
    if any(map(like_cuda, tensors)) or not torch.backends.mkldnn.is_available() or torch.is_grad_enabled():
        return False
    # Of bf16 oneDNN asks for AVX-512 or the like; torch's own layers work without.
    in_bf16 = kinds == {("cpu", torch.bfloat16)} and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return kinds == {("cpu", torch.float32)} or in_bf16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, silu: bool = False) -> Tensor:
    """x @ weight.T + bias, [..., N] from x [..., K] and weight [N, K]; with `silu` its SiLU."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "swish" if silu else "none", [], "")


def linear_times(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    """(x @ weight.T + bias) * other, [..., N] from x [..., K], weight [N, K] and other [..., N]."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, "mul")
