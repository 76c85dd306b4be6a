"""Whether labels fit their instructions: a sample of each label put to the judge, and labels that it often denies.

The judge answers yes or no by log-probability, as it rates replies. What it can't read counts for neither side. People
get the same sample as a CSV file, with a column of their own.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from slmfast.engines.base import Engine
from slmfast.prompts import YES_NO, label_audit_prompt
from slmfast.records import prompt_text
from slmfast.store import atomic_path

COLUMNS = [
    pa.field("agrees", pa.bool_()),  # null where the judge could not read it
    pa.field("yes_probability", pa.float64()),  # of yes among yes and no
]
INSTRUCTION_CHARACTERS = 2000  # of an instruction stand in the CSV
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would compute a cell that begins so


def sample(labels: np.ndarray, hashes: np.ndarray, per_label: int) -> np.ndarray:
    """A mask of at most `per_label` rows of each label, those of the smallest hashes, bool [n].

    `labels` are codes, int [n]; rows of a negative code take no part.
    """
    chosen = np.zeros(len(labels), dtype=bool)
    rows = np.flatnonzero(labels >= 0)
    if len(rows):
        rows = rows[np.lexsort((rows, hashes[rows], labels[rows]))]
        codes = labels[rows]
        first = np.searchsorted(codes, codes)  # where each row's label begins
        chosen[rows[np.arange(len(rows)) - first < per_label]] = True
    return chosen


def judge_labels(engine: Engine, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what the judge says of their labels."""
    prompts = [label_audit_prompt(prompt_text(row["prompt"]), row["label"]) for row in rows]
    judged = []
    for row, scores in zip(rows, engine.choose(prompts, [list(YES_NO)] * len(prompts)), strict=True):
        yes, no = (float(score) for score in scores)
        probability = None if np.isnan(yes) or np.isnan(no) else float(1 / (1 + np.exp(min(no - yes, 700.0))))
        judged.append(row | {"agrees": None if probability is None else yes >= no, "yes_probability": probability})
    return judged


class Standing(NamedTuple):
    """What the judge said of a label's sample."""

    label: str
    records: int  # that bear the label
    agreed: int
    denied: int
    unreadable: int

    @property
    def accuracy(self) -> float | None:
        """The share of yes among what was readable; None where nothing was."""
        judged = self.agreed + self.denied
        return self.agreed / judged if judged else None

    def falls(self, threshold: float) -> bool:
        """Whether the label goes. One of which the judge could read nothing stays."""
        return self.accuracy is not None and self.accuracy < threshold


def standings(judged: Iterable[dict[str, Any]], records: dict[str, int]) -> list[Standing]:
    """Every sampled label's standing, in the order of `records`, which counts each label's."""
    counts = {label: [0, 0, 0] for label in records}
    for row in judged:
        counts[row["label"]][(True, False, None).index(row["agrees"])] += 1
    return [Standing(label, records[label], *found) for label, found in counts.items() if any(found)]


def write_audit_csv(path: Path, judged: Iterable[dict[str, Any]]) -> None:
    """The sample for people: one row an instruction, label by label, the column `human` empty."""
    header = ["label", "judge", "yes_probability", "human", "instruction", "language", "source", "source_row", "id"]
    words = {True: "yes", False: "no", None: "unreadable"}
    rows = []
    for row in sorted(judged, key=lambda row: row["label"]):
        probability = "" if row["yes_probability"] is None else f"{row['yes_probability']:.3f}"
        instruction = prompt_text(row["prompt"])[:INSTRUCTION_CHARACTERS]
        origin = [row[name] for name in ("language", "source", "source_row", "id")]
        rows.append([row["label"], words[row["agrees"]], probability, "", instruction, *origin])
    _write_csv(path, header, rows)


def write_label_csv(path: Path, found: Iterable[Standing], threshold: float) -> None:
    """The labels for people, the worst first."""
    header = ["label", "records", "sampled", "agreed", "denied", "unreadable", "accuracy", "kept"]
    rows = []
    for standing in sorted(found, key=lambda s: (1.0 if s.accuracy is None else s.accuracy, s.label)):
        label, records, agreed, denied, unreadable = standing
        accuracy = "" if standing.accuracy is None else f"{standing.accuracy:.3f}"
        kept = "no" if standing.falls(threshold) else "yes"
        rows.append([label, records, agreed + denied + unreadable, agreed, denied, unreadable, accuracy, kept])
    _write_csv(path, header, rows)


def _write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    # With a byte order mark, without which spreadsheets take UTF-8 for something else.
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([_plain(cell) for cell in row] for row in rows)


def _plain(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell
