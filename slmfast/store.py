"""Shards, manifests and atomic files: how rows reach the disk, and what proves that they are all there.

A stage's folder holds tables (`records/`, `dropped/`, `rejected/`, ...), each a folder of Parquet shards, and at the
end `manifest.json`. Every file appears by atomic rename, so a file that exists is whole; a folder whose manifest
exists is finished. Work that has no place in a result lies under `.work/` and goes when the stage is done.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from slmfast.errors import UserError

WORK = ".work"
MANIFEST = "manifest.json"
TEMPORARY = ".tmp"  # the ending of a file or folder that is still being written

ROWS_PER_SHARD = 16_384  # small enough that a shard of long texts still fits in memory
ROWS_PER_GROUP = 8_192


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, for a file or a folder, which takes its place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    remove(temporary)
    yield temporary
    for file in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
        _sync(file)
    if temporary.is_dir():
        remove(path)  # a folder can't be renamed over another
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Asks the system to put a file or a folder's entries on the disk, so that a rename never outruns its data."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Deletes a file or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Deletes what a killed process left half-written below `folder`."""
    for stale in sorted(folder.rglob(f".*{TEMPORARY}"), reverse=True):
        remove(stale)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically, keys in the order given."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads a JSON file of ours; a damaged one is a user error, since only something outside can have damaged it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run again") from error


def write_table(path: Path, table: pa.Table) -> None:
    """Writes one Parquet shard atomically, byte for byte the same for the same rows."""
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=ROWS_PER_GROUP, store_schema=True)


def shard_path(folder: Path, number: int) -> Path:
    """Where shard `number` of a table lies."""
    return folder / f"part-{number:05d}.parquet"


def shards(folder: Path) -> list[Path]:
    """The shards of a table, in order; an absent table has none."""
    return sorted(folder.glob("part-*.parquet"))


def count_rows(folder: Path) -> int:
    """How many rows a table holds, read from the shards' footers."""
    return sum(pq.read_metadata(path).num_rows for path in shards(folder))


def read_batches(
    folder: Path, columns: Sequence[str] | None = None, rows: int = ROWS_PER_GROUP
) -> Iterator[pa.RecordBatch]:
    """Streams a table's rows in order, at most `rows` at a time."""
    for path in shards(folder):
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=rows, columns=columns)


def read_table(folder: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads a whole table into memory: for the small ones."""
    tables = [pq.read_table(path, columns=columns, partitioning=None) for path in shards(folder)]
    if not tables:
        raise UserError(f"{folder} holds no part-*.parquet: give a folder that a stage wrote")
    return pa.concat_tables(tables)


def table_schema(folder: Path) -> pa.Schema:
    """The Arrow schema of a table's shards."""
    parts = shards(folder)
    if not parts:
        raise UserError(f"{folder} holds no part-*.parquet: give a folder that a stage wrote")
    return pq.read_schema(parts[0])


class ShardWriter:
    """Writes a stream of rows as shards of a fixed number of rows; use it as a context manager.

    The cut into shards depends on the rows alone, never on how they come in. A table without rows still gets one
    empty shard, so that its schema is known.
    """

    def __init__(self, folder: Path, schema: pa.Schema, rows_per_shard: int = ROWS_PER_SHARD):
        self.folder = folder
        self.schema = schema
        self.rows_per_shard = rows_per_shard
        self.rows = 0
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = 0
        self._next = 0

    def write(self, rows: pa.RecordBatch | pa.Table | Iterable[dict[str, Any]]) -> None:
        """Appends rows; plain dictionaries are converted by the schema."""
        if isinstance(rows, pa.Table):
            batches = rows.select(self.schema.names).cast(self.schema).to_batches()
        elif isinstance(rows, pa.RecordBatch):
            batches = [rows.select(self.schema.names).cast(self.schema)]
        else:
            batches = [pa.RecordBatch.from_pylist(list(rows), schema=self.schema)]
        for batch in batches:
            self._append(batch)

    def _append(self, batch: pa.RecordBatch) -> None:
        start = 0
        while start < batch.num_rows:
            piece = batch.slice(start, self.rows_per_shard - self._pending_rows)
            self._pending.append(piece)
            self._pending_rows += piece.num_rows
            self.rows += piece.num_rows
            start += piece.num_rows
            if self._pending_rows == self.rows_per_shard:
                self._flush()

    def _flush(self) -> None:
        # One chunk a column: the pages of a Parquet file follow the chunks, and the bytes shall follow the rows alone.
        table = pa.Table.from_batches(self._pending, schema=self.schema).combine_chunks()
        write_table(shard_path(self.folder, self._next), table)
        self._next += 1
        self._pending, self._pending_rows = [], 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is None and (self._pending or self._next == 0):
            self._flush()


def digest(value: Any) -> str:
    """A short hash of plain data, the same in every process: keys are sorted, floats written exactly."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """A hash of a file's whole content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def model_digest(folder: Path) -> str:
    """A hash that tells models apart without reading gigabytes: of each file its name, its size and both its ends.

    Training moves every tensor, and the last bytes of a safetensors file are weights, so both ends are enough.
    """
    ends = 1 << 20
    state = hashlib.blake2b(digest_size=16)
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        size = path.stat().st_size
        state.update(f"{path.relative_to(folder)} {size}\n".encode())
        with path.open("rb") as file:
            state.update(file.read(ends))
            file.seek(max(0, size - ends))
            state.update(file.read(ends))
    return state.hexdigest()


def output_digests(folder: Path) -> dict[str, str]:
    """The hash of every finished file below a stage's folder, by its relative path."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    relative = sorted(path.relative_to(folder) for path in files)
    return {str(path): file_digest(folder / path) for path in relative if not path.parts[0].startswith(".")}
