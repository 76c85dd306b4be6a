"""Every kernel against fp64 truth: random inputs, many shapes, outputs that are NaN until they are written.

A kernel's error may not exceed that of the same formula in eager torch at the inputs' dtype, plus a little.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from gradient_checks import check_gradients
from torch import Tensor

LITTLE = 1e-5  # nats a token
ROWS = 64  # of a tile of fp64 logits
POISONED = ("empty", "empty_like", "empty_strided")


@dataclass(frozen=True)
class Kernel:
    """A way to log-probabilities that is compiled by hand, or tiled by hand over the vendor's matrix product."""

    name: str
    module: str
    function: str = "linear_logprob"
    gradients: bool = False  # whether its gradients are what is checked

    def load(self) -> Callable[..., Any] | None:
        """The callable (hidden, weight, targets) and perhaps entropy=True; None where this checkout has none."""
        try:
            return getattr(importlib.import_module(self.module), self.function)
        except ModuleNotFoundError as error:
            if error.name == self.module:
                return None
            raise


KERNELS = (
    Kernel("linear_logprob, fused", "slmfast.kernels.linear_logprob"),
    Kernel("linear_logprob, tiled", "slmfast.kernels.tiled_logprob"),
    Kernel("linear_logprob, as scoring chooses it", "slmfast.scoring.head"),
    Kernel("head_gradients", "slmfast.kernels.head_op", "accumulating_logprob", gradients=True),
)


@dataclass(frozen=True)
class Case:
    """N positions, H hidden width, V vocabulary; `strided` gives hidden states whose rows are not neighbours."""

    positions: int
    width: int
    vocabulary: int
    dtype: torch.dtype
    strided: bool = False

    def described(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"N={self.positions}, H={self.width}, V={self.vocabulary}, {dtype}{', strided' * self.strided}"


SHAPES = (
    (1, 8, 2),
    (5, 33, 773),
    (130, 40, 300),
    (65, 100, 50257),
    (300, 896, 151936),
    (257, 1536, 151936),
    (129, 3584, 152064),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = tuple(Case(*shape, dtype, strided) for shape in SHAPES for dtype in DTYPES for strided in (False, True))


def check_all(
    kernels: Sequence[Kernel], cases: Sequence[Case], device: torch.device, seed: int = 0
) -> list[dict[str, Any]]:
    """A row for every kernel, case and output: {"kernel", "case", "output", "error", "budget", "passed"}.

    A kernel that this checkout lacks, and an entropy that a kernel does not give, are rows whose "passed" is None.
    """
    rows: list[dict[str, Any]] = []
    for kernel in kernels:
        call = kernel.load()
        if call is None:
            rows.append(_missing(kernel, f"{kernel.module} is not in this checkout"))
            continue
        if kernel.gradients:
            for case in cases:
                common = {"kernel": kernel.name, "case": case.described()}
                with poisoned():
                    rows += [common | row for row in check_gradients(*inputs(case, device, seed))]
            continue
        gives_entropy = "entropy" in inspect.signature(call).parameters
        if not gives_entropy:
            rows.append(_missing(kernel, "it gives no entropy"))
        for case in cases:
            rows += _check(kernel.name, call, case, device, seed, gives_entropy)
    return rows


def _missing(kernel: Kernel, why: str) -> dict[str, Any]:
    return {"kernel": kernel.name, "case": why, "output": None, "error": None, "budget": None, "passed": None}


def _check(
    name: str, call: Callable[..., Any], case: Case, device: torch.device, seed: int, gives_entropy: bool
) -> Iterator[dict[str, Any]]:
    hidden, weight, targets = inputs(case, device, seed)
    true, eager = truth(hidden, weight, targets), _eager(hidden, weight, targets)
    with poisoned(), torch.no_grad():
        found = {"logprob": call(hidden, weight, targets)}
        if gives_entropy:
            found["logprob beside entropy"], found["entropy"] = call(hidden, weight, targets, entropy=True)
    for output, values in found.items():
        which = int(output == "entropy")
        error = _largest(values, true[which])
        budget = _largest(eager[which], true[which]) + LITTLE
        passed = values.shape == targets.shape and error <= budget  # NaN is not: a place left unwritten fails
        common = {"kernel": name, "case": case.described(), "output": output}
        yield common | {"error": error, "budget": budget, "passed": bool(passed)}


def inputs(case: Case, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states, weight and targets; the ends of the vocabulary are among the targets."""
    generator = torch.Generator(device).manual_seed(seed)
    columns = 2 * case.width if case.strided else case.width
    hidden = torch.randn(case.positions, columns, device=device, generator=generator)[:, : case.width].to(case.dtype)
    if case.strided:
        hidden = torch.cat([hidden, hidden], 1)[:, : case.width]
    weight = torch.randn(case.vocabulary, case.width, device=device, generator=generator) * 3 / case.width**0.5
    targets = torch.randint(case.vocabulary, (case.positions,), device=device, generator=generator)
    targets[0], targets[-1] = 0, case.vocabulary - 1
    return hidden, weight.to(case.dtype), targets


def truth(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the targets and entropy, fp64 [N]: nats."""
    exact = weight.double()
    tiles = zip(hidden.split(ROWS), targets.split(ROWS), strict=True)
    found = [_of_logits(rows.double() @ exact.T, at) for rows, at in tiles]
    return torch.cat([logprob for logprob, _ in found]), torch.cat([entropy for _, entropy in found])


def _eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return _of_logits((hidden @ weight.T).float(), targets)


def _of_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def _largest(values: Tensor, true: Tensor) -> float:
    return float((values.double() - true).abs().max())


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, fresh memory of floating-point tensors is NaN, so that what a kernel leaves unwritten shows."""

    def filling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any, **options: Any) -> Tensor:
            tensor = make(*arguments, **options)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return call

    originals = {name: getattr(torch, name) for name in POISONED}
    try:
        for name, make in originals.items():
            setattr(torch, name, filling(make))
        yield
    finally:
        for name, make in originals.items():
            setattr(torch, name, make)
