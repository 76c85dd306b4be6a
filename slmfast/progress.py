"""Progress on the standard error stream: one line that renews itself in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

TERMINAL_INTERVAL = 0.2  # seconds between two updates of the line
PLAIN_INTERVAL = 15.0  # seconds between two lines in a log


class Progress:
    """Counts work done and shows the rate and, where the total is known, the time left."""

    def __init__(self, label: str, total: int | None = None, unit: str = "rows", about: Callable[[], str] = lambda: ""):
        """`about` gives words for the end of the line, or none."""
        self.label, self.total, self.unit, self.about = label, total, unit, about
        self.done = self.skipped = 0
        self._terminal = sys.stderr.isatty()
        self._start = self._shown = time.monotonic()

    def add(self, amount: int = 1) -> None:
        """Notes that `amount` more units are done."""
        self.done += amount
        self.show()

    def skip(self, amount: int) -> None:
        """Notes that `amount` units were done by an earlier run: they say nothing about the rate."""
        self.skipped += amount
        self.add(amount)

    def show(self) -> None:
        """Shows the line anew if it is time to."""
        now = time.monotonic()
        if now - self._shown >= (TERMINAL_INTERVAL if self._terminal else PLAIN_INTERVAL):
            self._shown = now
            self._show(now)

    def _show(self, now: float) -> None:
        rate = (self.done - self.skipped) / max(now - self._start, 1e-9)
        of = f"/{self.total:,}" if self.total else ""
        left = f", {_duration((self.total - self.done) / rate)} left" if self.total and rate > 0 else ""
        about = f"; {text}" if (text := self.about()) else ""
        line = f"{self.label}: {self.done:,}{of} {self.unit}, {rate:,.{0 if rate >= 10 else 2}f}/s{left}{about}"
        print(f"\r\x1b[K{line}" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        """Clears the line in a terminal."""
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def track(items: Iterable[T], label: str, total: int | None = None, unit: str = "rows") -> Iterator[T]:
    """Yields the items and shows how many have passed."""
    progress = Progress(label, total, unit)
    for item in items:
        yield item
        progress.add()
    progress.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
