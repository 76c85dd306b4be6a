"""The rows of a benchmark: an aligned table for people, and the one JSON object for programs."""

import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmfast import _native
from slmfast.store import atomic_path

_KEYS = ("case", "peer", "version", "ours", "theirs", "unit", "ratio", "same_answer")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row: what was measured, on whom, and whether both gave the same answer."""

    group: str
    """The table that it stands in; not part of the JSON."""
    case: str
    peer: str | None = None
    version: str | None = None
    ours: float
    theirs: float | None = None
    unit: str
    ratio: float | None = None
    """How many times as fast ours is, unless `ratio_says` and the case say otherwise."""
    ratio_says: str = "as fast"
    """What follows the ratio in the table; not part of the JSON."""
    same_answer: bool | None = None
    """None where the two answer different questions, or where there is nobody else."""
    predicted: float | None = None
    """What the cost formula says ours takes on uniform rows of the same number, in the same unit."""

    def document(self) -> dict[str, Any]:
        """The row as the last line has it; the prediction goes into the case's text."""
        row = {key: getattr(self, key) for key in _KEYS}
        if self.predicted is not None:
            row["case"] += f", predicted if uniform {self.predicted:.3g} {self.unit}"
        return row


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text in columns; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def table(results: Iterable[Result]) -> str:
    """One group of results as aligned text; the predictions' column only where there are some."""
    results = list(results)
    rows = [("case", "peer", "version", "ours", "predicted if uniform", "theirs", "ratio", "same answer")]
    for r in results:
        predicted = _quantity(r.predicted, r.unit)
        ratio = "" if r.ratio is None else f"{r.ratio:.3g}x {r.ratio_says}"
        same = {True: "yes", False: "NO: no ratio", None: ""}[r.same_answer]
        theirs = _quantity(r.theirs, r.unit)
        rows.append((r.case, r.peer or "", r.version or "", _quantity(r.ours, r.unit), predicted, theirs, ratio, same))
    if all(r.predicted is None for r in results):
        rows = [(*row[:4], *row[5:]) for row in rows]
    return aligned(rows)


def _quantity(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.4g} {unit}"


def commit() -> str:
    """The commit of this checkout, marked where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def device(threads: int) -> str:
    """The processor, the threads used and the instruction set."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {threads} threads, {_native.active_isa()}"


def document(bench: str, threads: int, results: Iterable[Result], on: str | None = None) -> str:
    """The JSON object of the last line; `on` names the device where it is not the processor."""
    rows = [result.document() for result in results]
    return json.dumps({"bench": bench, "device": on or device(threads), "commit": commit(), "results": rows})


def write_document(path: Path, text: str) -> None:
    """Writes the last line to a file, which appears by atomic rename."""
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
