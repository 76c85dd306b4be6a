"""Continuous batching with a key-value cache: greedy, or by a nucleus under a seed (Holtzman et al. 2020).

Replies end after different lengths. As soon as a quarter of the slots stand idle, waiting prompts take them (Yu et al.
2022, "Orca: a distributed serving system for transformer-based generative models").

A loop of our own, for two reasons: `transformers`' `generate` and `generate_batch` take unset options from the model's
generation config (a repetition penalty would make "greedy" something else), and they draw from a global generator, so
that a sample would depend on its neighbours in the batch. Here every prompt draws from a stream of its own.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from slmfast.engines.base import Sampling
from slmfast.errors import UserError
from slmfast.scoring.packable import rotates_by_length

# Layers of which keys and values are all that is kept of earlier tokens; a window or chunks are obeyed by the mask.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def uniforms(prompt: Sequence[int], occurrence: int, length: int, seed: int) -> np.ndarray:
    """The random numbers in [0, 1) that one reply is drawn with, float64 [length].

    They depend on the seed, on the prompt's tokens and on how often the same prompt came before, and on nothing else.
    """
    content = hashlib.blake2b(np.asarray(prompt, dtype="<i8").tobytes(), digest_size=16)
    words = np.frombuffer(content.digest(), dtype="<u4").tolist()
    return np.random.Generator(np.random.PCG64([seed, occurrence, *words])).random(length)


def occurrences(prompts: Sequence[Sequence[int]]) -> list[int]:
    """For each prompt how many equal ones stand before it."""
    seen: Counter[tuple[int, ...]] = Counter()
    numbers = []
    for prompt in map(tuple, prompts):
        numbers.append(seen[prompt])
        seen[prompt] += 1
    return numbers


def decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    ends: frozenset[int],
    max_new_tokens: int,
    draws: np.ndarray | None = None,
    sampling: Sampling | None = None,
    *,
    slots: int = 64,
    stopped: Callable[[Sequence[int]], bool] = lambda reply: False,
) -> list[list[int]]:
    """The tokens generated after each prompt, the token of `ends` that closed a reply included.

    Prompts wait for a slot in their given order, so it pays to give them by length. A model whose rotations depend on
    the longest position of a call writes one reply at a time, or each would depend on its neighbours.

    Args:
        model: a causal language model in evaluation mode.
        prompts: token ids, at least one each.
        ends: the tokens that close a reply.
        draws: float64 [prompts, max_new_tokens], see `uniforms`; needed at a temperature above 0.
        slots: how many replies are written side by side.
        stopped: asked after every token whether a reply ends with it.

    Raises:
        UserError: the model gives logits that are no numbers, or keeps more than keys and values.
    """
    check_cache(model)
    slots = 1 if rotates_by_length(model) else slots
    sampling = sampling or Sampling()
    replies = _Replies([[] for _ in prompts], ends, max_new_tokens, draws, sampling, stopped)
    waiting = list(range(len(prompts)))[::-1]

    rows: Rows | None = None
    while waiting or rows is not None:
        if rows is not None and not worth_renewing(rows.going, slots, len(waiting)):
            replies.extend(rows, rows.step(model))
            continue
        rows = rows.kept() if rows is not None else None
        free = min(len(waiting), slots - (len(rows.owners) if rows else 0))
        if free:
            taken = [waiting.pop() for _ in range(free)]
            new, logits = Rows.begin(model, taken, [prompts[i] for i in taken], sampling.repetition_penalty != 1)
            replies.extend(new, logits)
            rows = new if rows is None else rows.joined(new)
    return replies.tokens


@dataclass
class _Replies:
    """The replies to all prompts, as far as they are written; the other fields are `decode`'s arguments."""

    tokens: list[list[int]]
    ends: frozenset[int]
    max_new_tokens: int
    draws: np.ndarray | None
    sampling: Sampling
    stopped: Callable[[Sequence[int]], bool]

    def extend(self, rows: "Rows", logits: Tensor) -> None:
        """Gives every row its next token; rows whose reply has ended go on idly until they are taken out."""
        steps = [min(len(self.tokens[owner]), self.max_new_tokens - 1) for owner in rows.owners]
        draw = None if self.draws is None else torch.as_tensor(self.draws[rows.owners, steps], device=logits.device)
        if rows.used is not None:
            logits = penalised(logits, rows.used, self.sampling.repetition_penalty)
        rows.last = next_tokens(logits, self.sampling, draw)[:, None]
        if rows.used is not None:
            rows.used.scatter_(1, rows.last, True)
        for row, token in enumerate(rows.last[:, 0].tolist()):
            if rows.going[row]:
                reply = self.tokens[rows.owners[row]]
                reply.append(token)
                rows.going[row] = (
                    token not in self.ends and len(reply) < self.max_new_tokens and not self.stopped(reply)
                )


def check_cache(model: nn.Module) -> None:
    """Raises UserError where a model keeps a state that rows of keys and values don't hold, such as Mamba's."""
    config = model.config.get_text_config()
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION)
    if others or getattr(model, "_is_stateful", False):
        kept = f"layers of {', '.join(others)}" if others else "a state of its own"
        raise UserError(
            f"{type(model).__name__} (model_type {config.model_type}) has {kept}, and generation here keeps keys and "
            "values alone: take a model whose layers all attend"
        )


def worth_renewing(going: Sequence[bool], slots: int, waiting: int) -> bool:
    """Whether enough slots stand idle to be worth a copy of the cache: a quarter, or all."""
    idle = (slots if waiting else len(going)) - sum(going)
    return not any(going) or 4 * idle >= (slots if waiting else len(going))


@dataclass
class Rows:
    """Replies that are being written side by side. Shapes: B rows, L places of the cache.

    Rows are padded on the left, so that all end together; `seen` says which places are real.
    """

    owners: list[int]  # the prompt of each row
    going: list[bool]  # whether its reply has not ended yet
    cache: DynamicCache
    seen: Tensor  # int64 [B, L]
    last: Tensor  # int64 [B, 1]: the newest token, which is not in the cache yet
    position: Tensor  # int64 [B, 1]: its position
    used: Tensor | None = None  # bool [B, V]: the tokens of prompt and reply, where a penalty asks for them

    @classmethod
    def begin(
        cls, model: nn.Module, owners: list[int], prompts: list[Sequence[int]], note_used: bool = False
    ) -> tuple["Rows", Tensor]:
        """Rows for prompts, and the logits [B, V] of their first tokens."""
        ids, seen = _left_padded(prompts, model.get_output_embeddings().weight.device)
        # Without the model's configuration every layer keeps all places, as the copies below need it; a sliding
        # window is obeyed by the mask.
        cache = DynamicCache()
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        logits = _last_logits(model, ids, seen, positions, cache)
        used = None
        if note_used:
            used = torch.zeros_like(logits, dtype=torch.bool)
            row, place = seen.nonzero(as_tuple=True)
            used[row, ids[row, place]] = True
        return cls(owners, [True] * len(owners), cache, seen, ids[:, -1:], positions[:, -1:] + 1, used), logits

    def step(self, model: nn.Module) -> Tensor:
        """The logits [B, V] after the newest tokens."""
        self.seen = torch.cat([self.seen, self.seen.new_ones(len(self.owners), 1)], dim=1)
        logits = _last_logits(model, self.last, self.seen, self.position, self.cache)
        # A reply that has ended stays where it is: a model with a table of positions has none after its window.
        self.position = self.position + torch.tensor(self.going, device=self.position.device)[:, None]
        return logits

    def kept(self) -> "Rows | None":
        """The rows that go on, without the places that none of them needs; None if there are none."""
        rows = [row for row, going in enumerate(self.going) if going]
        if not rows:
            return None
        keep = torch.tensor(rows, device=self.seen.device)
        seen = self.seen[keep]
        unused = int(seen.argmax(1).min())
        cache = DynamicCache()
        for i, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[keep, :, unused:], layer.values[keep, :, unused:], i)
        owners = [self.owners[row] for row in rows]
        used = None if self.used is None else self.used[keep]
        return Rows(owners, [True] * len(rows), cache, seen[:, unused:], self.last[keep], self.position[keep], used)

    def joined(self, other: "Rows") -> "Rows":
        """These rows and then the other ones."""
        length = max(self.seen.shape[1], other.seen.shape[1])

        def both(a: Tensor, b: Tensor, dim: int) -> Tensor:
            padded = (functional.pad(x, (0, 0) * (x.ndim - 1 - dim) + (length - x.shape[dim], 0)) for x in (a, b))
            return torch.cat(list(padded))

        cache = DynamicCache()
        for i, (a, b) in enumerate(zip(self.cache.layers, other.cache.layers, strict=True)):
            cache.update(both(a.keys, b.keys, 2), both(a.values, b.values, 2), i)
        last, position = torch.cat([self.last, other.last]), torch.cat([self.position, other.position])
        seen = both(self.seen, other.seen, 1)
        used = None if self.used is None or other.used is None else torch.cat([self.used, other.used])
        return Rows(self.owners + other.owners, self.going + other.going, cache, seen, last, position, used)


def _last_logits(model: nn.Module, ids: Tensor, seen: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    output = model(
        input_ids=ids,
        attention_mask=seen,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


def penalised(logits: Tensor, used: Tensor, penalty: float) -> Tensor:
    """Logits [B, V] with those of used tokens, bool [B, V], pressed down by a repetition penalty."""
    pressed = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(used, pressed, logits)


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
