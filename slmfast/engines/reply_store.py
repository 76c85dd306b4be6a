"""The replies of a server, kept one by one as they come, so that a run that is broken off asks for none of them again.

A database of SQLite in a file that only one process holds. Each reply is a transaction of its own, in a write-ahead
log whose records carry checksums: killed at any instant, the process leaves every reply in whole or not at all.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from slmfast.errors import UserError

REFUSED = "refused"  # the finish reason of a request that the server refuses for good; its text says why


@dataclass(frozen=True, slots=True)
class StoredReply:
    """What a server said to one request: a text or, where a text was scored, a log-probability, or a no."""

    text: str | None
    finish_reason: str | None
    prompt_tokens: int
    tokens: int  # generated
    seed: int
    logprob: float | None = None


_COLUMNS = ", ".join(f.name for f in fields(StoredReply))
_SCHEMA = f"""
create table if not exists replies (key blob primary key, {_COLUMNS});
create table if not exists figures (name text primary key, value integer);
"""


class ReplyStore:
    """Replies by the key of their request; use it from one thread at a time.

    Raises UserError where the file is damaged, in use or can't be written.
    """

    def __init__(self, path: Path):
        self.path = path
        with self._reported():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Transactions begin and end where we say so; whoever uses the store sees to one thread at a time.
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0)
            # With an exclusive lock the log needs no shared memory, which network file systems lack.
            self._database.execute("pragma locking_mode = exclusive")
            self._database.execute("pragma journal_mode = wal")
            self._database.execute("pragma synchronous = normal")
            self._database.executescript(_SCHEMA)

    def get(self, key: bytes) -> StoredReply | None:
        """The reply to a request, if it has come."""
        with self._reported():
            row = self._database.execute(f"select {_COLUMNS} from replies where key = ?", [key]).fetchone()
        return None if row is None else StoredReply(*row)

    def add(self, key: bytes, reply: StoredReply) -> None:
        """Keeps the reply to a request that has none yet."""
        values = [key, *astuple(reply)]
        with self._reported():
            self._database.execute(f"insert into replies values ({', '.join('?' * len(values))})", values)

    def figure(self, name: str) -> int | None:
        """A number kept under a name."""
        with self._reported():
            row = self._database.execute("select value from figures where name = ?", [name]).fetchone()
        return None if row is None else row[0]

    def set_figure(self, name: str, value: int) -> None:
        """Keeps a number under a name."""
        with self._reported():
            self._database.execute("insert or replace into figures values (?, ?)", [name, value])

    def totals(self) -> tuple[int, int, int, int]:
        """The number of replies, of those that are refusals, and of tokens read and written for them."""
        counted = "count(*), sum(finish_reason is ?), sum(prompt_tokens), sum(tokens)"
        with self._reported():
            row = self._database.execute(f"select {counted} from replies", [REFUSED]).fetchone()
        return row[0], row[1] or 0, row[2] or 0, row[3] or 0

    def close(self) -> None:
        """Closes the file; the log goes into it."""
        with self._reported():
            self._database.close()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:  # a full disk, a lock, no right to write
            reason = "another run uses it" if "locked" in str(error) else str(error)
            raise UserError(f"{self.path} can't be used ({reason}): see to it and run again") from error
        except sqlite3.IntegrityError as error:  # no two requests that are put have one key
            raise RuntimeError(
                f"{self.path}: one request was answered twice; the first reply stays; please report this"
            ) from error
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{self.path} is damaged ({error}): delete it, and its replies are asked for again"
            ) from error


def storable(text: str) -> str:
    """A text with lone surrogates, which JSON can hold and UTF-8 can't, replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
