"""Diversify: rare labels go, and the rest are sampled as evenly over the labels as they allow (the paper, 3.4)."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slmfast.errors import UserError
from slmfast.job import Counts, Job, dropped_row
from slmfast.records import DROPPED_SCHEMA
from slmfast.sampling import balanced, entropy, gini, seeded_hashes
from slmfast.store import ShardWriter, count_rows, read_batches, read_table, table_schema

INPUTS = ("classify",)
MODELS: tuple[str, ...] = ()

RARE = "a label of too few records (diversify.min_label_count)"
FULL = "its label has its share already (diversify.target)"


def run(job: Job) -> Counts:
    """Splits the records into a balanced sample and, in `dropped`, the rest."""
    source = job.input("classify")
    columns = read_table(source, columns=["id", "label"])
    encoded = columns.column("label").combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy().astype(np.int64)
    counts = np.bincount(codes, minlength=len(encoded.dictionary))
    rare = counts < job.settings.min_label_count
    codes = np.where(rare[codes], -1, codes) if len(codes) else codes
    hashes = seeded_hashes((i.as_py() for i in columns.column("id")), job.recipe.seed, "diversify")
    keep = balanced(codes, hashes, job.settings.target)
    if not keep.any():
        raise UserError("diversify keeps no record: every label is rarer than diversify.min_label_count; lower it")
    _note(job, encoded.dictionary.to_pylist(), counts, np.bincount(codes[keep], minlength=len(counts)))
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
            gone = batch.filter(pc.invert(mask)).select(["id", "source", "source_row"]).to_pylist()
            reasons = [RARE if code < 0 else FULL for code in codes[rows][~keep[rows]]]
            dropped.write([dropped_row(job.stage, row, reason) for row, reason in zip(gone, reasons, strict=True)])
    return Counts(count_rows(source), kept.rows, dropped.rows)


def _note(job: Job, labels: list[str], before: np.ndarray, after: np.ndarray) -> None:
    order = np.argsort(-before, kind="stable")
    job.notes["labels"] = {labels[i]: [int(before[i]), int(after[i])] for i in order}
    job.notes["entropy_bits"] = [entropy(before), entropy(after)]
    job.notes["gini"] = [gini(before[before > 0]), gini(after[after > 0])]
