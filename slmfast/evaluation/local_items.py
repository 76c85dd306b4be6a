"""The benchmarks' items from files of the user's own, in the columns that their data sets have on the hub.

lm-eval's own tasks then read them as they would read the hub's: the questions put to a model are the same. Every
field stays the text that it is in its file; a reader that guesses types would turn the choice "1.0" into a number.
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from slmfast.errors import UserError
from slmfast.store import write_table

Rows = list[dict[str, Any]]
LETTERS = "ABCD"


def mmlu(data: Path, subject: str) -> dict[str, Path]:
    """mmlu/{dev,test}/SUBJECT_{dev,test}.csv."""
    return {split: data / "mmlu" / split / f"{subject}_{split}.csv" for split in ("dev", "test")}


def cmmlu(data: Path, subject: str) -> dict[str, Path]:
    """cmmlu/{dev,test}/SUBJECT.csv."""
    return {split: data / "cmmlu" / split / f"{subject}.csv" for split in ("dev", "test")}


def ceval(data: Path, subject: str) -> dict[str, Path]:
    """ceval/{dev,val}/SUBJECT_{dev,val}.csv."""
    return {split: data / "ceval" / split / f"{subject}_{split}.csv" for split in ("dev", "val")}


def gsm8k(data: Path, _: str) -> dict[str, Path]:
    """gsm8k/{train,test}.jsonl."""
    return {split: data / "gsm8k" / f"{split}.jsonl" for split in ("train", "test")}


def humaneval(data: Path, _: str) -> dict[str, Path]:
    """humaneval/HumanEval.jsonl."""
    return {"test": data / "humaneval" / "HumanEval.jsonl"}


FILES: dict[str, Callable[[Path, str], dict[str, Path]]] = {
    "mmlu": mmlu,
    "cmmlu": cmmlu,
    "ceval-valid": ceval,
    "gsm8k": gsm8k,
    "humaneval": humaneval,
}


def existing(benchmark: str, split: str, file: Path) -> Path:
    """The file itself. Raises UserError where it is missing."""
    if not file.is_file():
        others = f"leave {benchmark} out: name the others in evaluate.tasks (--tasks)"
        remedy = f"put {benchmark}'s {split} items there, or {others}"
        raise UserError(f"{file} is missing: {remedy}")
    return file


def convert(benchmark: str, split: str, file: Path, target: Path) -> None:
    """Writes one split of a benchmark, from a file as FILES names it, to a Parquet file in the hub's columns.

    Raises:
        UserError: the file is not there, is not of its format, or lacks a column.
    """
    try:
        rows = _READERS[benchmark](existing(benchmark, split, file))
    except (KeyError, ValueError, csv.Error) as error:
        raise UserError(f"{file} does not hold {benchmark}'s items ({error}): download the file anew") from error
    if not rows:
        raise UserError(f"{file} holds no items: download the file anew")
    write_table(target, pa.Table.from_pylist(rows))


def _table(file: Path) -> list[list[str]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        return [row for row in csv.reader(lines, strict=True) if row]


def _named(file: Path) -> Rows:
    heading, *rows = _table(file) or [[]]
    return [dict(zip(heading, row, strict=True)) for row in rows]


def _mmlu(file: Path) -> Rows:
    """With a heading question, choice0 .. choice3, answer (0 to 3), or, as first published, with none and A to D."""
    rows = _table(file)
    if rows and "question" in rows[0]:
        return [
            {
                "question": row["question"],
                "choices": [row[f"choice{i}"] for i in range(4)],
                "answer": int(row["answer"]),
            }
            for row in _named(file)
        ]
    return [{"question": q, "choices": [a, b, c, d], "answer": LETTERS.index(right)} for q, a, b, c, d, right in rows]


def _cmmlu(file: Path) -> Rows:
    return [{name: row[name] for name in ("Question", *LETTERS, "Answer")} for row in _named(file)]


def _ceval(file: Path) -> Rows:
    return [{name: row[name] for name in ("question", *LETTERS, "answer")} for row in _named(file)]


def _json_lines(*names: str) -> Callable[[Path], Rows]:
    def read(file: Path) -> Rows:
        with file.open(encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines if line.strip()]
        return [{name: str(row[name]) for name in names} for row in found]

    return read


_READERS: dict[str, Callable[[Path], Rows]] = {
    "mmlu": _mmlu,
    "cmmlu": _cmmlu,
    "ceval-valid": _ceval,
    "gsm8k": _json_lines("question", "answer"),
    "humaneval": _json_lines("task_id", "prompt", "entry_point", "canonical_solution", "test"),
}
