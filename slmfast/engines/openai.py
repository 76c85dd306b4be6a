"""The engine that asks a server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp's.

Replies come from `/chat/completions`: the server renders the prompt with its own template. Scores come from
`/completions` with the prompt as token ids, `echo` and `logprobs`, as lm-eval's `local-completions` asks for them.
vLLM gives them; llama.cpp's server gives log-probabilities of generated tokens alone, which is noticed and refused.

The law of same bytes begins at the stored replies: a server may answer the same request otherwise another time (batches
of other sizes round otherwise), but no request is put again once its reply is stored.
"""

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import AutoConfig

from slmfast.engines.base import Generation, Prompt, checked_sampling, describe_parameters, request_seeds
from slmfast.engines.http_client import NoReply, Refused, Unreadable
from slmfast.engines.reply_store import REFUSED, StoredReply, storable
from slmfast.engines.settings import EngineSettings
from slmfast.engines.stored_requests import CannotScore, Request, StoredRequests
from slmfast.errors import UserError
from slmfast.scoring.choices import scored_choices
from slmfast.scoring.encoding import Encoder, check_text, listed_prompts
from slmfast.scoring.loading import check_model_name, config_window, load_tokenizer
from slmfast.scoring.packing import Group
from slmfast.scoring.perplexity import scored_replies

FINISH_REASONS = {"stop": "stop", "length": "length", "content_filter": "content_filter", "eos_token": "stop"}


class OpenAIEngine:
    """Generates and scores through a server.

    Args:
        settings: where the server is and how it is asked.
        tokenizer: folder or hub name of the model's tokenizer, by which prompts are counted and scored texts encoded.
        store: the file that keeps the replies.
        role, key: the role and the recipe's section of `settings`, for messages.

    Raises:
        UserError: the key's environment variable is not set, or there is no such tokenizer.
    """

    def __init__(self, settings: EngineSettings, tokenizer: str | Path, *, store: Path, role: str, key: str):
        self.settings, self.role, self.key = settings, role, key
        self.ahead = 2 * settings.concurrency
        self.token_budget: int | None = None
        self.waiting: Callable[[], None] = lambda: None
        self.name = check_model_name(tokenizer)
        self.encoder = Encoder(load_tokenizer(self.name))
        self.requests = StoredRequests(settings, store, key=key, ahead=self.ahead, waiting=lambda: self.waiting())
        self.store, self.client = self.requests.store, self.requests.client

    @cached_property
    def window(self) -> int:
        """The most tokens that a prompt and its reply may have together, the same over a restart.

        The recipe's word or, where it says none, the smaller of what the model's configuration and the server (vLLM's
        `max_model_len`) say.
        """
        known = self.requests.in_thread(self.store.figure, "window")
        if known is None:
            known = self.settings.window or self._configured_window()
            if not self.settings.window and (served := self.requests.wait(self._served_window())):
                known = min(known, served)
            self.requests.in_thread(self.store.set_figure, "window", known)
        return known

    def _configured_window(self) -> int:
        try:
            return config_window(AutoConfig.from_pretrained(self.name, trust_remote_code=False))
        except (OSError, ValueError, UserError) as error:
            raise UserError(f"recipe key {self.key}.window: {self.name} tells no window: give its tokens") from error

    async def _served_window(self) -> int | None:
        def read(answer: Any) -> int | None:
            limits = {model["id"]: model.get("max_model_len") for model in answer.get("data") or []}
            limit = limits.get(self.settings.model)
            return limit if type(limit) is int and limit > 1 else None

        try:
            return await self.client.get("/models", read)
        except Refused as refused:
            if refused.status in (401, 403):
                raise
            self.client.forgive()  # a server need not have this list
            return None
        except UserError as error:  # it may have one, and say later how long a text may be
            raise self.client.given_up(
                UserError(f"{error}. Where it has no list of models, give {self.key}.window, and none is asked for")
            ) from None

    def count_tokens(self, prompts: Sequence[Prompt]) -> list[int]:
        """The length in tokens of each prompt, rendered with the tokenizer's own template."""
        return [len(ids) for ids in self.encoder.prompts(prompts)]

    def begin(self, prompts: Sequence[Prompt], **options: Any) -> None:
        """Puts the requests already, so that their replies are there when `generate` wants them."""
        self.requests.begin(self._chats(prompts, **options))

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

        Every request has a seed of its own, made of `seed`, the prompt, and how many equal prompts of the call come
        before it.
        """
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        parameters = describe_parameters(**options, **self.settings.extra)
        replies = self.requests.answers(self._chats(prompts, seed=seed, **options))
        return [_generation(reply, parameters) for reply in replies]

    def _chats(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[Request]:
        checked_sampling(max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        common = {"model": self.settings.model, "max_tokens": max_new_tokens, "temperature": temperature}
        common |= {"top_p": top_p} | self.settings.extra
        listed = listed_prompts(prompts)
        requests = []
        for i, (prompt, own_seed) in enumerate(zip(listed, request_seeds(listed, seed), strict=True)):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            check_text(f"prompt {i}", json.dumps(messages, sort_keys=True, ensure_ascii=False))
            body = common | {"messages": messages, "seed": own_seed}
            requests.append(Request.of("/chat/completions", body, self._chat_reader(own_seed)))
        return requests

    def _chat_reader(self, seed: int) -> Callable[[Any], StoredReply]:
        def read(answer: Any) -> StoredReply:
            choice = answer["choices"][0]
            message = choice["message"]
            text = storable(message["content"] or "")
            reason = FINISH_REASONS.get(choice["finish_reason"])
            if message.get("refusal"):
                reason, text = "refusal", text or storable(message["refusal"])
            if reason is None:  # such as "abort", or the call of a tool that nobody offered
                raise NoReply(f"finish reason {str(choice['finish_reason'])[:50]!r}")
            prompt_tokens, tokens = _usage(answer)
            if tokens is None:
                tokens = len(self.encoder.replies([text])[0]) + (reason == "stop")
            return StoredReply(text.strip(), reason, prompt_tokens, tokens, seed)

        return read

    def fix_token_budget(self) -> int | None:
        """What is scored together is the server's matter."""
        return self.token_budget

    def choose(self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """The log-probability of each prompt's whole choices, one array a prompt; see slmfast.choose."""
        return scored_choices(self.encoder, self.window - 1, prompts, choices, self._scores) if prompts else []

    def perplexity(self, prompts: Sequence[Prompt], replies: Sequence[Sequence[str | None]]) -> pa.Table:
        """One row a reply; see slmfast.perplexity."""
        return scored_replies(self.encoder, self.window - 1, prompts, replies, self._scores)

    def _scores(self, groups: Sequence[Group]) -> list[np.ndarray]:
        requests = [self._score(group.prefix, continuation) for group in groups for continuation in group.continuations]
        # What the server refuses it can't read: null, as a text over the window.
        logprobs = iter([math.nan if r.logprob is None else r.logprob for r in self.requests.answers(requests)])
        return [np.array([next(logprobs) for _ in group.continuations], dtype=np.float64) for group in groups]

    def _score(self, prefix: Sequence[int], continuation: Sequence[int]) -> Request:
        ids = [*prefix, *continuation]
        # One token must be generated: vLLM takes no 0.
        body = {"model": self.settings.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0}
        body |= {"echo": True, "logprobs": 1}

        def read(answer: Any) -> StoredReply:
            values = (answer["choices"][0].get("logprobs") or {}).get("token_logprobs") or []
            if len(values) not in (len(ids), len(ids) + 1) or values[0] is not None:
                if self.requests.replies > self.requests.refused:  # it does score: this is one odd answer
                    raise Unreadable
                raise self.requests.cannot_score(f"it gives {len(values)} log-probabilities for {len(ids)} tokens")
            logprob = math.fsum(values[len(prefix) : len(ids)])
            if not math.isfinite(logprob):
                raise Unreadable
            return StoredReply(None, None, _usage(answer)[0], 0, 0, logprob)

        return Request.of("/completions", body, read, len(prefix))

    def state(self) -> str:
        """The replies so far, with their tokens, and the tries that came to nothing."""
        done, failed = self.requests, sum(self.client.failures.values())
        tokens = f"{done.tokens_in:,} tokens read, {done.tokens_out:,} written"
        refused = f" ({done.refused:,} of them refusals)" if done.refused else ""
        return f"{self.role}: {done.replies:,} replies{refused}, {tokens}, {failed:,} tries failed"

    def notes(self) -> dict[str, Any]:
        """What was asked and used, over all runs of the stage; the failed tries are this run's."""
        return {
            "kind": self.settings.kind,
            "model": self.settings.model,
            "window": self.requests.in_thread(self.store.figure, "window"),
            "replies": self.requests.replies,
            "refused": self.requests.refused,
            "of_an_earlier_run": self.requests.found,
            "prompt_tokens": self.requests.tokens_in,
            "reply_tokens": self.requests.tokens_out,
            "failed_tries": dict(sorted(self.client.failures.items())),
        }

    def close(self) -> None:
        """Breaks off what is still asked and closes the store."""
        self.requests.close()


def check_scoring(settings: EngineSettings, tokenizer: str | Path, key: str) -> None:
    """Has a server score two tokens: what a judge can't do is to be known before days of other work.

    A server that isn't there yet is not asked: it may be started when its stage begins.

    Args:
        key: the recipe's section of these settings, for the message.

    Raises:
        CannotScore: the server answers, but gives no log-probabilities of a text.
    """
    once = dataclasses.replace(settings, tries=1)
    with tempfile.TemporaryDirectory() as folder:
        engine = OpenAIEngine(once, tokenizer, store=Path(folder) / "replies.sqlite", role="judge", key=key)
        try:
            engine.requests.answers([engine._score([1], [2])])
        except CannotScore:
            raise
        except UserError as error:
            print(f"{key} is asked again when its stage begins: {error}", flush=True)
        finally:
            engine.close()


def _generation(reply: StoredReply, parameters: str) -> Generation:
    if reply.finish_reason == REFUSED:
        return Generation("", REFUSED, 0, reply.seed, parameters, refusal=reply.text)
    return Generation(reply.text or "", reply.finish_reason, reply.tokens, reply.seed, parameters)


def _usage(answer: dict[str, Any]) -> tuple[int, int | None]:
    """The tokens read and written, as far as a server tells, and tells what can be."""
    usage = answer.get("usage") or {}
    told = (usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
    counts = (None if count is None else int(count) for count in told)
    read, written = (count if count is not None and 0 <= count < 1 << 31 else None for count in counts)
    return read or 0, written
