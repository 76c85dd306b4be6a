"""What every engine serves, whoever runs the model."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from slmfast.errors import UserError

Message = dict[str, str]
Prompt = str | Sequence[Message]  # a str is one user turn


FinishReason = Literal["stop", "length", "content_filter", "refusal", "refused"]

# What is kept with every reply, whoever wrote it. It ends with stop, the model's own end; length, where max_new_tokens
# cut it; content_filter or refusal, where a server says that of it; or refused, where the server gave none for good.
GENERATION_FIELDS = [
    ("finish_reason", pa.string()),  # see below
    ("refusal", pa.string()),  # why a server gave no reply, in its words
    ("model", pa.string()),  # as the recipe, or the server, calls it
    ("parameters", pa.string()),  # of the request, in JSON
    ("seed", pa.int64()),  # that the reply was drawn with
    ("tokens", pa.int64()),  # generated ones, the closing one included
]


@dataclass(frozen=True)
class Generation:
    """One reply: its text without special tokens or surrounding white space, and how it came about."""

    text: str
    finish_reason: FinishReason  # why it ended
    tokens: int  # how many were generated, the closing one included
    seed: int = 0  # what it was drawn with
    parameters: str = "{}"  # how, in JSON
    refusal: str | None = None  # why there is none

    def fields(self, model: str) -> dict[str, Any]:
        """The values of GENERATION_FIELDS."""
        kept = {name: getattr(self, name) for name in ("finish_reason", "refusal", "parameters", "seed", "tokens")}
        return kept | {"model": model}


def describe_parameters(**parameters: Any) -> str:
    """Parameters of a generation in JSON, the same text for the same values."""
    return json.dumps(parameters, ensure_ascii=False, sort_keys=True)


def request_seeds(prompts: Sequence[Prompt], seed: int) -> list[int]:
    """A seed of 31 bits for each prompt, made of `seed`, the prompt, and how many equal ones come before it."""
    seen: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        text = json.dumps(messages, sort_keys=True, ensure_ascii=False)
        drawn = hashlib.blake2b(json.dumps([seed, text, seen[text]], sort_keys=True).encode(), digest_size=16).digest()
        seeds.append(int.from_bytes(drawn[:4], "little") >> 1)
        seen[text] += 1
    return seeds


def by_frequency(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts, such as those of finish reasons, the most frequent first, for a manifest."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0  # 0: the likeliest
    top_p: float = 1.0
    seed: int = 0
    # What the logit of a token that stands in the prompt or the reply is divided by, multiplied where it is negative
    # (Keskar et al. 2019, "CTRL"); 1 for none.
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature}: give zero (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: give a share above 0, at most 1")
        if not self.repetition_penalty > 0:
            raise UserError(f"repetition_penalty is {self.repetition_penalty}: give a positive number, 1 for none")


def checked_sampling(max_new_tokens: int, *, temperature: float, top_p: float, seed: int) -> Sampling:
    """How `generate` draws, once its arguments are known to be right. Raises UserError where one is not."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: give a positive number")
    return Sampling(temperature=temperature, top_p=top_p, seed=seed)


class Engine(Protocol):
    """A model that answers and scores. Every result is a function of the arguments, in their order; where a server
    answers, of the replies that it once gave, which are kept.

    `token_budget` says how many tokens are scored together, where that is this side's matter: None until it is asked
    for or set. It falls where the memory does not hold that many, and scores made before differ from those after by
    rounding. `ahead` is how many prompts it wants to be told of, by `begin`, before they are due. `waiting` is called
    now and then while a call waits for replies.
    """

    token_budget: int | None
    ahead: int
    waiting: Callable[[], None]

    def fix_token_budget(self) -> int | None:
        """The token budget, from the memory that is free now where none is set yet."""
        ...

    def begin(self, prompts: Sequence[Prompt], **options: Any) -> None:
        """Says that `generate` will be called with the same arguments. It costs nothing where nothing comes of it."""
        ...

    def state(self) -> str:
        """What it has done so far, in a few words, or none."""
        ...

    def notes(self) -> dict[str, Any]:
        """What it has done, for a manifest; nothing where there is nothing to say."""
        ...

    def close(self) -> None:
        """Gives back what it holds; whatever was begun and not waited for is broken off."""
        ...

    @property
    def window(self) -> int:
        """The most tokens that a prompt and its reply may have together."""
        ...

    def count_tokens(self, prompts: Sequence[Prompt]) -> list[int]:
        """The length in tokens of each prompt as it is put to the model, template included."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[Generation]:
        """A reply to each prompt: greedy at temperature 0, else sampled from the nucleus `top_p` with the seed.

        Raises UserError for a prompt that leaves no room for `max_new_tokens` in the window.
        """
        ...

    def choose(self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Natural log-probabilities of each prompt's own choices, as slmfast.choose; all NaN where it is unreadable."""
        ...

    def perplexity(self, prompts: Sequence[Prompt], replies: Sequence[Sequence[str | None]]) -> pa.Table:
        """One row a reply, as slmfast.perplexity."""
        ...
