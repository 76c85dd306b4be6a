"""Collect: raw files of many formats become records of one schema (the paper, section 3.2).

Sources are read in the recipe's order, which is their priority: of two duplicates the earlier one stays. A raw record
that can't be one of ours goes to `rejected` with its file, line and reason.
"""

import functools
import glob
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from slmfast.errors import UserError
from slmfast.job import Counts, Job
from slmfast.language import detect
from slmfast.progress import Progress
from slmfast.readers import Record, Rejection, check_format, expand_paths, read_source
from slmfast.recipe import Source, expand
from slmfast.records import MESSAGE, RECORD_SCHEMA, REJECTED_SCHEMA, prompt_text, record_id
from slmfast.store import ShardWriter, file_digest

INPUTS: tuple[str, ...] = ()
MODELS: tuple[str, ...] = ()
SEEDED = False

BATCH = 2048  # records, or
BATCH_CHARACTERS = 4 << 20


def source_paths(job: Job, source: Source) -> list[Path]:
    """The files of a source, sorted, its globs and variables resolved."""
    check_format(source.name, source.format)
    patterns = [source.path] if isinstance(source.path, str) else source.path
    key = f"collect.sources.{source.name}"
    patterns = [expand(pattern, {"RUN": job.run_dir}, f"{key}.path") for pattern in patterns]
    if source.hub is not None:
        folder = glob.escape(download_dataset(source.hub, tuple(patterns), f"{key}.hub"))
        patterns = [f"{folder}/{pattern}" for pattern in patterns]
    return expand_paths(patterns)


@functools.cache
def download_dataset(name: str, patterns: tuple[str, ...], key: str) -> str:
    """The folder of a dataset on the hub, "owner/name@commit", here; its files that aren't there yet are fetched."""
    from huggingface_hub import snapshot_download

    repository, _, commit = name.partition("@")
    try:
        return snapshot_download(repository, repo_type="dataset", revision=commit, allow_patterns=list(patterns))
    except Exception as error:  # the hub's client raises many kinds; the user needs one line about the dataset
        reason = " ".join(str(error).split())[:150]
        told = f"{name} can't be fetched from the hub ({reason}): fetch its files yourself, and give their path alone"
        raise UserError(f"recipe key {key}: {told}") from error


def files(job: Job) -> dict[str, list[tuple[str, str]]]:
    """The names and content hashes of all raw files: collect runs again when one of them changes.

    A name's ending says how the file is read, and the table `rejected` has names.
    """
    return {source.name: _digests(source_paths(job, source)) for source in job.settings.sources}


def run(job: Job) -> Counts:
    """Reads every source into `records` and `rejected`."""
    progress = Progress("collect")
    per_source: dict[str, dict[str, int]] = {}
    with (
        ShardWriter(job.table("records"), RECORD_SCHEMA) as records,
        ShardWriter(job.table("rejected"), REJECTED_SCHEMA) as rejected,
    ):
        for source in job.settings.sources:
            before = records.rows, rejected.rows
            for batch in _batches(_read(job, source)):
                records.write(_record_batch(source.name, [item for item in batch if isinstance(item, Record)]))
                rejected.write([_rejected_row(source.name, item) for item in batch if isinstance(item, Rejection)])
                progress.add(len(batch))
            per_source[source.name] = {"records": records.rows - before[0], "rejected": rejected.rows - before[1]}
    progress.close()
    if records.rows == 0:
        raise UserError(
            f"collect read no record at all ({rejected.rows} rejected, with reasons in {job.table('rejected')}): "
            "correct the paths and formats of collect.sources"
        )
    job.notes["sources"] = per_source
    job.notes["files"] = {name: dict(found) for name, found in files(job).items()}
    return Counts(records.rows + rejected.rows, records.rows, 0, rejected.rows)


def _read(job: Job, source: Source) -> Iterator[Record | Rejection]:
    paths = source_paths(job, source)
    return read_source(source.name, source.format, paths, max_text_bytes=job.settings.max_text_bytes)


def _digests(paths: list[Path]) -> list[tuple[str, str]]:
    """Each file's name below the folder that all of them share, and its content hash."""
    common = os.path.commonpath([path.parent for path in paths])
    names = (path.relative_to(common).as_posix() for path in paths)
    plain = (name.encode(errors="replace").decode() for name in names)  # a name may hold bytes that are not UTF-8
    return [(name, file_digest(path)) for name, path in zip(plain, paths, strict=True)]


def _batches(items: Iterator[Record | Rejection]) -> Iterator[list[Record | Rejection]]:
    batch: list[Record | Rejection] = []
    size = 0
    for item in items:
        batch.append(item)
        if isinstance(item, Record):
            size += len(item.reply) + sum(len(message["content"]) for message in item.prompt)
        if len(batch) == BATCH or size > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _record_batch(source: str, records: list[Record]) -> pa.RecordBatch:
    turns = [message for record in records for message in record.prompt]
    texts = [pa.array([turn[name] for turn in turns], pa.string()) for name in ("role", "content")]
    ends = itertools.accumulate((len(record.prompt) for record in records), initial=0)
    prompts = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.StructArray.from_arrays(texts, fields=MESSAGE))
    columns = {
        "id": [record_id(source, record.prompt, record.reply) for record in records],
        "source": [source] * len(records),
        "source_row": [record.source_row for record in records],
        "language": [detect(prompt_text(record.prompt)) for record in records],
        "source_category": [record.source_category for record in records],
        "prompt": prompts,
        "reply": [record.reply for record in records],
    }
    return pa.RecordBatch.from_pydict(columns, schema=RECORD_SCHEMA)


def _rejected_row(source: str, rejection: Rejection) -> dict[str, Any]:
    return {"source": source, "file": rejection.file, "line": rejection.line, "reason": rejection.reason}
