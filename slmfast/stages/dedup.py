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
from slmfast.near_duplicates import DedupResult, find_duplicates
from slmfast.records import DROPPED_SCHEMA, prompt_texts
from slmfast.store import ShardWriter, count_rows, full_disk_named, read_batches, table_schema

INPUTS = ("categorize",)
MODELS: tuple[str, ...] = ()
SEEDED = False

TEXT_SCHEMA = pa.schema([("text", pa.large_string()), ("id", pa.large_string())])


def run(job: Job) -> Counts:
    """Splits the records into those kept and, in `dropped`, those that another row stands for."""
    source = job.input("categorize")
    with pa.memory_map(str(_write_texts(source, job.work / "texts.arrow"))) as file:
        table = pa.ipc.open_file(file).read_all()
        result = _find(job, table.column("text"))
        kept, dropped = _split(job, source, result, table.column("id"))
        row, size = result.largest_cluster
        job.notes |= {"largest_cluster": size, "stand_in_row": row}
        if alarm := result.alarm(f"record {table.column('id')[row]}" if row >= 0 else None):
            print(f"dedup: {alarm}", flush=True)
    return Counts(count_rows(source), kept, dropped)


def _find(job: Job, texts: pa.ChunkedArray) -> DedupResult:
    settings = job.settings
    return find_duplicates(
        texts,
        k=settings.k,
        mode=settings.mode,
        verify=settings.verify,
        ngram=settings.ngram,
        threads=job.recipe.threads or 0,
    )


def _write_texts(source: Path, path: Path) -> Path:
    with full_disk_named(path), pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, TEXT_SCHEMA) as writer:
        for batch in read_batches(source, columns=["prompt", "id"]):
            ids = batch.column("id").cast(pa.large_string())
            writer.write_batch(pa.record_batch([prompt_texts(batch.column("prompt")), ids], schema=TEXT_SCHEMA))
    return path


def _split(job: Job, source: Path, result: DedupResult, ids: pa.ChunkedArray) -> tuple[int, int]:
    # All stand-ins at once: a `take` from a column of many chunks begins with work on all of them.
    stand_ins = ids.take(pa.array(result.duplicate_of[~result.keep]))
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
            distances = result.distance[rows][~result.keep[rows]]
            dropped.write(_dropped_batch(gone, stand_ins.slice(dropped.rows, gone.num_rows), distances))
    return kept.rows, dropped.rows


def _dropped_batch(rows: pa.RecordBatch, stand_ins: pa.ChunkedArray, distances: np.ndarray) -> pa.RecordBatch:
    columns = [
        *(rows.column(name) for name in ("id", "source", "source_row")),
        pa.repeat("dedup", rows.num_rows),
        pa.repeat("near-duplicate", rows.num_rows),
        stand_ins.cast(pa.string()).combine_chunks(),
        pa.array(distances, pa.uint8()),
    ]
    return pa.record_batch(columns, schema=DROPPED_SCHEMA)
