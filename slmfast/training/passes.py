"""How a model is run over pairs of a prompt and a completion: in packs, with gradients or without.

Packs are those of scoring: what pairs begin with stands in a pack once, nothing is padded, and a completion's last
token, which predicts nothing, is no input. Gradients flow through what is shared, so they are those of separate
sequences. Packs are a function of the pairs and the budget alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slmfast.scoring.attention import packing
from slmfast.scoring.batches import Batch, make_batches
from slmfast.scoring.cpu_layers import faster_layers
from slmfast.scoring.head import linear_logprob
from slmfast.scoring.loading import evaluating
from slmfast.scoring.packable import rotates_by_length, why_not_packed
from slmfast.scoring.packing import Group, Tokens
from slmfast.scoring.probes import remembered
from slmfast.training.layers import training_layers
from slmfast.training.logprobs import completion_logprobs, forward_precision, head_operands, seen_head
from slmfast.training.split_weights import SplitWeights, masters_of

Pair = tuple[Tokens, Tokens]  # the token ids of a prompt and of a completion, at least one each


@dataclass(frozen=True)
class Passes:
    """The way a run takes through its models, the same for policy and reference."""

    forward: str
    """The precision of the forward pass, as in the settings."""

    checkpointing: bool
    """Whether decoder layers run again in the backward pass."""

    device: torch.device

    @contextmanager
    def training(self, model: nn.Module, pairs: Sequence[Pair], budget: int) -> Iterator[Iterator[Batch]]:
        """Gives the packs of the pairs; `completion_logprobs` and backward passes belong inside.

        Without gradients (torch.no_grad) the values are the same to the bit.
        """
        with self._packed(model, pairs, budget) as packs:
            plain = self.forward == "fp32"
            with training_layers(model, plain_fp32=plain, checkpointing=self.checkpointing):
                yield packs

    def train_logprobs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The log-probability of every completion of a pack, float64 [C], to be called inside `training`."""
        return completion_logprobs(model, batch, self.forward)

    def same_without_gradient(self, model: nn.Module, pairs: Sequence[Pair], budget: int) -> Tensor:
        """What `training` gives for all pairs, float64 [pairs]: for a reference that a policy is compared with."""
        found = torch.empty(len(pairs), dtype=torch.float64, device=self.device)
        with torch.no_grad(), self.training(model, pairs, budget) as packs:
            for batch in packs:
                found[numbers(batch)] = self.train_logprobs(model, batch)
        return found

    def score(self, model: nn.Module, pairs: Sequence[Pair], budget: int) -> Tensor:
        """The log-probabilities of all completions, float64 [pairs], by the fastest way that keeps no gradient."""
        found = torch.empty(len(pairs), dtype=torch.float64, device=self.device)
        weight = seen_head(model, self.forward)
        with self._packed(model, pairs, budget) as packs, evaluating(model), ExitStack() as ways:
            if self.forward == "fp32":
                ways.enter_context(faster_layers(model))
            for batch in packs:
                with forward_precision(self.forward, self.device):
                    hidden = batch.hidden(model)
                tokens = linear_logprob(*head_operands(hidden, weight, self.forward), batch.targets).double()
                sums = tokens.new_zeros(len(batch.continuations)).index_add_(0, batch.owners, tokens)
                found[numbers(batch)] = sums
        return found

    @contextmanager
    def _packed(self, model: nn.Module, pairs: Sequence[Pair], budget: int) -> Iterator[Iterator[Batch]]:
        packed, alone = _packable(model), rotates_by_length(model)
        groups = [Group(prompt, [completion]) for prompt, completion in pairs]
        batches = make_batches(groups, 1 if alone else budget, packed=packed, device=self.device)
        with ExitStack() as ways:
            if packed:
                ways.enter_context(packing(model))
            yield batches


def split_weights(model: nn.Module, forward: str) -> SplitWeights:
    """Splits a model's fp32 weights on its device, for passes whose forward is `forward`.

    Raises:
        UserError: as `SplitWeights`.
    """
    packable = _packable(model)
    masters = SplitWeights(model, forward)
    masters.packable = packable
    return masters


def _packable(model: nn.Module) -> bool:
    """Whether a model's sequences may share a pack.

    That is asked of whole weights: in bf16 a few tokens' hidden states differ by more than the answer allows.
    """
    masters = masters_of(model)
    if masters is not None and masters.packable is not None:
        return masters.packable
    return remembered(why_not_packed, model) is None


def numbers(batch: Batch) -> Tensor:
    """Which of the pairs each completion of a pack is, int64 [C]."""
    return torch.tensor([number for number, _ in batch.continuations], device=batch.input_ids.device)
