"""Matrix products on a CPU through oneDNN, with what follows them fused in.

torch sends fp32 products to its BLAS. On an AMD EPYC oneDNN, which torch carries as well, is 7 to 14 % faster at the
shapes of Qwen2-0.5B and thousands of rows, and nearly three times at five; what acts on each element of a result
costs nothing while the result is in registers. These operators of torch are those that its compiler emits; they keep
no gradient.
"""

import torch
from torch import Tensor


def serves(*tensors: Tensor) -> bool:
    """Whether oneDNN multiplies these: matrices in memory of a CPU, all fp32 or all bf16, where no gradient is kept."""
    kinds = {(x.device.type, x.dtype) for x in tensors}
    known = kinds in ({("cpu", torch.float32)}, {("cpu", torch.bfloat16)})
    return known and torch.backends.mkldnn.is_available() and not torch.is_grad_enabled()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, silu: bool = False) -> Tensor:
    """x @ weight.T + bias, [..., N] from x [..., K] and weight [N, K]; with `silu` its SiLU."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "swish" if silu else "none", [], "")


def linear_times(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    """(x @ weight.T + bias) * other, [..., N] from x [..., K], weight [N, K] and other [..., N]."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, "mul")
