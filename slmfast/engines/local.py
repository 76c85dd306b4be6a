"""The engine that runs a model here, on transformers: no server, any machine."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import AutoConfig

from slmfast.engines.base import Generation, Prompt, checked_sampling, describe_parameters
from slmfast.engines.decoding import decode, occurrences, uniforms
from slmfast.errors import UserError
from slmfast.scoring import choose, perplexity
from slmfast.scoring.budget import checked_budget
from slmfast.scoring.encoding import Encoder
from slmfast.scoring.loading import check_model_name, config_window, evaluating, load_model, load_tokenizer

GENERATION_BATCH = 64  # replies written side by side


class LocalEngine:
    """Generates and scores with one model of `transformers`.

    Batches are made of a call's whole input by length, so that results depend neither on the input's order nor on what
    an earlier, broken run had left to do. The weights load at the first use, fp32 on a CPU and bf16 on CUDA.

    Args:
        model: a model folder or hub name.
        device, dtype: where and in what the weights load.
        threads: CPU threads of the model's work; those of torch unless given.
        token_budget: tokens that are scored together; what the memory holds at the first use unless given.
        batch_size: replies that are written side by side.

    Raises:
        UserError: there is no such model or tokenizer, or the tokenizer has no chat template.
    """

    ahead = 0  # what is begun ahead would only be in the way

    def __init__(
        self,
        model: str | Path,
        *,
        device: Any = None,
        dtype: Any = None,
        threads: int | None = None,
        token_budget: int | None = None,
        batch_size: int = GENERATION_BATCH,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: give a positive number of prompts")
        if threads is not None and threads < 1:
            raise UserError(f"threads is {threads}: give a positive number")
        self.name = check_model_name(model)
        self.device, self.dtype, self.threads = device, dtype, threads
        self.token_budget, self.batch_size = token_budget, batch_size
        self.encoder = Encoder(load_tokenizer(self.name))
        self.waiting: Callable[[], None] = lambda: None  # nothing here waits for others

    @cached_property
    def model(self) -> nn.Module:
        """The model itself, loaded when it is first asked for."""
        return load_model(self.name, device=self.device, dtype=self.dtype)

    @cached_property
    def window(self) -> int:
        """The most tokens that a prompt and its reply may have together."""
        return config_window(AutoConfig.from_pretrained(self.name, trust_remote_code=False))

    def count_tokens(self, prompts: Sequence[Prompt]) -> list[int]:
        """The length in tokens of each rendered prompt."""
        return [len(ids) for ids in self.encoder.prompts(prompts)]

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[Generation]:
        """A reply to each prompt, in input order; see `Engine.generate`.

        Equal prompts of one call are sampled differently, each in the same way in every call.
        """
        sampling = checked_sampling(max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        encoded = self.encoder.prompts(prompts)
        for i, ids in enumerate(encoded):
            if len(ids) + max_new_tokens > self.window:
                raise UserError(
                    f"prompt {i} has {len(ids)} tokens and leaves no room for {max_new_tokens} new ones in a window "
                    f"of {self.window}: leave it out (count_tokens tells) or lower max_new_tokens"
                )
        numbers = occurrences(encoded)
        order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i]), encoded[i], numbers[i]))
        ids = [encoded[i] for i in order]
        draws = None
        if temperature > 0 and ids:
            draws = np.stack([uniforms(encoded[i], numbers[i], max_new_tokens, seed) for i in order])
        with self._threads(), evaluating(self.model):
            tokens = decode(self.model, ids, self._ends, max_new_tokens, draws, sampling, slots=self.batch_size)
        asked = describe_parameters(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        replies = {i: self._generation(reply, seed, asked) for i, reply in zip(order, tokens, strict=True)}
        return [replies[i] for i in range(len(encoded))]

    def begin(self, prompts: Sequence[Prompt], **options: Any) -> None:
        """Nothing: `generate` does the work when it is due."""

    def state(self) -> str:
        """Nothing: the stage's own figures tell it all."""
        return ""

    def notes(self) -> dict[str, Any]:
        """Nothing, likewise."""
        return {}

    def close(self) -> None:
        """Nothing: the weights go with the object."""

    def fix_token_budget(self) -> int:
        """See `Engine.fix_token_budget`."""
        self.token_budget = checked_budget(self.token_budget, self.model)
        return self.token_budget

    def choose(self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """The log-probability of each prompt's whole choices, one array a prompt; see slmfast.choose."""
        if not prompts:
            return []
        with self._threads():
            return choose(self.model, self.encoder.tokenizer, prompts, choices, **self._scoring())

    def perplexity(self, prompts: Sequence[Prompt], replies: Sequence[Sequence[str | None]]) -> pa.Table:
        """One row a reply; see slmfast.perplexity."""
        with self._threads():
            return perplexity(self.model, self.encoder.tokenizer, prompts, replies, **self._scoring())

    def _scoring(self) -> dict[str, Any]:
        def halved(tokens: int) -> None:
            self.token_budget = tokens

        return {"batch_tokens": self.token_budget, "progress": False, "on_halved": halved}

    @cached_property
    def _ends(self) -> frozenset[int]:
        """The tokens that close a reply: the template's, and those that the model's own generation config names."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        several = configured if isinstance(configured, list | tuple) else [configured]
        return frozenset([self.encoder.closing_token, *(token for token in several if token is not None)])

    def _generation(self, tokens: list[int], seed: int, parameters: str) -> Generation:
        text = self.encoder.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        ended = "stop" if tokens[-1] in self._ends else "length"
        return Generation(text, ended, len(tokens), seed, parameters)

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """The engine's own number of torch threads inside, the caller's after."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)
