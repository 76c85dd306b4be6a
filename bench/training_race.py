"""Trainings in processes of their own that take their steps in turn."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from own_child import ChildFailed
from training_gate import Curve

CHILD = Path(__file__).parent / "training_child.py"


@dataclass(frozen=True, eq=False)
class Played:
    """What one side gave, the warm-up step first, and what it took."""

    losses: list[float]
    seconds: list[float]
    """Of the steps that count: all but the first."""
    norm: float
    precompute_seconds: float | None
    baseline: int
    """Bytes held with the model loaded, and nothing else."""
    peak: int
    """Bytes held at most since then."""

    @property
    def curve(self) -> Curve:
        return Curve(self.losses, self.norm)


class Player:
    """One side's process. It stands still unless it was told to step.

    Raises (all methods):
        ChildFailed: it has ended, with the last line that it said.
    """

    def __init__(self, request: Mapping[str, Any], threads: int):
        self._scratch = tempfile.TemporaryDirectory(prefix="slmfast-bench-")
        folder = Path(self._scratch.name)
        path = folder / "request.json"
        path.write_text(json.dumps({**request, "scratch": str(folder)}), encoding="utf-8")
        self._said = (folder / "stderr").open("w+", encoding="utf-8")
        quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_DATASETS_CACHE": str(folder / "cache")}
        self._process = subprocess.Popen(
            [sys.executable, str(CHILD), str(path)],
            env=os.environ | quiet | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def ready(self) -> dict[str, Any]:
        """Waits until its trainer stands."""
        return self._line()

    def step(self) -> dict[str, Any]:
        """Has it take one step: {"loss", "seconds", "norm"}."""
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ChildFailed(self._why()) from None
        return self._line()

    def end(self) -> dict[str, Any]:
        """After the last step: {"baseline", "peak"}."""
        self._process.stdin.close()  # one that waits for another step is not waited for
        return self._line()

    def close(self) -> None:
        """Ends the process, whatever it does, and removes its folder."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            try:
                stream.close()
            except BrokenPipeError:
                continue  # what it was still to be told
        self._scratch.cleanup()

    def _line(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise ChildFailed(self._why())
        return json.loads(line)

    def _why(self) -> str:
        code = self._process.wait()
        self._said.seek(0)
        said = self._said.read().strip().splitlines()
        return f"its process ended with code {code}: {said[-1] if said else 'it said nothing'}"


@dataclass(eq=False)
class _Record:
    player: Player
    precompute_seconds: float | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)


def race(
    requests: Mapping[str, Mapping[str, Any]], steps: int, threads: int, say: Callable[[str, str], None]
) -> tuple[dict[str, Played], dict[str, ChildFailed]]:
    """Has all sides take `steps` steps in turn, after they were set up one after the other.

    Args:
        say: is told of progress: the side, and what it did.

    Returns:
        (what those gave who finished, why the others did not).
    """
    alive: dict[str, _Record] = {}
    failed: dict[str, ChildFailed] = {}
    played: dict[str, Played] = {}

    def fail(name: str, failure: ChildFailed) -> None:
        failed[name] = failure
        alive.pop(name).player.close()

    try:
        for name, request in requests.items():
            alive[name] = _Record(Player(request, threads))
            try:
                alive[name].precompute_seconds = alive[name].player.ready()["precompute_seconds"]
            except ChildFailed as failure:
                fail(name, failure)
            else:
                say(name, "stands ready")
        for number in range(steps):
            for name, record in list(alive.items()):
                try:
                    record.steps.append(record.player.step())
                    say(
                        name,
                        "step {} of {}: {seconds:.2f} s, loss {loss:.7f}".format(number, steps - 1, **record.steps[-1]),
                    )
                except ChildFailed as failure:
                    fail(name, failure)
        for name, record in list(alive.items()):
            try:
                played[name] = _played(record, record.player.end())
            except ChildFailed as failure:
                fail(name, failure)
    finally:
        for record in alive.values():
            record.player.close()
    return played, failed


def _played(record: _Record, end: Mapping[str, int]) -> Played:
    steps = record.steps
    return Played(
        losses=[step["loss"] for step in steps],
        seconds=[step["seconds"] for step in steps[1:]],
        norm=steps[0]["norm"],
        precompute_seconds=record.precompute_seconds,
        baseline=end["baseline"],
        peak=end["peak"],
    )
