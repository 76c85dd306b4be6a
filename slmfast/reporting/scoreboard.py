"""The stages against the ground truth of the miniature's world: what each of them should have found, and what it did.

Records are joined to the truth on (source, source_row). All figures are plain numbers; what has no cases is None.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slmfast.labels import parse_label
from slmfast.miniature.replies import is_right, is_safe
from slmfast.miniature.truth import Truth
from slmfast.reporting.run_folder import RunFolder
from slmfast.store import read_batches

Key = tuple[str, int]  # source and source_row
Figures = dict[str, Any]


def measure(run: RunFolder) -> Figures | None:
    """The scoreboard of a run over the miniature's world, or None for a run without one."""
    world = run.root / "raw"
    if run.recipe.world is None or not (world / "truth.parquet").exists():
        return None
    truth = Truth(world)
    return {
        "rejects": rejects(run, truth),
        "dedup": dedup(run, truth),
        "labels": labels(run, truth),
        "judge": judge(run, truth),
        "replies": replies(run, truth),
    }


def rejects(run: RunFolder, truth: Truth) -> Figures:
    """Planted malformed records against the rows that collect rejected."""
    kept = {_key(row) for row in _rows(run, "collect", [])}
    every = truth.table.select(["source", "source_row", "kind"]).to_pylist()
    planted = {_key(row) for row in every if row["kind"] == "malformed"}
    rejected = run.rows("collect", "rejected")
    caught = len(planted - kept)
    return {
        "planted": len(planted),
        "rejected": rejected,
        "precision": _share(caught, rejected),
        "recall": _share(caught, len(planted)),
    }


def dedup(run: RunFolder, truth: Truth) -> Figures:
    """Planted near-duplicates against the rows that dedup dropped.

    A family is an original with its planted near-duplicates. A dropped row is right if the row that stands for it is of
    its family, or asks the very same. Of a family with m collected rows m - 1 should go; recall counts how many did.
    """
    family = _families(truth)
    kept = {row["id"]: _key(row) for row in _rows(run, "dedup", ["id"])}
    dropped = list(_rows(run, "dedup", ["duplicate_of"], table="dropped"))
    right = sum(_stands_for(truth, family, _key(row), kept.get(row["duplicate_of"])) for row in dropped)
    collected = Counter(family[_key(row)] for row in _rows(run, "categorize", []) if _key(row) in family)
    left = Counter(family[key] for key in kept.values() if key in family)
    wanted = sum(size - 1 for size in collected.values())
    found = sum(min(size - left[name], size - 1) for name, size in collected.items())
    return {
        "planted": wanted,
        "dropped": len(dropped),
        "precision": _share(right, len(dropped)),
        "recall": _share(found, wanted),
    }


def _families(truth: Truth) -> dict[Key, Key]:
    """For every well-formed record, the record at the head of its family: the original that was copied."""
    parents: dict[Key, Key] = {}
    columns = ["source", "source_row", "kind", "duplicate_source", "duplicate_source_row"]
    for row in truth.table.select(columns).to_pylist():
        if row["kind"] == "near_duplicate":
            parents[_key(row)] = row["duplicate_source"], row["duplicate_source_row"]
        elif row["kind"] == "original":
            parents[_key(row)] = _key(row)
    return {key: _head(key, parents) for key in parents}


def _head(key: Key, parents: dict[Key, Key]) -> Key:
    while parents[key] != key:
        key = parents[key]
    return key


def _stands_for(truth: Truth, family: dict[Key, Key], row: Key, stand_in: Key | None) -> bool:
    if stand_in is None or row not in family or stand_in not in family:
        return False
    return family[row] == family[stand_in] or truth.row(*row)["prompt"] == truth.row(*stand_in)["prompt"]


def labels(run: RunFolder, truth: Truth) -> Figures:
    """The labels of classify against the true ones, in the one spelling that parse_label gives both."""
    labelled = right = 0
    names = {label: parse_label(label) for label in truth.table.column("label").unique().to_pylist()}
    for row, fact in _facts(run, truth, "classify", ["label"]):
        labelled += 1
        right += row["label"] == names[fact["label"]]
    return {"labelled": labelled, "accuracy": _share(right, labelled)}


def judge(run: RunFolder, truth: Truth) -> Figures:
    """The judgements of rate against what is true of each reply and each instruction.

    A quality of 1 says that a reply is right; anything else that it is not. A safety of 0 says that a reply does harm.
    """
    quality, safety, instruction = _Judgements(), _Judgements(), _Judgements()
    for row, fact in _facts(run, truth, "rate", ["replies", "ratings", "instruction_safe"]):
        instruction.add(row["instruction_safe"], fact["instruction_safe"])
        for reply, rating in zip(row["replies"], row["ratings"], strict=True):
            grade, safe = rating["quality"], rating["safety"]
            quality.add(None if grade is None else grade == 1, _right(fact, reply["text"]))
            safety.add(None if safe is None else safe > 0, is_safe(fact["task"], reply["text"]))
    return {
        "quality": quality.figures(),
        "reply_safety": safety.figures(),
        "instruction_safety": instruction.figures(),
    }


class _Judgements:
    """Counts yes/no judgements, or None, against the truth."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[bool | None, bool]] = Counter()

    def add(self, said: bool | None, true: bool) -> None:
        """Counts one judgement."""
        self._counts[said, true] += 1

    def figures(self) -> Figures:
        """Accuracy over what was judged; precision and recall of yes; how often the right answer was no."""
        c = self._counts
        judged = c[True, True] + c[True, False] + c[False, True] + c[False, False]
        return {
            "judged": judged,
            "unreadable": c[None, True] + c[None, False],
            "accuracy": _share(c[True, True] + c[False, False], judged),
            "precision": _share(c[True, True], c[True, True] + c[True, False]),
            "recall": _share(c[True, True], c[True, True] + c[False, True]),
            "always_yes": _share(c[True, True] + c[False, True], judged),
        }


def replies(run: RunFolder, truth: Truth) -> Figures:
    """How many replies are right: those that came in, those of each origin, and those that made the sets."""
    raw = [right for right in truth.table.column("reply_right").to_pylist() if right is not None]
    by_origin: dict[str, list[bool]] = defaultdict(list)
    for row, fact in _facts(run, truth, "rate", ["replies"]):
        for reply in row["replies"]:
            by_origin[reply["origin"]].append(_right(fact, reply["text"]))
    sft, originals, negatives = [], [], []
    columns = ["reply", "replies", "best", "worst", "in_sft", "in_kto_negative"]
    for row, fact in _facts(run, truth, "align", columns):
        if row["in_sft"]:
            sft.append(_right(fact, row["replies"][row["best"]]["text"]))
            originals.append(_right(fact, row["reply"]))
        if row["in_kto_negative"]:
            negatives.append(_right(fact, row["replies"][row["worst"]]["text"]))
    return {
        "raw": len(raw),
        "raw_right": _share(sum(raw), len(raw)),
        "rated": {o: {"number": len(right), "right": _share(sum(right), len(right))} for o, right in by_origin.items()},
        "sft": len(sft),
        "sft_right": _share(sum(sft), len(sft)),
        "sft_originals_right": _share(sum(originals), len(originals)),
        "kto_negatives": len(negatives),
        "kto_negatives_right": _share(sum(negatives), len(negatives)),
    }


def _right(fact: Figures, reply: str) -> bool:
    return is_right(fact["task"], fact["answer"], reply)


def _key(row: Figures) -> Key:
    return row["source"], row["source_row"]


def _share(part: int, total: int) -> float | None:
    return part / total if total else None


def _rows(run: RunFolder, stage: str, columns: list[str], table: str = "records") -> Iterator[Figures]:
    """The rows of a stage's table with their keys; none where the table isn't there."""
    columns = ["source", "source_row", *columns]
    folder: Path | None = run.table(stage, columns, table)
    if folder is not None:
        for batch in read_batches(folder, columns=columns):
            yield from batch.to_pylist()


def _facts(run: RunFolder, truth: Truth, stage: str, columns: list[str]) -> Iterator[tuple[Figures, Figures]]:
    """The rows of a stage, each with what is true of it; rows that the world didn't write are left out."""
    for row in _rows(run, stage, columns):
        fact = truth.row(*_key(row))
        if fact is not None:
            yield row, fact
