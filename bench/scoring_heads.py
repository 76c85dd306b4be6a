"""Ways from hidden states to log-probabilities: the head alone, without the model before it.

Each takes hidden [N, H], weight [V, H] and targets int64 [N], and gives the natural log-probabilities [N].
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import slmfast

Call = Callable[[Tensor, Tensor, Tensor], Tensor | None]
TRL_CHUNK = 32768  # vocabulary rows of a tile in TRL's own call
ROWS = 256  # of the truth's tiles


@dataclass(frozen=True)
class Head:
    """One way."""

    title: str
    package: str
    """Whose version is printed, and without which it can't be measured."""
    load: Callable[[], Call]
    """Imports what it needs."""
    cuda_only: bool = False

    def version(self) -> str | None:
        """None where the package is missing."""
        if self.package == "slmfast":
            return slmfast.__version__
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def head_inputs(
    positions: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states, weight and targets, whose logits spread by 3 as those of the random models do."""
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.empty(positions, width, device=device, dtype=dtype).normal_(generator=generator)
    weight = torch.empty(vocabulary, width, device=device, dtype=dtype).normal_(generator=generator)
    targets = torch.randint(vocabulary, (positions,), device=device, generator=generator)
    return hidden, weight.mul_(3 / width**0.5), targets


def _ours() -> Call:
    from slmfast.scoring.head import linear_logprob

    return linear_logprob


def _full() -> Call:
    def full(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]

    return full


def _product() -> Call:
    def product(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
        torch.mm(hidden, weight.T)

    return product


def _truth() -> Call:
    def truth(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        exact = weight.float()
        tiles = zip(hidden.split(ROWS), targets.split(ROWS), strict=True)
        return torch.cat([(rows.float() @ exact.T).log_softmax(-1).gather(1, at[:, None])[:, 0] for rows, at in tiles])

    return truth


def _trl() -> Call:
    from trl.kernels import ChunkedLogProbFunction

    def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, ())[0]

    return trl


def _liger() -> Call:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return lambda hidden, weight, targets: -loss(weight, hidden, targets)


def _cut_cross_entropy() -> Call:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: -linear_cross_entropy(hidden, weight, targets, reduction="none")


HEADS = {
    "ours": Head("slmfast", "slmfast", _ours),
    "full": Head("full logits", "torch", _full),
    "trl": Head("TRL's chunked head", "trl", _trl),
    "liger": Head("Liger's fused linear cross-entropy", "liger-kernel", _liger, cuda_only=True),
    "cce": Head("cut-cross-entropy", "cut-cross-entropy", _cut_cross_entropy, cuda_only=True),
    "product": Head("the bare matrix product", "torch", _product),
    "truth": Head("fp32", "torch", _truth),
}
"""By the names that bench/scoring_child.py knows them under."""
PEERS = ("full", "trl", "liger", "cce")
