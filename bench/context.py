"""What every case of a benchmark is given, and how a case meets a peer."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from peers import Answer, Peer, PeerFailed, PeerFolder
from timing import Settings, climb, described_runs, in_turn

Source = np.ndarray | pa.ChunkedArray


@dataclass(frozen=True, kw_only=True)
class Context:
    """The options that all cases share."""

    k: int
    threads: int
    seed: int
    peers: PeerFolder
    started: float = field(default_factory=time.monotonic)
    failures: list[str] = field(default_factory=list)
    """What gave no figure, and why: named below the tables."""
    broken: list[str] = field(default_factory=list)
    """Those of the failures that are our own side's: with any the exit code is 1."""

    def say(self, text: str) -> None:
        """A line of progress on the standard error stream, with the seconds since the start."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", file=sys.stderr, flush=True)

    def fail(self, peer: Peer, task: str, failure: PeerFailed) -> None:
        """Notes that a peer gave no figure for a task."""
        self.say(str(failure))
        self.failures.append(f"{peer.title}, {task}: {failure}")

    def fail_ourselves(self, task: str, why: object) -> None:
        """Notes that our own side gave no figure for a task; the other figures are still to be taken."""
        self.say(f"{task}: {why}")
        self.failures.append(f"{task}: {why}")
        self.broken.append(task)


@dataclass(frozen=True, eq=False)
class Meeting:
    """Both sides at the same size."""

    n: int
    settings: str
    """The peer's settings, how often both ran, and why n is not the size asked for: a remark for the table."""
    runs: int
    source: Source
    ours: float
    """Seconds; the best of as many runs as theirs."""
    our_answer: Any
    theirs: float
    answer: Answer


def meet(
    context: Context,
    peer: Peer,
    task: str,
    n: int,
    choices: Sequence[Settings],
    draw: Callable[[int], Source],
    ours: Callable[[Any], Any],
) -> Meeting:
    """Runs a peer at the largest size that it finishes, up to n, and ours at that size.

    Args:
        task: what the peer's script is asked for.
        choices: the peer's settings, of which the fastest is taken.
        draw: the input of a given size.
        ours: our side of the work.

    Raises:
        PeerFailed: the peer got through no size at all.
    """
    drawn = lru_cache(maxsize=1)(draw)

    def run(size: int, settings: Settings) -> Answer:
        context.say(f"{peer.title}: {task}, n={size:,}, {described(settings)}")
        return context.peers.ask(peer, task, drawn(size), {"k": context.k, "threads": context.threads, **settings})

    reached = climb(n, choices, run, context.peers.limit)
    source = drawn(reached.n)

    def theirs() -> tuple[float, Answer]:
        answer = run(reached.n, reached.settings)
        return answer.seconds, answer

    race = in_turn(lambda: ours(source), theirs, (reached.answer.seconds, reached.answer))
    remarks = (described(reached.settings), described_runs(race.runs), reached.note)
    remark = "; ".join(text for text in remarks if text)
    return Meeting(reached.n, remark, race.runs, source, race.ours, race.our_answer, race.theirs, race.their_answer)


def described(settings: Settings) -> str:
    """Settings as a remark: `blocks=5`."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def available_memory() -> int:
    """Bytes that the system could give without swapping; 2^62 where it does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 62
