"""Align: the best reply of each instruction makes the SFT set, best and worst make the KTO set (the paper, 3.7).

The sets lie in `sft/` and `kto/` as TRL loads them, and in `llamafactory/` as LLaMA-Factory does. `records/` keeps the
instructions that gave a row to either, with the positions of their best and worst reply. `contamination/` names the
instructions that hold items of the benchmarks; they go only where the recipe says so.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from slmfast.alignment import Choice, choose_replies, shuffled_apart, upper_fence
from slmfast.contamination import CONTAMINATION_SCHEMA, Finding, Index, finding_rows, read_items, summary
from slmfast.errors import UserError
from slmfast.job import Counts, Job, dropped_row
from slmfast.readers import expand_paths
from slmfast.recipe import expand
from slmfast.records import DROPPED_SCHEMA, MESSAGE, conversation
from slmfast.sampling import balanced, seeded_hashes
from slmfast.store import ROWS_PER_GROUP, ShardWriter, atomic_path, file_digest, read_batches, table_schema, write_json

INPUTS = ("rate",)
MODELS: tuple[str, ...] = ()

SFT_SCHEMA = pa.schema([("prompt", pa.list_(MESSAGE)), ("completion", pa.list_(MESSAGE))])
KTO_SCHEMA = SFT_SCHEMA.append(pa.field("label", pa.bool_()))
COLUMNS = [
    pa.field("best", pa.int8(), nullable=False),  # position in `replies`
    pa.field("worst", pa.int8()),
    pa.field("in_sft", pa.bool_(), nullable=False),
    pa.field("in_kto_negative", pa.bool_(), nullable=False),
]


def _benchmarks(job: Job) -> dict[str, list[Path]]:
    """The files of each benchmark's items, globs and variables resolved; none where the check is skipped."""
    if job.settings.contamination == "skip":
        return {}
    found = {}
    for name, patterns in job.settings.benchmarks.items():
        key = f"align.benchmarks.{name}"
        patterns = [patterns] if isinstance(patterns, str) else patterns
        patterns = [expand(pattern, {"RUN": job.run_dir}, key) for pattern in patterns]
        try:
            found[name] = expand_paths(patterns)
        except UserError as error:
            raise UserError(f"recipe key {key}: {error}; or take the benchmark out: it is then not checked") from error
    return found


def files(job: Job) -> dict[str, list[tuple[str, str]]]:
    """The names and digests of the benchmarks' files: align runs again when one changes."""
    return {name: [(path.name, file_digest(path)) for path in paths] for name, paths in _benchmarks(job).items()}


def accompany(job: Job) -> None:
    """Writes the data card beside the sets, from what this stage and those before it have left."""
    from slmfast.reporting.data_card import DATA_STAGES, write_data_card
    from slmfast.reporting.run_folder import RunFolder, stages_behind

    if job.alone:
        run = RunFolder(job.run_dir, job.recipe, stages_behind(job, DATA_STAGES), apart=True)
    else:
        run = RunFolder(job.run_dir, job.recipe, {stage: job.run_dir / stage for stage in DATA_STAGES})
    write_data_card(run)


def run(job: Job) -> Counts:
    """Writes the sets, and accounts for every instruction that gives none of their rows."""
    source = job.input("rate")
    choices, labels, ids = _choose(job, source)
    best = np.array([choice.best is not None for choice in choices], dtype=bool)
    worst = np.array([choice.worst is not None for choice in choices], dtype=bool)
    if not best.any():
        raise UserError("align found no reply of quality 1: name a better large model or judge in the recipe's models")
    items = read_items(_benchmarks(job))
    found = Index(items).search(_texts(source, choices)) if items else []
    contaminated = {finding.record: finding for finding in reversed(found)}
    if job.settings.contamination == "remove" and contaminated:
        best[list(contaminated)] = worst[list(contaminated)] = False
        if not best.any():
            raise UserError("align: every good record holds an item of a benchmark; set align.contamination to report")
    _, codes = np.unique(np.array(labels), return_inverse=True)
    positive = _balanced(codes, best, ids, job, "sft", job.settings.sft_size)
    wanted = int(positive.sum() / job.settings.positives_per_negative)
    negative = _balanced(codes, worst, ids, job, "kto", wanted)
    if not negative.any():
        raise UserError("align found no reply that is worse than a best one, and KTO needs some: collect more records")
    rows = finding_rows(found, ids, positive | negative)
    with ShardWriter(job.table("contamination"), CONTAMINATION_SCHEMA) as writer:
        writer.write(rows)
    _write_records(job, source, choices, positive, negative, contaminated)
    sizes = _write_sets(job)
    job.notes |= {"sets": sizes, "with_best": int(best.sum()), "with_worst": int(worst.sum())}
    job.notes["contamination"] = {"mode": job.settings.contamination, "benchmarks": summary(items, rows)}
    kept = int((positive | negative).sum())
    return Counts(len(choices), kept, len(choices) - kept)


def _choose(job: Job, source: Path) -> tuple[list[Choice], list[str], list[str]]:
    """Each row's best and worst reply, its label and its id."""
    bits = [
        rating["bits_per_token"]
        for batch in read_batches(source, columns=["ratings"])
        for ratings in batch.column("ratings").to_pylist()
        for rating in ratings
    ]
    fence = upper_fence(np.array(bits, dtype=np.float64), job.settings.outlier_fences)
    job.notes["max_bits_per_token"] = fence if np.isfinite(fence) else None
    choices, labels, ids = [], [], []
    for batch in read_batches(source, columns=["id", "label", "replies", "ratings"]):
        for row in batch.to_pylist():
            choices.append(
                choose_replies(row["replies"], row["ratings"], max_tokens=job.settings.max_reply_tokens, max_bits=fence)
            )
            labels.append(row["label"])
            ids.append(row["id"])
    return choices, labels, ids


def _texts(source: Path, choices: list[Choice]) -> Iterator[tuple[int, str, str]]:
    """(record number, part, text) of all that could be trained on: the prompts and chosen replies of good records."""
    number = 0
    for batch in read_batches(source, columns=["prompt", "replies"]):
        for row in batch.to_pylist():
            choice = choices[number]
            if choice.best is not None:
                yield from ((number, "prompt", message["content"]) for message in row["prompt"])
                for part, position in (("best reply", choice.best), ("worst reply", choice.worst)):
                    if position is not None:
                        yield number, part, row["replies"][position]["text"]
            number += 1


def _balanced(codes: np.ndarray, mask: np.ndarray, ids: list[str], job: Job, purpose: str, target: int) -> np.ndarray:
    hashes = seeded_hashes(ids, job.recipe.seed, f"align {purpose}")
    return balanced(np.where(mask, codes, -1), hashes, target)


def _write_records(
    job: Job,
    source: Path,
    choices: list[Choice],
    positive: np.ndarray,
    negative: np.ndarray,
    contaminated: dict[int, Finding],
) -> None:
    schema = pa.schema([*table_schema(source), *COLUMNS])
    start = 0
    with (
        ShardWriter(job.table("records"), schema) as records,
        ShardWriter(job.table("dropped"), DROPPED_SCHEMA) as dropped,
    ):
        for batch in read_batches(source):
            kept, gone = [], []
            for i, row in enumerate(batch.to_pylist(), start):
                if positive[i] or negative[i]:
                    chosen = {"best": choices[i].best, "worst": choices[i].worst}
                    kept.append(row | chosen | {"in_sft": bool(positive[i]), "in_kto_negative": bool(negative[i])})
                else:
                    gone.append(dropped_row(job.stage, row, _reason(job, choices[i], contaminated.get(i))))
            start += batch.num_rows
            records.write(kept)
            dropped.write(gone)


def _reason(job: Job, choice: Choice, finding: Finding | None) -> str:
    """Why a record gives no row to either set."""
    if choice.best is None:
        return "no good reply"
    if finding is not None and job.settings.contamination == "remove":
        return f"contamination: {finding.reason} (align.contamination)"
    return "its label has its share of the sets already (align.sft_size)"


class _Row(NamedTuple):
    """One training example to be: which of a record's replies, and what it teaches."""

    prompt: list[dict[str, str]]
    reply: str
    label: bool
    record: int  # number of the record, the same for the two rows of one prompt
    key: str  # decides its place in the shuffle

    def columns(self) -> dict[str, Any]:
        completion = [{"role": "assistant", "content": self.reply}]
        return {"prompt": self.prompt, "completion": completion, "label": self.label}


def _write_sets(job: Job) -> dict[str, int]:
    """Writes both sets as Parquet and for LLaMA-Factory, and gives their sizes."""
    kto = list(_rows(job.table("records")))
    hashes = seeded_hashes((row.key for row in kto), job.recipe.seed, "align shuffle")
    kto = [kto[i] for i in shuffled_apart([row.record for row in kto], hashes)]
    sft = [row for row in kto if row.label]
    for name, rows, schema in (("sft", sft, SFT_SCHEMA), ("kto", kto, KTO_SCHEMA)):
        with ShardWriter(job.table(name), schema) as writer:
            for start in range(0, len(rows), ROWS_PER_GROUP):
                writer.write([row.columns() for row in rows[start : start + ROWS_PER_GROUP]])
    _write_llamafactory(job.folder / "llamafactory", sft, kto)
    return {"sft": len(sft), "kto": len(kto), "kto_positive": len(sft), "kto_negative": len(kto) - len(sft)}


def _rows(records: Path) -> Iterator[_Row]:
    number = 0
    for batch in read_batches(
        records, columns=["id", "prompt", "replies", "best", "worst", "in_sft", "in_kto_negative"]
    ):
        for row in batch.to_pylist():
            for wanted, position, label in (("in_sft", "best", True), ("in_kto_negative", "worst", False)):
                if row[wanted]:
                    reply = row["replies"][row[position]]["text"].strip()
                    yield _Row(row["prompt"], reply, label, number, f"{row['id']} {label}")
            number += 1


def _write_llamafactory(folder: Path, sft: list[_Row], kto: list[_Row]) -> None:
    """The sets in LLaMA-Factory's sharegpt form with OpenAI's role names, and the index that it reads."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    tags["system_tag"] = "system"
    index = {}
    for name, rows, columns in (("sft", sft, {}), ("kto", kto, {"kto_tag": "label"})):
        with atomic_path(folder / f"{name}.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                example: dict[str, Any] = {"messages": conversation(row.prompt, row.reply)}
                if columns:
                    example["label"] = row.label
                file.write(json.dumps(example, ensure_ascii=False) + "\n")
        columns = {"messages": "messages"} | columns
        index[f"slmfast_{name}"] = {"file_name": f"{name}.jsonl", "formatting": "sharegpt", "columns": columns} | {
            "tags": tags
        }
    write_json(folder / "dataset_info.json", index)
