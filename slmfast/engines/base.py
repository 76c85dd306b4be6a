"""What every engine serves, whoever runs the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa

Message = dict[str, str]
Prompt = str | Sequence[Message]  # a str is one user turn


@dataclass(frozen=True)
class Generation:
    """One reply: its text without special tokens or surrounding white space, and why it ended."""

    text: str
    finish_reason: Literal["stop", "length"]  # the model closed it, or max_new_tokens cut it off
    tokens: int  # how many were generated, the closing one included


class Engine(Protocol):
    """A model that answers and scores. Every result is a function of the arguments, in their order.

    `token_budget` says how many tokens are scored together, where that is this side's matter: None until it is asked
    for or set. It falls where the memory does not hold that many, and scores made before differ from those after by
    rounding.
    """

    token_budget: int | None

    def fix_token_budget(self) -> int | None:
        """The token budget, from the memory that is free now where none is set yet."""
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
