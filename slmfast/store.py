"""Shards, manifests and atomic files: how rows reach the disk, and what proves that they are all there.

A stage's folder holds tables (`records/`, `dropped/`, `rejected/`, ...), each a folder of Parquet shards, and at the
end `manifest.json`. Every file appears by atomic rename, so a file that exists is whole; a folder whose manifest
exists is finished. Work that has no place in a result lies under `.work/` and goes when the stage is done.
"""

import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from slmfast.errors import NO_ROOM, UserError

WORK = ".work"
MANIFEST = "manifest.json"
DATA_CARD = "DATA_CARD.md"  # beside the final sets; like a manifest, no output that anything depends on
MODEL_CARD = "README.md"  # in a model's folder; nothing depends on its words either
TEMPORARY = ".tmp"  # the ending of a file or folder that is still being written

ROWS_PER_SHARD = 65_536
ROWS_PER_GROUP = 8_192
ROWS_PER_CHECK = 128  # so often a shard's size is looked at
BYTES_PER_SHARD = 32 << 20  # of text


@contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """Keeps other processes away from an output, and from what lies beside it until it is whole.

    Raises UserError where another one holds it already.
    """
    busy = UserError(f"{output} is being written by another run: wait for it, or give another folder with -o")
    lock = output.with_name(f".{output.name}.lock")
    output.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        # Its last holder may just have removed it.
        if not lock.exists() or not os.path.samestat(lock.stat(), os.fstat(held.fileno())):
            raise busy
        try:
            yield
        finally:
            lock.unlink()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, for a file or a folder, which takes its place when the block ends well.

    When it fails, what was written goes. An OSError of a disk without room names `path`.
    """
    with full_disk_named(path), _replacing(path) as temporary:
        yield temporary


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Has the error of a disk without room name `path`, which Arrow's own doesn't."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    remove(temporary)
    try:
        yield temporary
    except BaseException:
        remove(temporary)
        raise
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
    """Deletes a file or a whole folder, if it is there.

    A folder is renamed to a temporary name first: killed halfway, nobody takes what is left of it for a whole one.
    """
    if path.is_dir() and not path.is_symlink():
        if not path.name.endswith(TEMPORARY):
            path = path.rename(path.with_name(f".{path.name}.gone{TEMPORARY}"))
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


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what Arrow says of a damaged Parquet file into one line that names the file and the remedy."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{path} can't be read ({reason}): delete its stage's folder and run again") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished stage."""
    path = folder / MANIFEST
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not {"stage", "key", "counts", "outputs", "digest"} <= manifest.keys():
        raise UserError(f"{path} is not a manifest of ours: delete its folder and run again")
    return manifest


def read_json(path: Path) -> Any:
    """Reads a JSON file of ours; a damaged one is a user error, since only something outside can have damaged it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run again") from error


def write_table(path: Path, table: pa.Table) -> None:
    """Writes one Parquet shard atomically, byte for byte the same for the same rows; its pages carry checksums."""
    with atomic_path(path) as temporary:
        pq.write_table(
            table,
            temporary,
            compression="zstd",
            row_group_size=ROWS_PER_GROUP,
            store_schema=True,
            write_page_checksum=True,
        )


def shard_path(folder: Path, number: int) -> Path:
    """Where shard `number` of a table lies."""
    return folder / f"part-{number:05d}.parquet"


def shards(folder: Path) -> list[Path]:
    """The shards of a table, in order; an absent table has none."""
    return sorted(folder.glob("part-*.parquet"), key=lambda path: int(path.stem.removeprefix("part-")))


def count_rows(folder: Path) -> int:
    """How many rows a table holds, read from the shards' footers."""
    total = 0
    for path in shards(folder):
        with readable(path):
            total += pq.read_metadata(path).num_rows
    return total


def read_batches(
    folder: Path, columns: Sequence[str] | None = None, rows: int = ROWS_PER_GROUP
) -> Iterator[pa.RecordBatch]:
    """Streams a table's rows in order, at most `rows` at a time."""
    for path in shards(folder):
        with readable(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield from file.iter_batches(batch_size=rows, columns=columns)


def read_table(folder: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads a whole table into memory: for the small ones."""
    schema = table_schema(folder)
    if columns is not None:
        schema = pa.schema([schema.field(name) for name in columns])
    return pa.Table.from_batches(read_batches(folder, columns), schema=schema)


def table_schema(folder: Path) -> pa.Schema:
    """The Arrow schema of a table's shards."""
    parts = shards(folder)
    if not parts:
        raise UserError(f"{folder} holds no part-*.parquet: give a folder that a stage wrote")
    with readable(parts[0]):
        return pq.read_schema(parts[0])


def text_bytes(column: pa.Array) -> int:
    """The bytes of all text, or of other strings of bytes, in a column, lists and structs included."""
    if column.type in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        return pc.sum(pc.binary_length(column)).as_py() or 0
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return text_bytes(column.flatten())
    if pa.types.is_struct(column.type):
        return sum(map(text_bytes, column.flatten()))
    return 0


class ShardWriter:
    """Writes a stream of rows as shards, each of a fixed number of rows or less; use it as a context manager.

    A shard ends early where its texts get large, so that any shard fits in memory. Where it ends depends on the rows
    alone, never on how they come in. A table without rows still gets one empty shard, so that its schema is known.
    A shard is packed and put on the disk by a thread of the writer's own, one at a time, while the next one is filled;
    the end of the block waits for the last. What went wrong there is raised by the next shard, or at the end.
    """

    def __init__(self, folder: Path, schema: pa.Schema, rows_per_shard: int = ROWS_PER_SHARD):
        self.folder = folder
        self.schema = schema
        self.rows_per_shard = rows_per_shard
        self.rows = 0
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = 0
        self._pending_bytes = 0
        self._next = 0
        self._thread = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None

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
            step = ROWS_PER_CHECK - self._pending_rows % ROWS_PER_CHECK
            piece = batch.slice(start, min(step, self.rows_per_shard - self._pending_rows))
            self._pending.append(piece)
            self._pending_rows += piece.num_rows
            self._pending_bytes += sum(map(text_bytes, piece.columns))
            self.rows += piece.num_rows
            start += piece.num_rows
            large = self._pending_bytes > BYTES_PER_SHARD and self._pending_rows % ROWS_PER_CHECK == 0
            if large or self._pending_rows == self.rows_per_shard:
                self._flush()

    def _flush(self) -> None:
        # One chunk a column: the pages of a Parquet file follow the chunks, and the bytes shall follow the rows alone.
        table = pa.Table.from_batches(self._pending, schema=self.schema).combine_chunks()
        self._wait()
        self._written = self._thread.submit(write_table, shard_path(self.folder, self._next), table)
        self._next += 1
        self._pending, self._pending_rows, self._pending_bytes = [], 0, 0

    def _wait(self) -> None:
        if self._written is not None:
            self._written.result()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if kind is None and (self._pending or self._next == 0):
                self._flush()
            if kind is None:
                self._wait()
        finally:
            self._thread.shutdown()


def digest(value: Any) -> str:
    """A short hash of plain data, the same in every process: keys are sorted, floats written exactly."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """A hash of a file's whole content, read once by this process as long as the file stays the same."""
    status = path.stat()
    return _file_digest(path, status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=4096)
def _file_digest(path: Path, size: int, modified: int, inode: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def model_digest(folder: Path, *, weights: bool = True) -> str:
    """A hash of all files of a model folder but its card, or of all but card and weights."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    files = [path for path in files if path.name != MODEL_CARD]
    files = [path for path in files if weights or path.suffix != ".safetensors"]
    return digest([[str(path.relative_to(folder)), file_digest(path)] for path in files])


def output_digests(folder: Path) -> dict[str, str]:
    """The hash of every finished output below a stage's folder, by its relative path."""
    files = (
        path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, DATA_CARD, MODEL_CARD)
    )
    relative = sorted(path.relative_to(folder) for path in files)
    return {str(path): file_digest(folder / path) for path in relative if not path.parts[0].startswith(".")}
