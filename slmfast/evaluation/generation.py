"""How a task wants replies written, read from its generation_kwargs and the model's own generation config.

lm-eval hands a task's keys to transformers' `generate`, which takes every unset one from the model's generation
config. What of that changes a greedy reply is either done here as there or refused by its name.
"""

from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs
from torch import nn

from slmfast.engines.base import Sampling
from slmfast.errors import UserError

# Keys that change what is written, and the values at which they don't.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1.0,),
    "penalty_alpha": (0.0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "watermarking_config": (),
    "dola_layers": (),
    "stop_strings": (),
}
_OF_SAMPLING = ("top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")  # nothing to a greedy reply


@dataclass(frozen=True)
class Generation:
    """One way of writing replies; items that share it are written together."""

    until: tuple[str, ...]  # a reply ends before the first of these
    max_tokens: int
    sampling: Sampling
    ends: tuple[int, ...]  # tokens that close a reply by the model's own generation config


def generation_of(kwargs: dict[str, Any], model: nn.Module, max_tokens: int, task: str | None) -> Generation:
    """What a task's generation_kwargs ask for.

    Args:
        max_tokens: of a reply where the task doesn't say.
        task: its name, for the message.

    Raises:
        UserError: a key asks for more than greedy replies or samples from a nucleus.
    """
    given = dict(normalize_gen_kwargs(kwargs, max_tokens))
    sampled, temperature = given.pop("do_sample"), float(given.pop("temperature", 0.0))
    temperature = temperature if sampled else 0.0
    top_p = given.pop("top_p", None)
    penalty = given.pop("repetition_penalty", None)
    until, max_tokens = given.pop("until"), given.pop("max_gen_toks")
    for key, value in given.items():
        neutral = key in _OF_SAMPLING and temperature == 0
        if not neutral and not (key in _NEUTRAL and value in (None, *_NEUTRAL[key])):
            raise UserError(f"task {task}: generation_kwargs.{key} is not known here: leave it out")
    own_penalty, ends = _own(model)
    sampling = Sampling(
        temperature=temperature,
        top_p=1.0 if top_p is None or temperature == 0 else float(top_p),
        repetition_penalty=float(own_penalty if penalty is None else penalty),
    )
    return Generation(tuple(until), max_tokens, sampling, ends)


def _own(model: nn.Module) -> tuple[float, tuple[int, ...]]:
    """The model's own repetition penalty and end tokens. Raises UserError where its config wants what is unknown."""
    config = getattr(model, "generation_config", None)
    for key, neutral in _NEUTRAL.items():
        value = getattr(config, key, None)
        if value not in (None, *neutral):
            raise UserError(f"the model's generation_config.json sets {key} to {value}: take it out to evaluate it")
    end = getattr(config, "eos_token_id", None)
    ends = tuple(end) if isinstance(end, list | tuple) else (() if end is None else (end,))
    penalty = getattr(config, "repetition_penalty", None)
    return 1.0 if penalty is None else penalty, ends
