"""Requests to a server whose replies are kept: each is put once, and a refusal is told apart from a wrong setup."""

import asyncio
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmfast.engines.http_client import HttpClient, Refused
from slmfast.engines.reply_store import REFUSED, ReplyStore, StoredReply, storable
from slmfast.engines.settings import EngineSettings
from slmfast.errors import UserError

POLL = 0.2  # seconds between two looks at whether the replies are there
LEAST_REFUSALS = 8  # that come before any answer and say that the setup is wrong; more where more is asked at a time


@dataclass(frozen=True, slots=True)
class Request:
    """One request, and how its answer is read."""

    key: bytes
    path: str
    body: dict[str, Any]
    read: Callable[[Any], StoredReply]

    @classmethod
    def of(cls, path: str, body: dict[str, Any], read: Callable[[Any], StoredReply], *more: Any) -> "Request":
        """A request whose key is a hash of all that it asks, and of what `more` decides on how its answer is read."""
        text = json.dumps([path, body, *more], sort_keys=True)
        return cls(hashlib.blake2b(text.encode(), digest_size=16).digest(), path, body, read)


class CannotScore(UserError):
    """A server gives no log-probabilities of a given text."""


class StoredRequests:
    """What was asked of one server, and what is on its way.

    Args:
        settings: where it is and how it is asked.
        store: the file that keeps the replies.
        key: the recipe's section of `settings`, for messages.
        ahead: how many requests are put before they are due.
        waiting: called now and then while a call waits for replies.

    Raises:
        UserError: the key's environment variable is not set, or the file can't be used.
    """

    def __init__(self, settings: EngineSettings, store: Path, *, key: str, ahead: int, waiting: Callable[[], None]):
        self.key, self._ahead, self._waiting = key, ahead, waiting
        self.store = ReplyStore(store)
        self.replies, self.refused, self.tokens_in, self.tokens_out = self.store.totals()
        self.found = self.replies  # of an earlier run
        self._doubtful: list[tuple[Request, StoredReply]] = []  # refusals, while no request was ever answered
        self._asked: dict[bytes, asyncio.Task[StoredReply]] = {}  # belongs to the client's thread, like the store
        self.client = HttpClient(settings, key)

    def begin(self, requests: list[Request]) -> None:
        """Puts requests already, whose replies `answers` will want."""
        self.client.call(lambda: [self._task(request) for request in requests])

    def answers(self, requests: list[Request]) -> list[StoredReply]:
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

        return self.wait(gather())

    def _task(self, request: Request) -> "asyncio.Task[StoredReply]":
        """The one task that answers a request; made at the first call."""
        task = self._asked.get(request.key)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._asked[request.key] = asyncio.get_running_loop().create_task(self._answer(request))
            # Whoever waits for it hears of its failure; if nobody does any more, nobody need.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _answer(self, request: Request) -> StoredReply:
        stored = self.store.get(request.key)
        if stored is not None:
            return stored
        try:
            reply = await self.client.post(request.path, request.body, request.read)
        except Refused as refused:
            if refused.one:
                reply = StoredReply(storable(str(refused)), REFUSED, 0, 0, request.body.get("seed", 0))
            elif request.path == "/completions" and refused.status not in (401, 403):
                raise self.cannot_score(str(refused)) from None
            else:
                raise
        self._keep(request, reply)
        return reply

    def _keep(self, request: Request, reply: StoredReply) -> None:
        """Stores a reply; a refusal only once any request is answered, for until then the setup may be wrong."""
        self._doubtful.append((request, reply))
        if reply.finish_reason == REFUSED and self.replies == self.refused:
            if len(self._doubtful) >= max(LEAST_REFUSALS, self._ahead):
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
            return self.client.given_up(self.cannot_score(said))
        mend = "correct its model, extra or base_url, or what the server is started with"
        return self.client.given_up(UserError(f"recipe section {self.key}: {self.client.url}: {said}: {mend}"))

    def wait(self, work: Any) -> Any:
        """The result of a coroutine in the client's thread; shows progress meanwhile."""
        future = self.client.run(work)
        while wait([future], POLL).not_done:
            self._waiting()
        return future.result()

    def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function gives that is called in the client's thread, to which the store belongs."""

        async def call() -> Any:
            return function(*arguments)

        return self.wait(call())

    def cannot_score(self, reason: str) -> CannotScore:
        """The error of a server that does not serve to score a text, and why."""
        return CannotScore(
            f"recipe section {self.key}: {self.client.url} can't score a given text ({reason}): rate with kind local, "
            "or serve the judge with vLLM"
        )

    def close(self) -> None:
        """Breaks off what is still asked and closes the store."""
        self.client.close()
        self.store.close()
