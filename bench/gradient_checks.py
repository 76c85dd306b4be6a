"""The LM head's gradients against fp64 truth: as training chooses the way, and on CUDA every way there is.

The error of a way, by norm, may not exceed that of plain autograd in the inputs' dtype by more than a twentieth, plus a
little; nor need it be under one rounding to that dtype, which plain autograd may escape by luck where numbers are few.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

LITTLE = 1e-5  # of the gradient's norm
Gradients = tuple[Tensor, Tensor]  # of hidden [N, H] and of weight [V, H]


def check_gradients(hidden: Tensor, weight: Tensor, targets: Tensor) -> Iterator[dict[str, Any]]:
    """Rows {"output", "error", "budget", "passed"} for hidden [N, H], weight [V, H] and targets [N]."""
    generator = torch.Generator(hidden.device).manual_seed(0)
    grad = torch.randn(len(targets), device=hidden.device, generator=generator)
    given = (hidden, weight, targets, grad)
    true, plain = _by_autograd(*given, torch.float64), _by_autograd(*given, hidden.dtype)
    ways = {"as training chooses": _chosen} | (_ways(hidden, weight) if hidden.is_cuda else {})
    for way, call in ways.items():
        for output, mine, usual, exact in zip(("hidden", "weight"), call(*given), plain, true, strict=True):
            size = float(exact.norm())
            error, eager = (float((x.double() - exact).norm()) / size for x in (mine, usual))
            budget = 1.05 * max(eager, torch.finfo(hidden.dtype).eps / 2) + LITTLE
            name = f"gradient of {output}, {way}"
            yield {"output": name, "error": error, "budget": budget, "passed": error <= budget}


def _by_autograd(hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor, dtype: torch.dtype) -> Gradients:
    hidden, weight = (x.detach().clone().to(dtype).requires_grad_() for x in (hidden, weight))
    logits = (hidden @ weight.T).to(torch.promote_types(dtype, torch.float32))
    logprobs = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    return torch.autograd.grad(logprobs, (hidden, weight), grad.to(logprobs.dtype))


def _chosen(hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor) -> Gradients:
    from slmfast.kernels.head_op import accumulating_logprob

    hidden = hidden.detach().requires_grad_()
    weight_grad = torch.zeros(weight.shape, device=weight.device)
    accumulating_logprob(hidden, weight, targets, weight_grad).backward(grad)
    return hidden.grad, weight_grad


def _ways(hidden: Tensor, weight: Tensor) -> dict[str, Callable[..., Gradients]]:
    from slmfast.kernels import head_op, tiled_backward
    from slmfast.kernels.launch import BackwardTiles, backward_workspace

    def by(tiles: BackwardTiles) -> Callable[..., Gradients]:
        def call(hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor) -> Gradients:
            _, log_sum_exp, _ = head_op.logprob_and_normalizer(hidden, weight, targets, 0)
            weight_grad = torch.zeros(weight.shape, device=weight.device)
            size = backward_workspace(*hidden.shape, len(weight), hidden.element_size()).bytes
            workspace = torch.empty(size, dtype=torch.uint8, device=hidden.device).fill_(255)  # NaN in every dtype
            given = (hidden, weight, targets, log_sum_exp, grad, weight_grad, workspace)
            return tiled_backward.accumulate(*given, tiles=tiles), weight_grad

        return call

    return {tiles.name: by(tiles) for tiles in tiled_backward.choices(hidden, weight)}
