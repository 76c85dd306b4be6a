"""The log-probability of each of several fixed answers to a prompt, without decoding anything."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from slmfast.errors import UserError
from slmfast.scoring.encoding import Encoder, Prompt, check_text, listed, listed_prompts
from slmfast.scoring.forward import continuation_logprobs
from slmfast.scoring.loading import ModelLike, as_model, as_tokenizer, checked_window
from slmfast.scoring.packing import Group
from slmfast.scoring.perplexity import Score


def choose(
    model: ModelLike,
    tokenizer: Any,
    prompts: Iterable[Prompt],
    choices: Sequence[str] | Sequence[Sequence[str]],
    *,
    template: str | None = "chat",
    window: int | None = None,
    batch_tokens: int | None = None,
    device: Any = None,
    dtype: Any = None,
    progress: bool = True,
    on_halved: Callable[[int], None] | None = None,
) -> np.ndarray | list[np.ndarray]:
    """The natural log-probability of every whole choice as the reply to every prompt, float64 [n, len(choices)].

    A choice is scored with the closing token after it, so that "0" is not a part of "0.5". All choices share the
    prompt's computation, and prompts share what they begin with: several questions about one text, put in one call
    with the text before the question, read it once. Where a prompt and its longest choice are over the window, the
    prompt's row is NaN, the array's null: the model can't read it.

    Args:
        choices: strings that serve for all prompts, or a list of strings for each prompt; the answer to these is a
            list of arrays, one a prompt.

    The other arguments are those of `perplexity`.

    Raises:
        UserError: something in the arguments is amiss, or the model gives scores that are no numbers.
    """
    listed = listed_prompts(prompts)
    alike = _for_all(choices)
    several = [alike] * len(listed) if alike else _for_each(choices, len(listed))
    encoder = Encoder(as_tokenizer(tokenizer, model), template)
    model = as_model(model, device, dtype)

    def score(groups: Sequence[Group]) -> list[np.ndarray]:
        shown = "choices" if progress else None
        return continuation_logprobs(model, groups, batch_tokens=batch_tokens, progress=shown, on_halved=on_halved)

    scores = _scores(encoder, checked_window(model, window), listed, several, score)
    return np.array(scores).reshape(len(scores), len(alike)) if alike else scores


def scored_choices(
    encoder: Encoder, window: int, prompts: Iterable[Prompt], choices: Iterable[Iterable[str]], score: Score
) -> list[np.ndarray]:
    """What `choose` gives for choices of each prompt's own, whoever gives the scores."""
    listed = listed_prompts(prompts)
    return _scores(encoder, window, listed, _for_each(choices, len(listed)), score)


def _scores(
    encoder: Encoder, limit: int, prompts: list[Prompt], several: list[list[str]], score: Score
) -> list[np.ndarray]:
    prefixes = [prefix or [encoder.start_token()] for prefix in encoder.prompts(prompts)]
    distinct = list(dict.fromkeys(choice for some in several for choice in some))
    closed = dict(zip(distinct, ([*ids, encoder.closing_token] for ids in encoder.replies(distinct)), strict=True))
    groups = [Group(prefix, [closed[c] for c in some]) for prefix, some in zip(prefixes, several, strict=True)]
    readable = [i for i, group in enumerate(groups) if _length(group) <= limit]
    scores = [np.full(len(some), np.nan) for some in several]
    for i, values in zip(readable, score([groups[i] for i in readable]), strict=True):
        scores[i] = values
    return scores


def _length(group: Group) -> int:
    return len(group.prefix) + max(map(len, group.continuations))


def _for_all(choices: Any) -> list[str]:
    """The choices, if they are strings that serve for all prompts; nothing if each prompt has a list of its own."""
    if isinstance(choices, str) or not isinstance(choices, Iterable):
        raise UserError(f"choices {choices!r}: give a list of strings, none of them empty")
    given = listed(choices)
    own = given and all(isinstance(some, Iterable) and not isinstance(some, str) for some in given)
    return [] if own else _checked(given)


def _for_each(choices: Iterable[Iterable[str]], prompts: int) -> list[list[str]]:
    lists = [_checked(some) for some in listed(choices)]
    if len(lists) != prompts:
        raise UserError(f"{prompts} prompts but {len(lists)} lists of choices: give one for every prompt")
    return lists


def _checked(given: list[Any]) -> list[str]:
    if not given or not all(isinstance(choice, str) and choice for choice in given):
        raise UserError(f"choices {given!r}: give a list of strings, none of them empty")
    if len(set(given)) < len(given):
        twice = next(choice for choice in given if given.count(choice) > 1)
        raise UserError(f"choices {given!r}: {twice!r} stands there twice, name it once")
    return [check_text(f"choice {i}", choice) for i, choice in enumerate(given)]
