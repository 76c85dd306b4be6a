"""The engine that runs a model here with vLLM, an optional package, in this process: replies alone, no scores.

Replies depend on how vLLM batches, as far as rounding does; each request has a seed of its own.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import AutoConfig

from slmfast.engines.base import Generation, Prompt, checked_sampling, describe_parameters, request_seeds
from slmfast.engines.settings import EngineSettings
from slmfast.errors import UserError
from slmfast.scoring.encoding import Encoder
from slmfast.scoring.loading import check_model_name, config_window, load_tokenizer


class VllmEngine:
    """Generates with `vllm.LLM`, whose weights load at the first use.

    Args:
        settings: dtype, window, and `extra`, which goes to vllm.LLM as it is (tensor_parallel_size, ...).
        model: a model folder or hub name.
        key: the recipe's section of these settings, for messages.

    Raises:
        UserError: vLLM is not installed, or there is no such model or tokenizer.
    """

    ahead = 0

    def __init__(self, settings: EngineSettings, model: str | Path, *, key: str):
        try:
            import vllm
        except ImportError as error:
            told = f"vllm is not installed ({error}): install it, or say local"
            raise UserError(f"recipe key {key}.kind: {told}") from error
        self._vllm, self.settings, self.key = vllm, settings, key
        self.name = check_model_name(model)
        self.encoder = Encoder(load_tokenizer(self.name))
        self.token_budget: int | None = None
        self.waiting: Callable[[], None] = lambda: None

    @cached_property
    def llm(self) -> Any:
        """vLLM's own engine. The dtype is always said: vLLM's "auto" would make fp32 weights fp16."""
        try:
            return self._vllm.LLM(
                model=self.name,
                dtype=self.settings.dtype,
                max_model_len=self.window,
                trust_remote_code=False,
                generation_config="vllm",  # else the model's own sampling would be mixed into ours
                **self.settings.extra,
            )
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            told = f"vLLM does not take {self.name} ({reason}): correct it"
            raise UserError(f"recipe section {self.key}: {told}") from error

    @cached_property
    def window(self) -> int:
        """The most tokens that a prompt and its reply may have together."""
        return self.settings.window or config_window(AutoConfig.from_pretrained(self.name, trust_remote_code=False))

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
        """A reply to each prompt, in input order; see `Engine.generate`."""
        checked_sampling(max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        if not prompts:
            return []
        encoded, seeds = self.encoder.prompts(prompts), request_seeds(prompts, seed)
        how = {"temperature": temperature, "top_p": top_p, "max_tokens": max_new_tokens}
        how["stop_token_ids"] = [self.encoder.closing_token]
        sampling = [self._vllm.SamplingParams(seed=own, **how) for own in seeds]
        texts = [{"prompt_token_ids": ids} for ids in encoded]
        answers = self.llm.generate(texts, sampling, use_tqdm=False)
        asked = describe_parameters(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        return [_generation(a.outputs[0], own, asked) for a, own in zip(answers, seeds, strict=True)]

    def choose(self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Not with this engine."""
        raise self._no_scores()

    def perplexity(self, prompts: Sequence[Prompt], replies: Sequence[Sequence[str | None]]) -> pa.Table:
        """Not with this engine."""
        raise self._no_scores()

    def _no_scores(self) -> UserError:
        return UserError(f"recipe key {self.key}.kind: vllm gives no scores here: judge with engines.judge.kind local")

    def fix_token_budget(self) -> int | None:
        """What goes through the model together is vLLM's matter."""
        return self.token_budget

    def begin(self, prompts: Sequence[Prompt], **options: Any) -> None:
        """Nothing: `generate` does the work when it is due."""

    def state(self) -> str:
        """Nothing: the stage's own figures tell it all."""
        return ""

    def notes(self) -> dict[str, Any]:
        """Who wrote the replies, and in which dtype."""
        version = getattr(self._vllm, "__version__", "unknown")
        return {"kind": "vllm", "version": version, "dtype": self.settings.dtype, "window": self.window}

    def close(self) -> None:
        """Gives back the device's memory, as far as vLLM does."""
        self.__dict__.pop("llm", None)


def _generation(output: Any, seed: int, parameters: str) -> Generation:
    """vLLM's word for how a reply ended: stop, length, or abort, after which there is none."""
    if output.finish_reason not in ("stop", "length"):
        return Generation("", "refused", 0, seed, parameters, refusal=f"finish reason {output.finish_reason!r}")
    return Generation(output.text.strip(), output.finish_reason, len(output.token_ids), seed, parameters)
