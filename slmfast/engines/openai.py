"""The engine that asks a server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp's.

Replies come from `/chat/completions`: the server renders the prompt with its own template. Scores come from
`/completions` with the prompt as token ids, `echo` and `logprobs`, as lm-eval's `local-completions` asks for them.
vLLM gives them; llama.cpp's server gives log-probabilities of generated tokens alone, which is noticed and refused.

The law of same bytes begins at the stored replies: a server may answer the same request otherwise another time (batches
of other sizes round otherwise), but no request is put again once its reply is stored.
"""

import asyncio
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import AutoConfig

from slmfast.engines.base import Generation, Prompt, checked_sampling, describe_parameters, request_seeds
from slmfast.engines.http_client import HttpClient, NoReply, Refused, Unreadable
from slmfast.engines.reply_store import REFUSED, ReplyStore, StoredReply
from slmfast.engines.settings import EngineSettings
from slmfast.errors import UserError
from slmfast.scoring.choices import scored_choices
from slmfast.scoring.encoding import Encoder, check_text, listed_prompts
from slmfast.scoring.loading import check_model_name, config_window, load_tokenizer
from slmfast.scoring.packing import Group
from slmfast.scoring.perplexity import scored_replies

POLL = 0.2  # seconds between two looks at whether the replies are there
LEAST_REFUSALS = 8  # that come before any answer and say that the setup is wrong; more where more is asked at a time
FINISH_REASONS = {"stop": "stop", "length": "length", "content_filter": "content_filter", "eos_token": "stop"}


@dataclass(frozen=True, slots=True)
class _Request:
    """One request, and how its answer is read."""

    key: bytes
    path: str
    body: dict[str, Any]
    read: Callable[[Any], StoredReply]


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
        self.store = ReplyStore(store)
        self.replies, self.refused, self.tokens_in, self.tokens_out = self.store.totals()
        self._found = self.replies  # of an earlier run
        self._doubtful: list[tuple[_Request, StoredReply]] = []  # refusals, while no request was ever answered
        self._asked: dict[bytes, asyncio.Task[StoredReply]] = {}  # belongs to the client's thread, like the store
        self.client = HttpClient(settings, key)

    @cached_property
    def window(self) -> int:
        """The most tokens that a prompt and its reply may have together, the same over a restart.

        The recipe's word or, where it says none, the smaller of what the model's configuration and the server (vLLM's
        `max_model_len`) say.
        """
        known = self._in_thread(self.store.figure, "window")
        if known is None:
            known = self.settings.window or self._configured_window()
            if not self.settings.window and (served := self._wait(self._served_window())):
                known = min(known, served)
            self._in_thread(self.store.set_figure, "window", known)
        return known

    def _configured_window(self) -> int:
        try:
            return config_window(AutoConfig.from_pretrained(self.name, trust_remote_code=False))
        except (OSError, ValueError, UserError) as error:
            raise UserError(f"recipe key {self.key}.window: {self.name} tells no window: give its tokens") from error

    async def _served_window(self) -> int | None:
        def read(answer: Any) -> int | None:
            limits = {model["id"]: model.get("max_model_len") for model in answer.get("data") or []}
            return limits.get(self.settings.model)

        try:
            return await self.client.get("/models", read)
        except Refused as refused:
            if refused.status in (401, 403):
                raise
            self.client.forgive()  # a server need not have this list
            return None

    def count_tokens(self, prompts: Sequence[Prompt]) -> list[int]:
        """The length in tokens of each prompt, rendered with the tokenizer's own template."""
        return [len(ids) for ids in self.encoder.prompts(prompts)]

    def begin(self, prompts: Sequence[Prompt], **options: Any) -> None:
        """Puts the requests already, so that their replies are there when `generate` wants them."""
        requests = self._chats(prompts, **options)
        self.client.call(lambda: [self._task(request) for request in requests])

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
        replies = self._answers(self._chats(prompts, seed=seed, **options))
        return [_generation(reply, parameters) for reply in replies]

    def _chats(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[_Request]:
        checked_sampling(max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        common = {"model": self.settings.model, "max_tokens": max_new_tokens, "temperature": temperature}
        common |= {"top_p": top_p} | self.settings.extra
        listed = listed_prompts(prompts)
        requests = []
        for i, (prompt, own_seed) in enumerate(zip(listed, request_seeds(listed, seed), strict=True)):
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            check_text(f"prompt {i}", json.dumps(messages, sort_keys=True, ensure_ascii=False))
            body = common | {"messages": messages, "seed": own_seed}
            requests.append(self._request("/chat/completions", body, self._chat_reader(own_seed)))
        return requests

    def _chat_reader(self, seed: int) -> Callable[[Any], StoredReply]:
        def read(answer: Any) -> StoredReply:
            choice = answer["choices"][0]
            message = choice["message"]
            text = _clean(message["content"] or "")
            reason = FINISH_REASONS.get(choice["finish_reason"])
            if message.get("refusal"):
                reason, text = "refusal", text or _clean(message["refusal"])
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
        logprobs = iter([math.nan if r.logprob is None else r.logprob for r in self._answers(requests)])
        return [np.array([next(logprobs) for _ in group.continuations], dtype=np.float64) for group in groups]

    def _score(self, prefix: Sequence[int], continuation: Sequence[int]) -> _Request:
        ids = [*prefix, *continuation]
        # One token must be generated: vLLM takes no 0.
        body = {"model": self.settings.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0}
        body |= {"echo": True, "logprobs": 1}

        def read(answer: Any) -> StoredReply:
            values = (answer["choices"][0].get("logprobs") or {}).get("token_logprobs") or []
            if len(values) not in (len(ids), len(ids) + 1) or values[0] is not None:
                raise self._cannot_score(f"it gives {len(values)} log-probabilities for {len(ids)} tokens")
            logprob = math.fsum(values[len(prefix) : len(ids)])
            if not math.isfinite(logprob):
                raise Unreadable
            return StoredReply(None, None, _usage(answer)[0], 0, 0, logprob)

        return self._request("/completions", body, read, len(prefix))

    def _cannot_score(self, reason: str) -> UserError:
        return UserError(
            f"recipe section {self.key}: {self.client.url} can't score a given text ({reason}): rate with kind local, "
            "or serve the judge with vLLM"
        )

    def _request(self, path: str, body: dict[str, Any], read: Callable[[Any], StoredReply], *more: Any) -> _Request:
        return _Request(_hash([path, body, *more]), path, body, read)

    def _answers(self, requests: list[_Request]) -> list[StoredReply]:
        """The replies to requests, in their order, from the store or from the server."""

        async def gather() -> list[StoredReply]:
            if self.client.forgive():  # what an earlier call could not do
                for request, _ in self._doubtful:
                    self._asked.pop(request.key, None)
                self._doubtful = []
            tasks = [self._task(request) for request in requests]
            try:
                replies = await asyncio.gather(*tasks)
                await self._check_doubtful()
                return replies
            finally:
                for key in {request.key for request in requests}:
                    if key in self._asked and self._asked[key].done():  # else it would be put twice
                        del self._asked[key]

        return self._wait(gather())

    def _task(self, request: _Request) -> "asyncio.Task[StoredReply]":
        """The one task that answers a request; made at the first call."""
        task = self._asked.get(request.key)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._asked[request.key] = asyncio.get_running_loop().create_task(self._answer(request))
            # Whoever waits for it hears of its failure; if nobody does any more, nobody need.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _answer(self, request: _Request) -> StoredReply:
        stored = self.store.get(request.key)
        if stored is not None:
            return stored
        try:
            reply = await self.client.post(request.path, request.body, request.read)
        except Refused as refused:
            if refused.one:
                reply = StoredReply(_clean(str(refused)), REFUSED, 0, 0, request.body.get("seed", 0))
            elif request.path == "/completions" and refused.status not in (401, 403):
                raise self._cannot_score(str(refused)) from None
            else:
                raise
        self._keep(request, reply)
        return reply

    def _keep(self, request: _Request, reply: StoredReply) -> None:
        """Stores a reply; a refusal only once any request is answered, for until then the setup may be wrong."""
        self._doubtful.append((request, reply))
        if reply.finish_reason == REFUSED and self.replies == self.refused:
            if len(self._doubtful) >= max(LEAST_REFUSALS, self.ahead):
                raise self._refuses_all()
            return
        doubtful, self._doubtful = self._doubtful, []
        for request, reply in doubtful:
            self.store.add(request.key, reply)
            self.replies += 1
            self.refused += reply.finish_reason == REFUSED
            self.tokens_in += reply.prompt_tokens
            self.tokens_out += reply.tokens

    async def _check_doubtful(self) -> None:
        """Raises UserError where the server refuses all that it has been asked so far, what is on its way included."""
        while self._doubtful and (others := [task for task in self._asked.values() if not task.done()]):
            await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)
        if self._doubtful:
            raise self._refuses_all()

    def _refuses_all(self) -> UserError:
        request, reply = self._doubtful[-1]
        number = len(self._doubtful)
        said = f"it refuses {'the' if number == 1 else f'all {number}'} first request{'s' * (number > 1)}: {reply.text}"
        if request.path == "/completions":
            return self.client.given_up(self._cannot_score(said))
        mend = "correct its model, extra or base_url, or what the server is started with"
        return self.client.given_up(UserError(f"recipe section {self.key}: {self.client.url}: {said}: {mend}"))

    def _wait(self, work: Any) -> Any:
        """The result of a coroutine in the client's thread; shows progress meanwhile."""
        future = self.client.run(work)
        while wait([future], POLL).not_done:
            self.waiting()
        return future.result()

    def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        async def call() -> Any:
            return function(*arguments)

        return self._wait(call())

    def state(self) -> str:
        """The replies so far, with their tokens, and the tries that came to nothing."""
        failed = sum(self.client.failures.values())
        tokens = f"{self.tokens_in:,} tokens read, {self.tokens_out:,} written"
        refused = f" ({self.refused:,} of them refusals)" if self.refused else ""
        return f"{self.role}: {self.replies:,} replies{refused}, {tokens}, {failed:,} tries failed"

    def notes(self) -> dict[str, Any]:
        """What was asked and used, over all runs of the stage; the failed tries are this run's."""
        return {
            "kind": self.settings.kind,
            "model": self.settings.model,
            "window": self._in_thread(self.store.figure, "window"),
            "replies": self.replies,
            "refused": self.refused,
            "of_an_earlier_run": self._found,
            "prompt_tokens": self.tokens_in,
            "reply_tokens": self.tokens_out,
            "failed_tries": dict(sorted(self.client.failures.items())),
        }

    def close(self) -> None:
        """Breaks off what is still asked and closes the store."""
        self.client.close()
        self.store.close()


def _generation(reply: StoredReply, parameters: str) -> Generation:
    if reply.finish_reason == REFUSED:
        return Generation("", REFUSED, 0, reply.seed, parameters, refusal=reply.text)
    return Generation(reply.text or "", reply.finish_reason, reply.tokens, reply.seed, parameters)


def _hash(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _usage(answer: dict[str, Any]) -> tuple[int, int | None]:
    """The tokens read and written, as far as a server tells."""
    usage = answer.get("usage") or {}
    tokens = usage.get("completion_tokens")
    return int(usage.get("prompt_tokens") or 0), None if tokens is None else int(tokens)


def _clean(text: str) -> str:
    """The text with lone surrogates, which JSON can hold and UTF-8 can't, replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
