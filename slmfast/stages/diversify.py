"""Diversify: rare and wrong labels go, the rest are sampled as evenly over labels as they allow (the paper, 3.4).

Where the recipe asks for an audit, a sample of each label is put to the judge, and the labels that it mostly denies go.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slmfast import label_audit
from slmfast.errors import UserError
from slmfast.job import Counts, Job, run_units
from slmfast.records import DROPPED_SCHEMA
from slmfast.sampling import balanced, drawn, entropy, gini, seeded_hashes
from slmfast.store import (
    ShardWriter,
    atomic_path,
    count_rows,
    read_batches,
    read_table,
    table_schema,
)
from slmfast.token_budget import TokenBudget

INPUTS = ("classify",)
MODELS: tuple[str, ...] = ()  # but see `models`

AUDIT_ROWS = 512  # that are judged, written and, after a break, judged again together
_RARE, _WRONG = -1, -2  # codes of the labels that go
REASONS = {
    _RARE: "a label of too few records (diversify.min_label_count)",
    _WRONG: "a label that the judge often finds wrong (diversify.audit_threshold)",
}
LEFT = {
    "exact": "its label has its share already (diversify.target)",
    "random": "not drawn (diversify.selection)",
}


def models(job: Job) -> tuple[str, ...]:
    """The roles of the models that this stage needs: the judge where there is an audit."""
    return MODELS if job.settings.audit is None else ("judge",)


def run(job: Job) -> Counts:
    """Splits the records into a balanced sample and, in `dropped`, the rest."""
    source = job.input("classify")
    columns = read_table(source, columns=["id", "label"])
    encoded = columns.column("label").combine_chunks().dictionary_encode()
    # By name and not by first appearance: of equal labels the first gets what a whole cap leaves over, in any order.
    order = pc.array_sort_indices(encoded.dictionary).to_numpy()
    labels = encoded.dictionary.take(pa.array(order)).to_pylist()
    codes = np.argsort(order)[encoded.indices.to_numpy()]
    counts = np.bincount(codes, minlength=len(labels))
    final = np.where(counts < job.settings.min_label_count, _RARE, np.arange(len(labels)))
    ids = columns.column("id")
    if job.settings.audit is not None:
        final[_audit(job, source, labels, _by_label(final, codes), counts, ids)] = _WRONG
    codes = _by_label(final, codes)
    choose = {"exact": balanced, "random": drawn}[job.settings.selection]
    keep = choose(codes, seeded_hashes(_texts(ids), job.recipe.seed, "diversify"), job.settings.target)
    if not keep.any():
        raise UserError(f"diversify keeps no record{_why_none(job, counts, final)}")
    stay = int((codes >= 0).sum())
    if stay < job.settings.target:
        print(
            f"diversify: diversify.target is {job.settings.target:,}, but only {stay:,} records have a label that stays"
        )
    _note(job, labels, counts, np.bincount(codes[keep], minlength=len(counts)))
    start = 0
    with (
        ShardWriter(job.table("records"), table_schema(source)) as kept,
        ShardWriter(job.table("dropped"), DROPPED_SCHEMA) as dropped,
    ):
        for batch in read_batches(source):
            rows = slice(start, start + batch.num_rows)
            start += batch.num_rows
            mask = pa.array(keep[rows])
            kept.write(batch.filter(mask))
            reasons = [REASONS.get(code, LEFT[job.settings.selection]) for code in codes[rows][~keep[rows]].tolist()]
            dropped.write(_dropped_batch(job, batch.filter(pc.invert(mask)), reasons))
    return Counts(count_rows(source), kept.rows, dropped.rows)


def _why_none(job: Job, counts: np.ndarray, final: np.ndarray) -> str:
    """What became of the labels, and what to do about it."""
    if not len(counts):
        return ": it was given none; look at why the stages before it dropped theirs"
    rare, wrong = int((final == _RARE).sum()), int((final == _WRONG).sum())
    told, keys = [], []
    if rare:
        told.append(
            f"{rare:,} of {len(counts):,} labels have fewer than {job.settings.min_label_count:,} records (the most "
            f"frequent label has {counts.max():,})"
        )
        keys.append("diversify.min_label_count")
    if wrong:
        told.append(f"{wrong:,} of {len(counts):,} labels fail the audit")
        keys.append("diversify.audit_threshold")
    if not told:
        return ": none was drawn; raise diversify.target"
    return f": {' and '.join(told)}; lower {' or '.join(keys)}, or give more records"


def _dropped_batch(job: Job, rows: pa.RecordBatch, reasons: list[str]) -> pa.RecordBatch:
    given = {name: rows.column(name) for name in ("id", "source", "source_row")}
    given |= {"stage": pa.repeat(job.stage, len(reasons)), "reason": pa.array(reasons, pa.string())}
    empty = {name: pa.nulls(len(reasons), DROPPED_SCHEMA.field(name).type) for name in ("duplicate_of", "distance")}
    return pa.RecordBatch.from_pydict(given | empty, schema=DROPPED_SCHEMA)


def _texts(column: pa.ChunkedArray) -> Any:
    return itertools.chain.from_iterable(chunk.to_pylist() for chunk in column.chunks)


def _by_label(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Each row's label's value."""
    return values[codes] if len(codes) else codes


def _audit(
    job: Job, source: Path, labels: list[str], codes: np.ndarray, counts: np.ndarray, ids: pa.ChunkedArray
) -> list[int]:
    """Judges a sample of every label, writes it for people, and gives the codes of the labels that fail."""
    part = dataclasses.replace(job, folder=job.work / "audit")
    asked = part.table("sample")
    if not asked.exists():
        hashes = seeded_hashes(_texts(ids), job.recipe.seed, "label audit")
        _write_sample(source, label_audit.sample(codes, hashes, job.settings.audit), asked)
    with job.engine("judge") as engine:
        budget = TokenBudget(part.folder, engine)
        run_units(
            part,
            asked,
            label_audit.COLUMNS,
            AUDIT_ROWS,
            lambda rows, _: (budget.keep(label_audit.judge_labels, rows), []),
            engines=[engine],
        )
    judged = read_table(part.table("records"), [*table_schema(source).names, "agrees", "yes_probability"]).to_pylist()
    threshold = job.settings.audit_threshold
    standing = label_audit.standings(judged, dict(zip(labels, counts.tolist(), strict=True)))
    label_audit.write_audit_csv(job.folder / "audit.csv", judged)
    label_audit.write_label_csv(job.folder / "audit_labels.csv", standing, threshold)
    failed = [found for found in standing if found.falls(threshold)]
    job.notes["audit"] = {
        "threshold": threshold,
        "sampled": len(judged),
        "agreed": sum(found.agreed for found in standing),
        "denied": sum(found.denied for found in standing),
        "unreadable": sum(found.unreadable for found in standing),
        "labels": len(standing),
        **budget.notes,
        "failed": {found.label: [found.records, found.agreed, found.denied] for found in failed},
    }
    number = {label: code for code, label in enumerate(labels)}
    return [number[found.label] for found in failed]


def _write_sample(source: Path, chosen: np.ndarray, folder: Path) -> None:
    start = 0
    with atomic_path(folder) as temporary, ShardWriter(temporary, table_schema(source)) as writer:
        for batch in read_batches(source):
            writer.write(batch.filter(pa.array(chosen[start : start + batch.num_rows])))
            start += batch.num_rows


def _note(job: Job, labels: list[str], before: np.ndarray, after: np.ndarray) -> None:
    order = np.argsort(-before, kind="stable")
    job.notes["labels"] = {labels[i]: [int(before[i]), int(after[i])] for i in order}
    job.notes["entropy_bits"] = [entropy(before), entropy(after)]
    job.notes["gini"] = [gini(before[before > 0]), gini(after[after > 0])]
