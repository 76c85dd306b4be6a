"""The log-probability of every continuation of every group: the one computation under perplexity and choices."""

from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch
from torch import nn

from slmfast.errors import UserError
from slmfast.progress import Progress
from slmfast.scoring.head import head_weight, linear_logprob
from slmfast.scoring.loading import evaluating
from slmfast.scoring.packing import Batch, Group, collate, make_batches, make_rows

BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}  # tokens that go through the model together, padding included


def continuation_logprobs(
    model: nn.Module, groups: Sequence[Group], *, batch_tokens: int | None = None, progress: str | None = None
) -> list[np.ndarray]:
    """For each group the natural log-probability of each whole continuation, float64 [continuations].

    Sums are float64 over fp32 token scores. The head runs only where a target asks for it.

    Raises:
        UserError: the model gives a score that is no finite number, or its head is not a plain one.
    """
    weight = head_weight(model)
    tokens = batch_tokens if batch_tokens is not None else BATCH_TOKENS.get(weight.device.type, BATCH_TOKENS["cpu"])
    if not isinstance(tokens, Integral) or tokens < 1:
        raise UserError(f"batch_tokens is {tokens!r}: give a positive number of tokens")
    scores = [np.full(len(group.continuations), np.nan) for group in groups]
    rows = make_rows(groups, share=can_share(model), row_tokens=tokens)
    shown = Progress(progress, len(rows), "sequences") if progress else None
    with evaluating(model):
        for batch_rows in make_batches(rows, tokens):
            batch = collate(batch_rows, weight.device)
            for (group, member), score in zip(batch.continuations, _score(model, weight, batch), strict=True):
                scores[group][member] = score
            if shown:
                shown.add(len(batch_rows))
    if shown:
        shown.close()
    return scores


def can_share(model: nn.Module) -> bool:
    """Whether a row of several continuations gives the separate sequences' result.

    It takes an attention that obeys a mask of our own in every layer: torch's SDPA does; FlashAttention takes no such
    mask, and a sliding-window layer would have its window replaced by it.
    """
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None)
    if layers:
        full = set(layers) == {"full_attention"}
    else:  # Mistral and others name no layers: a window in the config is that of every layer
        full = getattr(config, "sliding_window", None) is None or getattr(config, "use_sliding_window", True) is False
    return config._attn_implementation == "sdpa" and full


def _score(model: nn.Module, weight: torch.Tensor, batch: Batch) -> list[float]:
    decoder = model.get_decoder()
    hidden = decoder(
        input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=batch.mask(), use_cache=False
    ).last_hidden_state  # [B, L, H]
    logprobs = linear_logprob(hidden[batch.rows, batch.positions], weight, batch.targets)
    sums = torch.zeros(len(batch.continuations), dtype=torch.float64, device=weight.device)
    sums.index_add_(0, batch.owners, logprobs.double())
    if not torch.isfinite(sums).all():
        raise UserError(
            f"{type(model).__name__} ({weight.dtype}) gives log-probabilities that are no numbers: "
            "check its weights, or score with dtype float32"
        )
    return sums.tolist()
