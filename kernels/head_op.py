"""The LM head as an operator of torch, `slmfast::linear_logprob`: one name on every device.

On CUDA the fastest of the fused kernel and the cuBLAS path, each in the sizes that launch.py names; elsewhere, and on
CUDA without Triton, the tiled eager path. As a custom operator it has a fake twin: under FakeTensorMode a plan of
memory sees results and no logits, which is what every device holds, without running anything.

Shapes: N positions, H hidden width, V vocabulary.
"""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from . import eager_logprob
from .fastest import bucket, fastest
from .launch import MIB, TILED_BYTES
from .reference import check_shapes

REPEATS = 3
Found = Tensor | tuple[Tensor, Tensor]  # log-probabilities, with entropies if asked


@torch.library.custom_op("slmfast::linear_logprob", mutates_args=())
def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets, fp32 [N], and entropies in nats, fp32 [N], or [0] where not asked for.

    Args:
        hidden: [N, H], any float dtype; on CUDA bf16, fp16 or fp32.
        weight: [V, H]; on CUDA the same dtype.
        targets: int64 [N], each in 0..V-1.
        entropy: whether entropies are wanted.

    Raises:
        ValueError: shapes, dtypes or devices don't fit; away from CUDA also where a target is no row of `weight`. On
            CUDA, where to look would be to wait for the device, such a target gives NaN.
    """
    path = _fastest_on_cuda if hidden.is_cuda and _has_triton() else _eager
    found = path(hidden, weight, targets, entropy)
    return found if entropy else (found, found.new_empty(0))


@linear_logprob.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
    check_shapes(hidden, weight, targets)
    logprob = targets.new_empty(targets.shape, dtype=torch.float32)
    return logprob, torch.empty_like(logprob) if entropy else logprob.new_empty(0)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _eager(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Found:
    return eager_logprob.linear_logprob(hidden, weight, targets, entropy=entropy)


def _fastest_on_cuda(hidden: Tensor, weight: Tensor, targets: Tensor, entropy: bool) -> Found:
    from . import linear_logprob as fused
    from . import tiled_logprob as tiled
    from .online import check_kernel_inputs

    check_kernel_inputs(hidden, weight, targets)

    def partial(path: Callable[..., Found], **size: object) -> Callable[[], Found]:
        return functools.partial(path, hidden, weight, targets, entropy=entropy, **size)

    candidates: dict[str, Callable[[], Found]] = {}
    for tiles in fused.choices(hidden, weight):
        candidates[f"fused {tiles.name}"] = partial(fused.linear_logprob, tiles=tiles)
    for size in TILED_BYTES:
        name = f"cuBLAS {size // MIB} MiB"
        candidates[name] = partial(tiled.linear_logprob, tile_bytes=size)
    if len(hidden) == 0:
        return candidates[name]()
    with torch.cuda.device(hidden.device):  # whose stream the events are recorded on
        return candidates[fastest(_key(hidden, weight, entropy), candidates, _milliseconds)]()


def _key(hidden: Tensor, weight: Tensor, entropy: bool) -> str:
    """What a choice of kernel holds for: device, versions, dtype, width, vocabulary and about how many positions."""
    (count, width), vocabulary = hidden.shape, len(weight)
    versions = f"torch {torch.__version__}, triton {importlib.metadata.version('triton')}"
    shape = f"N<={bucket(count)} H={width} V={vocabulary}"
    dtype = str(hidden.dtype).removeprefix("torch.")
    what = "linear_logprob with entropy" if entropy else "linear_logprob"
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
