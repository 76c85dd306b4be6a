"""The log-probability of every continuation of every group: the one computation under perplexity and choices."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from slmfast.errors import UserError
from slmfast.progress import Progress
from slmfast.scoring.attention import packing
from slmfast.scoring.batches import Batch, make_batches
from slmfast.scoring.budget import checked_budget
from slmfast.scoring.cpu_layers import faster_layers
from slmfast.scoring.head import head_weight, target_scores
from slmfast.scoring.loading import evaluating
from slmfast.scoring.packable import rotates_by_length, why_not_packed
from slmfast.scoring.packing import Group
from slmfast.scoring.probes import remembered

Owner = tuple[int, int]  # a group, and a continuation's number in it
Found = tuple[float, bool]  # a continuation's log-probability, and whether greedy decoding would write it
_NO_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


class Scores(NamedTuple):
    """A group's continuations, C of them."""

    logprob: np.ndarray  # float64 [C], natural, of the whole continuation
    greedy: np.ndarray  # bool [C]: each of its tokens is the likeliest at its place


def continuation_logprobs(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    batch_tokens: int | None = None,
    progress: str | None = None,
    on_halved: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """For each group the natural log-probability of each whole continuation, float64 [continuations].

    Arguments, precision and errors are those of `continuation_scores`.
    """
    given = {"batch_tokens": batch_tokens, "progress": progress, "on_halved": on_halved}
    return [scores.logprob for scores in continuation_scores(model, groups, **given)]


def continuation_scores(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    batch_tokens: int | None = None,
    progress: str | None = None,
    on_halved: Callable[[int], None] | None = None,
) -> list[Scores]:
    """For each group the log-probability of each whole continuation, and whether it is the greedy one.

    Sums are float64 over fp32 token scores. The head runs only where a target asks for it. Where the memory does not
    hold a batch, batches are halved from there on, and `on_halved` is told how many tokens they have then.

    Raises:
        UserError: the model gives a score that is no finite number, its head is not a plain one, a token is not in its
            vocabulary, or the memory does not hold a single sequence.
    """
    weight = head_weight(model)
    _check_vocabulary(groups, min(len(weight), len(model.get_input_embeddings().weight)))
    budget = checked_budget(batch_tokens, model)
    counts = [len(group.continuations) for group in groups]
    scores = [Scores(np.full(count, np.nan), np.zeros(count, dtype=bool)) for count in counts]
    total = sum(len(continuation) for group in groups for continuation in group.continuations)
    shown = Progress(progress, total, "tokens") if progress else None
    packed = bool(groups) and remembered(why_not_packed, model) is None
    alone = rotates_by_length(model)

    def run(batch: Batch) -> list[Found]:
        sums = _sums(model, weight, batch)
        if shown:
            shown.add(len(batch.targets))
        return sums

    def batches(some: Sequence[Group], tokens: int) -> Iterator[Batch]:
        return make_batches(some, 1 if alone else tokens, packed=packed, device=weight.device)

    with evaluating(model), ExitStack() as ways:
        if packed:
            ways.enter_context(packing(model))
            ways.enter_context(faster_layers(model))
        for (group, member), score in _in_halves(run, batches, groups, budget, on_halved or (lambda tokens: None)):
            scores[group].logprob[member], scores[group].greedy[member] = score
    if shown:
        shown.close()
    return scores


def _check_vocabulary(groups: Sequence[Group], size: int) -> None:
    texts = (tokens for group in groups for tokens in (group.prefix, *group.continuations))
    largest = max((max(tokens) for tokens in texts if len(tokens)), default=0)
    if largest >= size:
        raise UserError(f"the tokenizer gives a token {largest}, and the model knows {size}: pass the model's own one")


def _in_halves(
    run: Callable[[Batch], list[Found]],
    batches: Callable[[Sequence[Group], int], Iterator[Batch]],
    groups: Sequence[Group],
    budget: int,
    on_halved: Callable[[int], None],
) -> Iterator[tuple[Owner, Found]]:
    """Runs all batches; from one that the memory does not hold on, batches of half its tokens."""
    left = [(g, m) for g, group in enumerate(groups) for m in range(len(group.continuations))]
    while left:
        some, owners = _chosen(groups, left)
        done: set[Owner] = set()
        too_long = 0
        for batch in batches(some, budget):
            try:
                sums = run(batch)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                too_long = batch.tokens  # on the way out of this block the tensors of the failed pass go
            if too_long:
                break
            mine = [owners[g][m] for g, m in batch.continuations]
            done.update(mine)
            yield from zip(mine, sums, strict=True)
        if too_long:
            # What is over the budget could not be cut.
            if too_long > budget or budget == 1 or len(batch.continuations) == 1:
                raise UserError(
                    f"the memory does not hold a sequence of {too_long} tokens: give a smaller window or model, "
                    "or a device with more memory"
                )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            budget = max(1, too_long // 2)
            on_halved(budget)
        left = [owner for owner in left if owner not in done]


def _chosen(groups: Sequence[Group], owners: Sequence[Owner]) -> tuple[list[Group], list[list[Owner]]]:
    """The groups with these continuations alone, and whose each is."""
    members: dict[int, list[int]] = {}
    for group, member in owners:
        members.setdefault(group, []).append(member)
    some = [Group(groups[g].prefix, [groups[g].continuations[m] for m in taken]) for g, taken in members.items()]
    return some, [[(g, m) for m in taken] for g, taken in members.items()]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: torch's own on CUDA has a class; those of a CPU, cuBLAS and the driver do not."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _NO_MEMORY)


def _sums(model: nn.Module, weight: torch.Tensor, batch: Batch) -> list[Found]:
    logprobs, likeliest = target_scores(batch.hidden(model), weight, batch.targets)
    sums = torch.zeros(len(batch.continuations), dtype=torch.float64, device=weight.device)
    sums.index_add_(0, batch.owners, logprobs.double())
    if not torch.isfinite(sums).all():
        raise UserError(
            f"{type(model).__name__} ({weight.dtype}) gives log-probabilities that are no numbers: "
            "check its weights, or score with dtype float32"
        )
    others = torch.zeros(len(sums), dtype=torch.int64, device=weight.device)
    others.index_add_(0, batch.owners, (~likeliest).long())
    return list(zip(sums.tolist(), (others == 0).tolist(), strict=True))
