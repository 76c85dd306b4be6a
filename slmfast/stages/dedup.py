"""Dedup: of instructions that nearly repeat one another, the one of the best source stays (the paper, section 3.3).

The prompts go into one memory-mapped Arrow file, which the C++ engine reads in place: at five million records the
texts stay on the disk, and only fingerprints and row numbers are held in memory. Rows come in source-priority order,
as collect wrote them, which is the order in which dedup prefers them.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slmfast.job import Counts, Job
from slmfast.near_duplicates import DedupResult, dedup
from slmfast.records import DROPPED_SCHEMA, prompt_text
from slmfast.store import ShardWriter, count_rows, read_batches, table_schema

INPUTS = ("categorize",)
MODELS: tuple[str, ...] = ()

TEXT_SCHEMA = pa.schema([("text", pa.large_string()), ("id", pa.string())])
ALARM_SHARE = 0.01  # a cluster of more than this share of all rows is told to the user


def run(job: Job) -> Counts:
    """Splits the records into those kept and, in `dropped`, those that another row stands for."""
    source = job.input("categorize")
    settings = job.settings
    with pa.memory_map(str(_write_texts(source, job.work / "texts.arrow"))) as file:
        table = pa.ipc.open_file(file).read_all()
        result = dedup(
            table.column("text"), k=settings.k, mode=settings.mode, verify=settings.verify, ngram=settings.ngram
        )
        kept, dropped = _split(job, source, result, table.column("id"))
        job.notes |= _largest_cluster(result)
    return Counts(count_rows(source), kept, dropped)


def _write_texts(source: Path, path: Path) -> Path:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, TEXT_SCHEMA) as writer:
        for batch in read_batches(source, columns=["prompt", "id"]):
            texts = pa.array([prompt_text(p) for p in batch.column("prompt").to_pylist()], pa.large_string())
            writer.write_batch(pa.record_batch([texts, batch.column("id")], schema=TEXT_SCHEMA))
    return path


def _split(job: Job, source: Path, result: DedupResult, ids: pa.ChunkedArray) -> tuple[int, int]:
    start = 0
    with (
        ShardWriter(job.table("records"), table_schema(source)) as kept,
        ShardWriter(job.table("dropped"), DROPPED_SCHEMA) as dropped,
    ):
        for batch in read_batches(source):
            rows = slice(start, start + batch.num_rows)
            start += batch.num_rows
            keep = pa.array(result.keep[rows])
            kept.write(batch.filter(keep))
            gone = batch.filter(pc.invert(keep))
            mask = ~result.keep[rows]
            stand_ins = ids.take(pa.array(result.duplicate_of[rows][mask])).combine_chunks()
            dropped.write(_dropped_batch(gone, stand_ins, result.distance[rows][mask]))
    return kept.rows, dropped.rows


def _dropped_batch(rows: pa.RecordBatch, stand_ins: pa.Array, distances: np.ndarray) -> pa.RecordBatch:
    columns = [
        *(rows.column(name) for name in ("id", "source", "source_row")),
        pa.repeat("dedup", rows.num_rows),
        pa.repeat("near-duplicate", rows.num_rows),
        stand_ins,
        pa.array(distances, pa.uint8()),
    ]
    return pa.record_batch(columns, schema=DROPPED_SCHEMA)


def _largest_cluster(result: DedupResult) -> dict[str, int]:
    sizes = np.bincount(result.duplicate_of) if len(result.duplicate_of) else np.zeros(1, int)
    largest = int(sizes.max())
    if largest > max(10, ALARM_SHARE * len(result.keep)):
        print(f"dedup: one row stands for {largest:,} rows, over 1 % of all; look at the dropped table", flush=True)
    return {"largest_cluster": largest, "stand_in_row": int(sizes.argmax())}
