"""The log-probability of each of several fixed answers to a prompt, without decoding anything."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from slmfast.errors import UserError
from slmfast.scoring.encoding import Encoder, Prompt, check_text, listed_prompts
from slmfast.scoring.forward import continuation_logprobs
from slmfast.scoring.loading import ModelLike, as_model, as_tokenizer, checked_window
from slmfast.scoring.packing import Group


def choose(
    model: ModelLike,
    tokenizer: Any,
    prompts: Iterable[Prompt],
    choices: Sequence[str],
    *,
    template: str | None = "chat",
    window: int | None = None,
    batch_tokens: int | None = None,
    device: Any = None,
    dtype: Any = None,
    progress: bool = True,
) -> np.ndarray:
    """The natural log-probability of every whole choice as the reply to every prompt, float64 [n, len(choices)].

    A choice is scored with the closing token after it, so that "0" is not a part of "0.5". All choices share the
    prompt's computation. Where a prompt and its longest choice are over the window, the prompt's row is NaN, the
    array's null: the model can't read it. The other arguments are those of `perplexity`.

    Raises:
        UserError: something in the arguments is amiss, or the model gives scores that are no numbers.
    """
    choices, listed = _checked(choices), listed_prompts(prompts)
    encoder = Encoder(as_tokenizer(tokenizer, model), template)
    model = as_model(model, device, dtype)
    limit = checked_window(model, window)
    prefixes = [prefix or [encoder.start_token()] for prefix in encoder.prompts(listed)]
    closed = [[*tokens, encoder.closing_token] for tokens in encoder.replies(choices)]
    room = limit - max(map(len, closed))
    readable = [i for i, prefix in enumerate(prefixes) if len(prefix) <= room]
    groups = [Group(prefixes[i], closed) for i in readable]
    scores = np.full((len(prefixes), len(choices)), np.nan)
    logprobs = continuation_logprobs(model, groups, batch_tokens=batch_tokens, progress="choices" if progress else None)
    for i, values in zip(readable, logprobs, strict=True):
        scores[i] = values
    return scores


def _checked(choices: Sequence[str]) -> list[str]:
    given = [] if isinstance(choices, str) or not isinstance(choices, Iterable) else list(choices)
    if not given or not all(isinstance(choice, str) and choice for choice in given):
        raise UserError(f"choices {choices!r}: give a list of strings, none of them empty")
    if len(set(given)) < len(given):
        raise UserError(f"choices {given!r}: each may stand there once")
    return [check_text(f"choice {i}", choice) for i, choice in enumerate(given)]
