"""The LM head as operators of torch: one name on every device.

`linear_logprob` scores; `accumulating_logprob` trains, with a backward that holds no logits of the whole vocabulary
and adds the weight's gradient to a buffer of the caller's. On CUDA the fastest of the kernels and the cuBLAS paths
runs, each in the sizes that launch.py names; elsewhere, and on CUDA without Triton, the tiled eager path.

As custom operators they have fake twins: under FakeTensorMode a plan of memory sees results and no logits, which is
what every device holds, without running anything. The backward's working memory is an argument, so that a plan sees
it too. Fake tensors on a CPU stand for a CUDA device.

Shapes: N positions, H hidden width, V vocabulary.
"""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import eager_backward, eager_logprob
from .fastest import bucket, fastest
from .launch import MIB, TILED_BYTES, backward_workspace
from .planned import like_cuda
from .reference import check_shapes
from .sums import LogSums

REPEATS = 3
# What a CPU keeps of the logits for the backward, so as not to multiply again: at V = 151,936 all of 441 positions'.
KEPT_BYTES = 256 * MIB


@torch.library.custom_op("slmfast::linear_logprob", mutates_args=())
def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the targets, fp32 [N], and entropies in nats, fp32 [N], or [0] where not asked for.

    The third says which targets no word is likelier than, bool [N]: greedy decoding would choose them.

    Args:
        hidden: [N, H], any float dtype; on CUDA bf16, fp16 or fp32.
        weight: [V, H]; on CUDA the same dtype.
        targets: int64 [N], each in 0..V-1.
        entropy: whether entropies are wanted.

    Raises:
        ValueError: shapes, dtypes or devices don't fit; away from CUDA also where a target is no row of `weight`. On
            CUDA, where to look would be to wait for the device, such a target gives NaN.
    """
    path = _fastest_on_cuda if _on_kernels(hidden) else _eager
    sums = path(hidden, weight, targets, entropy)
    return sums.logprob(), sums.entropy() if entropy else sums.total.new_empty(0), sums.greedy()


@linear_logprob.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    check_shapes(hidden, weight, targets)
    logprob = targets.new_empty(targets.shape, dtype=torch.float32)
    spread = torch.empty_like(logprob) if entropy else logprob.new_empty(0)
    return logprob, spread, torch.empty_like(logprob, dtype=torch.bool)


def accumulating_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, weight_grad: Tensor | None) -> Tensor:
    """The natural log-probability of one target a position under softmax(hidden @ weight.T), fp32 [N], to train with.

    Its backward gives `hidden` its gradient through autograd, and adds the weight's to `weight_grad` in place: the head
    and the embedding of a tied model gather theirs in one buffer, and no [V, H] temporary exists. `weight` itself gets
    no gradient from autograd. A position whose log-probability has a gradient of 0 adds exactly nothing. A backward
    that runs twice adds twice. The values are those of `linear_logprob`, bit for bit.

    Args:
        hidden: [N, H], bf16, fp16 or fp32.
        weight: [V, H], the LM head, the same dtype.
        targets: int64 [N], each in 0..V-1.
        weight_grad: fp32 [V, H] with contiguous rows, or None for a weight that learns nothing.

    Raises:
        ValueError: shapes, dtypes or devices don't fit; targets as in `linear_logprob`.
    """
    _check_weight_grad(weight, weight_grad)
    if weight_grad is not None and torch.is_grad_enabled() and not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()  # autograd runs no backward that nothing has asked for
    return _Head.apply(hidden, weight, targets, weight_grad)


def _check_weight_grad(weight: Tensor, weight_grad: Tensor | None) -> None:
    if weight_grad is None:
        return
    fits = weight_grad.shape == weight.shape and weight_grad.dtype == torch.float32
    if not fits or weight_grad.device != weight.device or weight_grad.stride(1) != 1:
        raise ValueError(
            f"weight_grad is {weight_grad.dtype} {tuple(weight_grad.shape)} on {weight_grad.device}: "
            f"give contiguous torch.float32 {tuple(weight.shape)} on {weight.device}"
        )


class _Head(torch.autograd.Function):
    """Keeps the inputs and the log-sum-exp of each position for the backward, and on a CPU some logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weight_grad: Tensor | None) -> Tensor:
        keep = 0 if like_cuda(hidden) or not ctx.needs_input_grad[0] else KEPT_BYTES
        with torch.autocast(hidden.device.type, enabled=False):
            logprob, log_sum_exp, kept = logprob_and_normalizer(hidden, weight, targets, keep)
        ctx.save_for_backward(hidden, weight, targets, log_sum_exp, *kept)
        ctx.weight_grad = weight_grad  # changes between the passes of a step, as it should
        return logprob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        hidden, weight, targets, log_sum_exp, *kept = ctx.saved_tensors
        workspace = hidden.new_empty(_workspace_bytes(hidden, weight), dtype=torch.uint8)
        with torch.autocast(hidden.device.type, enabled=False):
            hidden_grad = head_gradients(hidden, weight, targets, log_sum_exp, grad, kept, ctx.weight_grad, workspace)
        return hidden_grad, None, None, None


def _workspace_bytes(hidden: Tensor, weight: Tensor) -> int:
    if not like_cuda(hidden):
        return 0
    return backward_workspace(*hidden.shape, len(weight), hidden.element_size()).bytes


@torch.library.custom_op("slmfast::logprob_and_normalizer", mutates_args=())
def logprob_and_normalizer(
    hidden: Tensor, weight: Tensor, targets: Tensor, keep: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What `linear_logprob` gives, the log-sum-exp of each position, fp32 [N], and what the CPU's backward may use.

    The third is empty on CUDA; on a CPU it holds the first `keep` bytes of exponentials, as `eager_logprob.log_sums`
    has it.
    """
    kept: list[Tensor] = []
    if _on_kernels(hidden):
        sums = _fastest_on_cuda(hidden, weight, targets, False)
    else:
        sums = eager_logprob.log_sums(hidden, weight, targets, keep=keep, kept=kept)
    return sums.logprob(), sums.log_sum_exp(), kept


@logprob_and_normalizer.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, keep: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    check_shapes(hidden, weight, targets)
    logprob = targets.new_empty(targets.shape, dtype=torch.float32)
    shapes = eager_logprob.kept_shapes(len(hidden), len(weight), keep)
    kept = [logprob.new_empty(shape) for tile in shapes for shape in (tile, tile[:1])]
    return logprob, torch.empty_like(logprob), kept


@torch.library.custom_op("slmfast::head_gradients", mutates_args=("weight_grad", "workspace"))
def head_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sum_exp: Tensor,
    grad: Tensor,
    kept: list[Tensor],
    weight_grad: Tensor | None,
    workspace: Tensor,
) -> Tensor:
    """The gradient of `hidden`, [N, H] in its dtype, given that of each log-probability, fp32 [N].

    Args:
        hidden: as in the forward, like weight and targets.
        log_sum_exp: fp32 [N], from the forward, like `kept`.
        grad: fp32 [N].
        weight_grad: fp32 [V, H], to which the weight's gradient is added, or None.
        workspace: uint8, on CUDA as many as `launch.backward_workspace` says: the only memory beside the results.
    """
    given = (hidden, weight, targets, log_sum_exp, grad, weight_grad)
    if not _on_kernels(hidden):
        return eager_backward.accumulate(*given, kept)
    return _fastest_backward(*given, workspace)


@head_gradients.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sum_exp: Tensor,
    grad: Tensor,
    kept: list[Tensor],
    weight_grad: Tensor | None,
    workspace: Tensor,
) -> Tensor:
    return hidden.new_empty(hidden.shape)


def _on_kernels(hidden: Tensor) -> bool:
    return hidden.is_cuda and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _eager(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> LogSums:
    return eager_logprob.log_sums(hidden, weight, targets, entropy=entropy)


def _fastest_on_cuda(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> LogSums:
    from . import linear_logprob as fused
    from . import tiled_logprob as tiled
    from .online import check_kernel_inputs

    check_kernel_inputs(hidden, weight, targets)

    def partial(path: Callable[..., LogSums], **size: object) -> Callable[[], LogSums]:
        return functools.partial(path, hidden, weight, targets, entropy=entropy, **size)

    candidates: dict[str, Callable[[], LogSums]] = {}
    for tiles in fused.choices(hidden, weight):
        candidates[f"fused {tiles.name}"] = partial(fused.log_sums, tiles=tiles)
    for size in TILED_BYTES:
        name = f"cuBLAS {size // MIB} MiB"
        candidates[name] = partial(tiled.log_sums, tile_bytes=size)
    if len(hidden) == 0:
        return candidates[name]()
    with torch.cuda.device(hidden.device):  # whose stream the events are recorded on
        what = "linear_logprob with entropy" if entropy else "linear_logprob"
        return candidates[fastest(_key(what, hidden, weight), candidates, _milliseconds)]()


def _fastest_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_sum_exp: Tensor,
    grad: Tensor,
    weight_grad: Tensor | None,
    workspace: Tensor,
) -> Tensor:
    from . import tiled_backward

    def partial(tiles: object, grad: Tensor) -> Callable[[], Tensor]:
        given = (hidden, weight, targets, log_sum_exp, grad, weight_grad, workspace)
        return functools.partial(tiled_backward.accumulate, *given, tiles=tiles)

    ways = {tiles.name: tiles for tiles in tiled_backward.choices(hidden, weight)}
    # Measured with gradients of zero, which add nothing to the weight's.
    candidates = {name: partial(tiles, torch.zeros_like(grad)) for name, tiles in ways.items()}
    what = "head_gradients" if weight_grad is not None else "head_gradients, weight frozen"
    with torch.cuda.device(hidden.device):
        name = fastest(_key(what, hidden, weight), candidates, _milliseconds) if len(hidden) else next(iter(ways))
        return partial(ways[name], grad)()


def _key(what: str, hidden: Tensor, weight: Tensor) -> str:
    """What a choice of kernel holds for: device, versions, dtype, width, vocabulary and about how many positions."""
    (count, width), vocabulary = hidden.shape, len(weight)
    versions = f"torch {torch.__version__}, triton {importlib.metadata.version('triton')}"
    shape = f"N<={bucket(count)} H={width} V={vocabulary}"
    dtype = str(hidden.dtype).removeprefix("torch.")
    return f"{what}: {torch.cuda.get_device_name(hidden.device)}, {versions}, {dtype}, {shape}"


def _milliseconds(call: Callable[[], object]) -> float:
    """The shortest of a few runs on the current device, after one that compiles."""
    call()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return min(times)
