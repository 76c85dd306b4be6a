"""Requests to a server that fails now and then: bounded in number, tried again, given up in one line.

Tried again, after a pause that doubles from try to try and is drawn from its upper half so that requests that failed
together don't come back together (exponential back-off with jitter): 408, 425, 429 (after its Retry-After), 5xx,
time-outs, connections that are cut or refused, and answers that can't be read. What the server refuses for what stands
in the request (400, 413, 422, 451), or ends for a reason of its own three times, is that one request's fate. Other
refusals (a key, a model that is not there) end the run at once: no request would be answered.
"""

import asyncio
import email.utils
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import aiohttp

from slmfast.engines.settings import EngineSettings, secret
from slmfast.errors import UserError

T = TypeVar("T")

LONGEST_PAUSE = 60.0  # seconds, unless the server asks for more
LONGEST_RETRY_AFTER = 600.0
CONNECT_TIMEOUT = 30.0
_AGAIN = {408, 425, 429}
_NOT_AGAIN = {501, 505}
_OF_THE_REQUEST = {400, 413, 422, 451}  # a content filter, a text that the server can't take
_NO_REPLY_TRIES = 3


class Unreadable(Exception):
    """An answer that came but lacks what it must have."""


class NoReply(Exception):
    """An answer that says that there is none; the server may think better of it, but not for long."""


class Refused(UserError):
    """The server's no for good; `status` is HTTP's, 200 where the answer itself says that there is no reply.

    Of one request alone where `one` is set: others may be answered.
    """

    def __init__(self, message: str, status: int, *, one: bool = False):
        super().__init__(message)
        self.status, self.one = status, one


class _Failed(Exception):
    """One try came to nothing; another may not."""

    def __init__(self, kind: str, wait: float = 0.0, *, no_reply: bool = False):
        super().__init__(kind)
        self.kind, self.wait, self.no_reply = kind, wait, no_reply


class HttpClient:
    """Asks one server, from a thread of its own with an event loop.

    Args:
        settings: where it is, and how many requests, tries and seconds it gets.
        key: the recipe's section of these settings, for messages.
    """

    def __init__(self, settings: EngineSettings, key: str):
        self.settings, self.key = settings, key
        self.url = str(settings.base_url).rstrip("/")
        self.failures: Counter[str] = Counter()  # tries that came to nothing, by kind
        self._secret = secret(settings, key)
        self._headers = {"Authorization": f"Bearer {self._secret}"} if self._secret else {}
        self._loop = asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._session: aiohttp.ClientSession | None = None
        self._over: UserError | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"requests of {key}", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Starts a coroutine in the client's thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Has a function called in the client's thread."""
        self._loop.call_soon_threadsafe(function, *arguments)

    async def post(self, path: str, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """What `read` makes of the JSON answered to a request.

        `read` raises Unreadable, KeyError, TypeError, IndexError or ValueError where something is missing: the answer
        counts as none; and NoReply where it says that there is none. Raises Refused where the server says no for good,
        and UserError where all tries are used up.
        """
        data = json.dumps(body, ensure_ascii=False).encode()
        async with self._slots:
            return await self._tried("POST", path, data, read)

    async def get(self, path: str, read: Callable[[Any], T]) -> T:
        """Likewise for a plain question."""
        return await self._tried("GET", path, None, read)

    async def _tried(self, method: str, path: str, data: bytes | None, read: Callable[[Any], T]) -> T:
        no_reply = 0
        for tries in range(1, self.settings.tries + 1):
            if self._over is not None:
                raise self._over
            try:
                return await self._try(method, path, data, read)
            except _Failed as failure:
                self.failures[failure.kind] += 1
                last = failure
                no_reply += failure.no_reply
            if last.no_reply and no_reply >= min(_NO_REPLY_TRIES, self.settings.tries):
                raise Refused(last.kind, 200, one=True)
            if tries < self.settings.tries:
                pause = min(self.settings.backoff * 2 ** min(tries - 1, 30), LONGEST_PAUSE) * random.uniform(0.5, 1.0)
                await asyncio.sleep(max(pause, last.wait))
        raise self.given_up(
            UserError(
                f"{self.url}{path} failed {self.settings.tries} times, the last time with {last.kind} "
                f"({self.key}.tries): see to the server and run again; every reply that came is kept"
            )
        )

    async def _try(self, method: str, path: str, data: bytes | None, read: Callable[[Any], T]) -> T:
        if self._session is None:
            self._session = self._new_session()
        headers = {"Content-Type": "application/json"} if data is not None else {}
        try:
            async with self._session.request(
                method, self.url + path, data=data, headers=headers, allow_redirects=False
            ) as answer:
                body = await answer.read()
        except TimeoutError:
            raise _Failed("a time-out") from None
        except aiohttp.ClientConnectorError as error:
            raise _Failed(f"no connection ({error.strerror or error})") from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise _Failed(f"a cut connection ({type(error).__name__})") from None
        if answer.status != 200:
            self._refuse(path, answer.status, answer.headers.get("Retry-After"), body)
        try:
            return read(json.loads(body))
        except NoReply as said:
            raise _Failed(str(said), no_reply=True) from None
        # Whatever the wrong shape of an answer sets off: a list for a text, a count that is infinite, deep nesting.
        except (Unreadable, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError):
            raise _Failed("an answer that can't be read") from None

    def _new_session(self) -> aiohttp.ClientSession:
        limits = aiohttp.ClientTimeout(total=self.settings.timeout, sock_connect=CONNECT_TIMEOUT)
        connector = aiohttp.TCPConnector(limit=self.settings.concurrency + 1)
        return aiohttp.ClientSession(timeout=limits, connector=connector, headers=self._headers)

    def _refuse(self, path: str, status: int, retry_after: str | None, body: bytes) -> None:
        if status in _AGAIN or (status >= 500 and status not in _NOT_AGAIN):
            raise _Failed(f"HTTP {status}", seconds_of(retry_after))
        said = _said(body, self._secret)
        words = f"HTTP {status}{': ' if said else ''}{said}"
        if status in _OF_THE_REQUEST:
            raise Refused(words, status, one=True)
        if status in (401, 403):
            held = f"in {self.settings.api_key}" if self.settings.api_key else "(none is named)"
            mend = f"recipe key {self.key}.api_key: {self.url} does not take the key {held}"
        elif status == 404:
            model = f"{self.key}.model {self.settings.model!r} and {self.key}.base_url"
            mend = f"recipe keys {model}: one of them is unknown to {self.url}{path}"
        else:
            mend = f"recipe section {self.key}: {self.url}{path} refuses a request"
        raise self.given_up(Refused(f"{mend} ({words})", status))

    def given_up(self, error: UserError) -> UserError:
        """Has every request that is put, or waits for its turn, fail with an error; gives the error."""
        self._over = self._over or error
        return error

    def forgive(self) -> bool:
        """Goes on after what need not end the run; says whether there was such a thing."""
        forgiven, self._over = self._over, None
        return forgiven is not None

    def close(self) -> None:
        """Breaks off what is still asked, and ends the thread."""

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            if self._session is not None:
                await self._session.close()

        if self._thread.is_alive():
            self.run(end()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


def seconds_of(retry_after: str | None) -> float:
    """The seconds that a Retry-After header asks for, which are a number or a date (RFC 9110, 10.2.3); 0 without."""
    if retry_after is None:
        return 0.0
    try:
        seconds = float(retry_after)
    except ValueError:
        date = email.utils.parsedate_tz(retry_after)
        seconds = 0.0 if date is None else email.utils.mktime_tz(date) - time.time()
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER) if seconds == seconds else 0.0


def _said(body: bytes, held: str | None = None) -> str:
    """What a server says of its no, in one short line, without the key that it may repeat."""
    text = body.decode(errors="replace")
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        told = text  # plain text, or a page
    for name in ("error", "message", "detail"):
        if isinstance(told, dict):
            told = told.get(name, told)
    told = str(told).replace(held, "***") if held else str(told)
    return " ".join(told.split())[:200]
