"""Perplexity of replies given their prompts (the paper, section 3.6: base-2 cross-entropy)."""

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from slmfast.errors import UserError
from slmfast.scoring.encoding import Encoder, Prompt, check_text, listed, listed_prompts
from slmfast.scoring.forward import continuation_logprobs
from slmfast.scoring.loading import ModelLike, as_model, as_tokenizer, checked_window
from slmfast.scoring.packing import Group

# Gives the natural log-probability of each whole continuation of each group.
Score = Callable[[Sequence[Group]], list[np.ndarray]]

SCHEMA = pa.schema(
    [
        pa.field("prompt_index", pa.int64(), nullable=False),
        pa.field("reply_index", pa.int64(), nullable=False),
        pa.field("tokens", pa.int64()),  # the reply's and the closing one; null for an empty or null reply
        pa.field("bits", pa.float64()),  # -log2 of the probability of all of them
        pa.field("bits_per_token", pa.float64()),
        pa.field("perplexity", pa.float64()),  # 2 ** bits_per_token; infinite from 1024 bits on
    ]
)


def perplexity(
    model: ModelLike,
    tokenizer: Any,
    prompts: Iterable[Prompt],
    replies: Iterable[Sequence[str | None]],
    *,
    template: str | None = "chat",
    unconditional: bool = False,
    window: int | None = None,
    long: str = "reject",
    batch_tokens: int | None = None,
    device: Any = None,
    dtype: Any = None,
    progress: bool = True,
    on_halved: Callable[[int], None] | None = None,
) -> pa.Table:
    """The perplexity of every reply: one row a reply, in input order.

    The columns are prompt_index and reply_index, tokens (the reply's and the closing one), bits (minus the binary
    logarithm of the probability of all of them), bits_per_token, and perplexity, which is 2 ** bits_per_token. An empty
    or null reply has no tokens; one that is over the window has its tokens and no bits.

    Scored are the reply's tokens and the closing token, given the prompt. The replies of one prompt share its
    computation. Neither the order of the input nor `batch_tokens` changes a score by more than rounding.

    Args:
        model: a causal language model, or a path or a hub name; these load in fp32 on a CPU, bf16 on CUDA.
        tokenizer: its tokenizer, a path, or None for the one in the model's folder.
        prompts: each a str (one user turn) or a list of {role, content} messages; as a list, or a column of pyarrow,
            polars, pandas or datasets. Special tokens that stand in a text are read as such.
        replies: for each prompt a list of replies, in a list or such a column. An empty or null reply scores null, and
            a null instead of a list stands for no replies.
        template: "chat" renders prompts with the tokenizer's chat template and the generation prompt, and replies
            close with what the template writes after them (`<|im_end|>` for Qwen2). None takes prompts as raw text,
            and replies close with the tokenizer's eos token.
        unconditional: score replies after a single start token (bos, or eos without one) instead of their prompts.
        window: the most tokens a sequence may have, the closing one included; the model's own limit unless given.
        long: what becomes of a longer one. "reject" scores null. "slide" scores it in windows: a full one first,
            then ones whose end advances by half a window and which reach back a whole one.
        batch_tokens: tokens that go through the model together; what the device's memory allows unless given.
        device, dtype: where and in what a path is loaded.
        progress: show rate and time left on stderr.
        on_halved: called with the new number of tokens whenever the memory did not hold a batch and it was halved.

    Raises:
        UserError: something in the arguments is amiss, or the model gives scores that are no numbers.
    """
    if long not in ("reject", "slide"):
        raise UserError(f"long={long!r} is unknown: use 'reject' or 'slide'")
    pairs = _paired(prompts, replies)
    encoder = Encoder(as_tokenizer(tokenizer, model), template)
    model = as_model(model, device, dtype)

    def score(groups: Sequence[Group]) -> list[np.ndarray]:
        shown = "perplexity" if progress else None
        return continuation_logprobs(model, groups, batch_tokens=batch_tokens, progress=shown, on_halved=on_halved)

    limit = checked_window(model, window)
    return _table(encoder, limit, pairs, score, unconditional=unconditional, slides=long == "slide")


def scored_replies(
    encoder: Encoder, window: int, prompts: Iterable[Prompt], replies: Iterable[Sequence[str | None]], score: Score
) -> pa.Table:
    """The table of `perplexity`, whoever gives the scores."""
    return _table(encoder, window, _paired(prompts, replies), score, unconditional=False, slides=False)


def _table(
    encoder: Encoder,
    limit: int,
    pairs: list[tuple[Prompt, list[str | None]]],
    score: Score,
    *,
    unconditional: bool,
    slides: bool,
) -> pa.Table:
    prefixes = _prefixes(encoder, [prompt for prompt, _ in pairs], unconditional)
    closed = _closed_replies(encoder, [several for _, several in pairs])
    planned = list(_groups(prefixes, closed, limit, slides=slides))
    scores = score([group for group, _ in planned])
    totals: dict[tuple[int, int], float] = {}
    for (_, owners), values in zip(planned, scores, strict=True):
        for owner, value in zip(owners, values.tolist(), strict=True):
            totals[owner] = totals.get(owner, 0.0) + value
    rows = (
        (i, j, *_figures(len(tokens), totals.get((i, j))))
        for i, several in enumerate(closed)
        for j, tokens in enumerate(several)
    )
    columns = list(zip(*rows, strict=True)) or [[]] * len(SCHEMA)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def _paired(prompts: Iterable[Any], replies: Iterable[Any]) -> list[tuple[Prompt, list[str | None]]]:
    """Prompts beside their replies, as Python objects. Raises UserError naming what doesn't fit."""
    prompts = listed_prompts(prompts)
    if isinstance(replies, str) or not isinstance(replies, Iterable):
        raise UserError(f"replies is a {type(replies).__name__}: give a list of replies for every prompt")
    replies = [[] if several is None else several for several in listed(replies)]
    if len(prompts) != len(replies):
        raise UserError(f"{len(prompts)} prompts but {len(replies)} lists of replies: give one list for every prompt")
    for i, several in enumerate(replies):
        if isinstance(several, str) or not isinstance(several, Sequence):
            raise UserError(f"replies[{i}] is a {type(several).__name__}: give a list of replies for every prompt")
        for j, reply in enumerate(several):
            if reply is not None and not isinstance(reply, str):
                raise UserError(f"replies[{i}][{j}] is a {type(reply).__name__}: a reply is a str or None")
            check_text(f"replies[{i}][{j}]", reply or "")
    return [(prompt, list(several)) for prompt, several in zip(prompts, replies, strict=True)]


def _prefixes(encoder: Encoder, prompts: list[Prompt], unconditional: bool) -> list[list[int]]:
    prefixes = [[]] * len(prompts) if unconditional else encoder.prompts(prompts)
    # An empty raw prompt leaves the reply's first token without anything that could predict it: the same start token.
    return [prefix or [encoder.start_token()] for prefix in prefixes]


def _closed_replies(encoder: Encoder, replies: list[list[str | None]]) -> list[list[list[int]]]:
    """Token ids of each reply with its closing token; none at all for an empty or null reply."""
    ids = iter(encoder.replies([reply or "" for several in replies for reply in several]))
    return [
        [[*tokens, encoder.closing_token] if tokens else [] for tokens in itertools.islice(ids, len(several))]
        for several in replies
    ]


def _groups(
    prefixes: list[list[int]], closed: list[list[list[int]]], limit: int, *, slides: bool
) -> Iterator[tuple[Group, list[tuple[int, int]]]]:
    """What is to be scored, and whose it is: the prompt's and the reply's number of each continuation.

    With `slides` a sequence over the limit gives several groups, whose scores add up.
    """
    for i, (prefix, several) in enumerate(zip(prefixes, closed, strict=True)):
        fitting = [j for j, tokens in enumerate(several) if tokens and len(prefix) + len(tokens) <= limit]
        if fitting:
            yield Group(prefix, [several[j] for j in fitting]), [(i, j) for j in fitting]
        if slides:
            for j in sorted(set(range(len(several))).difference(fitting)):
                for piece in slide(prefix, several[j], limit):
                    yield piece, [(i, j)]


def slide(prefix: list[int], continuation: list[int], window: int) -> list[Group]:
    """Cuts a sequence over the window into pieces that fit and together score every token of the continuation once.

    Each piece scores what is new in it: as much as fits in the first if the prefix leaves room, half a window else.
    """
    ids = [*prefix, *continuation]
    pieces, begin = [], len(prefix)
    while begin < len(ids):
        end = min(len(ids), max(begin + window // 2, window))
        start = max(0, end - window)
        pieces.append(Group(ids[start:begin], [ids[begin:end]]))
        begin = end
    return pieces


def _figures(tokens: int, logprob: float | None) -> tuple[int | None, float | None, float | None, float | None]:
    """The columns tokens, bits, bits_per_token and perplexity of one reply."""
    if logprob is None or math.isnan(logprob):  # over the window, or a server's no
        return tokens or None, None, None, None
    bits = -logprob / math.log(2)
    rate = bits / tokens
    return tokens, bits, rate, 2.0**rate if rate < sys.float_info.max_exp else math.inf  # no float64 holds 2 ** 1024
