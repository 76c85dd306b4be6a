"""Batched decoding with a key-value cache: greedy, or by a nucleus under a seed (Holtzman et al. 2020).

A loop of our own, for two reasons: `transformers`' `generate` takes unset options from the model's generation config
(a repetition penalty would make "greedy" something else), and it draws from a global generator, so that a sample would
depend on its neighbours in the batch. Here every prompt draws from a stream of its own, and rows that have ended leave
the batch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from slmfast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0  # 0: the likeliest
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature}: give zero (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: give a share above 0, at most 1")


def uniforms(prompt: Sequence[int], occurrence: int, length: int, seed: int) -> np.ndarray:
    """The random numbers in [0, 1) that one reply is drawn with, float64 [length].

    They depend on the seed, on the prompt's tokens and on how often the same prompt came before, and on nothing else.
    """
    content = hashlib.blake2b(np.asarray(prompt, dtype="<i8").tobytes(), digest_size=16)
    words = np.frombuffer(content.digest(), dtype="<u4").tolist()
    return np.random.Generator(np.random.PCG64([seed, occurrence, *words])).random(length)


def decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    ends: frozenset[int],
    max_new_tokens: int,
    draws: np.ndarray | None = None,
    sampling: Sampling | None = None,
) -> list[list[int]]:
    """The tokens generated after each prompt, the token of `ends` that closed a reply included.

    Args:
        model: a causal language model in evaluation mode.
        prompts: token ids, at least one each; they run as one batch.
        ends: the tokens that close a reply.
        draws: float64 [prompts, max_new_tokens], see `uniforms`; needed at a temperature above 0.

    Raises:
        UserError: the model gives logits that are no numbers.
    """
    sampling = sampling or Sampling()
    device = model.get_output_embeddings().weight.device
    ids, seen = _left_padded(prompts, device)
    cache = DynamicCache(config=model.config)
    replies: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    for step in range(max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=seen,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        draw = None if draws is None else torch.as_tensor(draws[alive, step], device=device)
        chosen = next_tokens(output.logits[:, -1], sampling, draw)
        for row, token in zip(alive, chosen.tolist(), strict=True):
            replies[row].append(token)
        going = [i for i, row in enumerate(alive) if replies[row][-1] not in ends]
        if not going:
            break
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        seen = torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1)
        if len(going) < len(alive):
            keep = torch.tensor(going, device=device)
            cache.batch_select_indices(keep)
            ids, positions, seen = ids[keep], positions[keep], seen[keep]
            alive = [alive[i] for i in going]
    return replies


def next_tokens(logits: Tensor, sampling: Sampling, draws: Tensor | None = None) -> Tensor:
    """One token a row, int64 [B], from logits [B, V]; `draws` [B] in [0, 1) serve at a temperature above 0.

    The nucleus is the smallest set of likeliest tokens that holds `top_p` of the probability; its tokens lie side by
    side by falling probability, and a draw falls into one of them (inverse of the cumulative distribution).
    """
    if not torch.isfinite(logits.amax(1)).all():
        raise UserError("the model gives logits that are no numbers: check its weights, or load it in float32")
    if sampling.temperature == 0:
        return logits.argmax(1)
    if draws is None:
        raise ValueError("sampling at a temperature above 0 needs draws")
    probabilities, order = (logits.double() / sampling.temperature).softmax(1).sort(dim=1, descending=True, stable=True)
    before = probabilities.cumsum(1) - probabilities
    nucleus = probabilities * (before < sampling.top_p)
    cumulative = nucleus.cumsum(1)
    place = torch.searchsorted(cumulative, (draws * cumulative[:, -1])[:, None], right=True)
    # A draw next to 1 may round up to the whole sum: the nucleus's last token is the last that can be meant.
    last = (nucleus > 0).sum(1, keepdim=True) - 1
    return order.gather(1, torch.minimum(place, last))[:, 0]


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and their attention mask, int64 [B, L]: the padding stands on the left, so that all rows end together."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    seen = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.as_tensor(prompt)
        seen[row, longest - len(prompt) :] = 1
    return ids.to(device), seen.to(device)
