"""Dedup of one column of Parquet, CSV and JSON files of any size, for the command line.

The texts go into one memory-mapped Arrow file, which the C++ engine reads in place: only fingerprints and row numbers
are held in memory. The rows are then read again and written, those that stay and, by number, those that go.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from slmfast.errors import UserError
from slmfast.near_duplicates import DedupResult, find_duplicates
from slmfast.progress import Progress
from slmfast.store import ROWS_PER_GROUP, ShardWriter, atomic_path, only_writer
from slmfast.table_files import TableFile, open_tables
from slmfast.table_schema import CommonSchema

DROPPED_SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("file_row", pa.int64()),  # 0-based, in that file
        ("row", pa.int64()),  # 0-based, in all files
        ("duplicate_of_file", pa.string()),  # where the row is that stands for it
        ("duplicate_of_file_row", pa.int64()),
        ("duplicate_of", pa.int64()),
        ("distance", pa.uint8()),  # the Hamming distance of the two fingerprints
    ]
)
_TEXT_SCHEMA = pa.schema([("text", pa.large_string())])


class Outcome(NamedTuple):
    """What became of the rows, and a line for the user where one row stands for suspiciously many."""

    kept: int
    dropped: int
    alarm: str | None


def dedup_files(inputs: Sequence[Path], column: str, output: Path, **settings: Any) -> Outcome:
    """Writes the rows that stay to `output`/kept/part-*.parquet, in order, and `output`/dropped.parquet.

    Args:
        inputs: files, folders of files and globs; earlier ones have priority (table_files.open_tables).
        column: the column of texts.
        output: a new or empty folder, which appears when all is written.
        settings: those of slmfast.dedup.

    Raises:
        UserError: a file can't be read, changes meanwhile or does not agree with the others, the disk is full, or a
            setting is out of range.
    """
    output = output.absolute()
    _refuse_taken(output)
    _dedup([], settings)  # refuses settings out of range before any file is read
    files = open_tables(inputs)
    stamps = [_stamp(file.path) for file in files]
    with _writable(output), only_writer(output), atomic_path(output) as folder:
        _refuse_taken(output)  # it may have come meanwhile
        folder.mkdir()
        spool = folder / "texts.arrow"
        schema, starts = _write_texts(files, column, spool)
        if column not in schema.names:
            raise UserError(f"{files[0].path} holds no rows: give files with a column {column}")
        result = _find(spool, settings)
        spool.unlink()
        rows = _Rows(files, starts, result)
        rows.write_kept(schema, folder / "kept", stamps)
        rows.write_dropped(folder / "dropped.parquet")
        return Outcome(result.n_kept, len(result.keep) - result.n_kept, rows.alarm())


def _refuse_taken(output: Path) -> None:
    if output.is_file() or (output.exists() and any(output.iterdir())):
        raise UserError(f"{output} is a file or holds files: give a new folder with -o")


@contextmanager
def _writable(output: Path) -> Iterator[None]:
    """Turns what the system says of a full disk, or of one that fails, into one line that names the folder."""
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error.strerror or error).split())
        raise UserError(f"{output} can't be written ({reason}): make room, or give another folder with -o") from error


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What tells whether a file has been changed or replaced; None where it is gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def _write_texts(files: list[TableFile], column: str, spool: Path) -> tuple[pa.Schema, np.ndarray]:
    """Gives the common schema and, int64[files + 1], the global number of each file's first row and of the end."""
    common = CommonSchema()
    starts = [0]
    progress = Progress("dedup: reading")
    with pa.OSFile(str(spool), "wb") as sink, pa.ipc.new_file(sink, _TEXT_SCHEMA) as writer:
        for file in files:
            rows = 0
            for schema, texts in file.texts(column):
                common.add(file.path, schema, complete=file.complete)
                _check_unicode(file.path, column, texts, rows)
                writer.write_batch(pa.record_batch([texts.cast(pa.large_string())], schema=_TEXT_SCHEMA))
                rows += len(texts)
                progress.add(len(texts))
            starts.append(starts[-1] + rows)
    progress.close()
    return common.result(), np.array(starts)


def _check_unicode(path: Path, column: str, texts: pa.Array, first: int) -> None:
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid as error:
        for row, text in enumerate(texts.cast(pa.large_binary())):
            try:
                (text.as_py() or b"").decode()
            except UnicodeDecodeError:
                raise UserError(f"{path}, row {first + row}, column {column}: not UTF-8: mend or drop it") from error
        raise UserError(f"{path}, column {column}: {error}: write the file again") from error


def _find(spool: Path, settings: dict[str, Any]) -> DedupResult:
    with pa.memory_map(str(spool)) as mapped:
        return _dedup(pa.ipc.open_file(mapped).read_all().column("text"), settings)


def _dedup(texts: Any, settings: dict[str, Any]) -> DedupResult:
    try:
        return find_duplicates(texts, **settings)  # its alarm names a file and a row: see _Rows.alarm
    except (TypeError, ValueError) as error:  # a setting out of range, or too many rows
        raise UserError(f"dedup: {error}") from error


class _Rows:
    """The rows of all files and what became of them."""

    def __init__(self, files: list[TableFile], starts: np.ndarray, result: DedupResult) -> None:
        self._files, self._starts, self._result = files, starts, result
        # A file's name may hold bytes that are not UTF-8; a table's text may not.
        self._names = pa.array([str(file.path).encode(errors="replace").decode() for file in files], pa.string())

    def write_kept(self, schema: pa.Schema, folder: Path, stamps: list[tuple[int, ...] | None]) -> None:
        """Reads all files again and writes the rows that stay. UserError where a file has no longer its stamp."""
        progress = Progress("dedup: writing", len(self._result.keep))
        with ShardWriter(folder, schema) as writer:
            parts = zip(self._files, stamps, self._starts[:-1], self._starts[1:], strict=True)
            for file, stamp, start, end in parts:
                for batch in file.rows(schema):
                    keep = self._result.keep[start : min(end, start + len(batch))]
                    start += len(batch)
                    if start > end:
                        break
                    writer.write(batch.filter(pa.array(keep)))
                    progress.add(len(batch))
                if start != end or _stamp(file.path) != stamp:
                    raise UserError(f"{file.path} changed while it was read: run again when it is complete")
        progress.close()

    def write_dropped(self, path: Path) -> None:
        """Writes where each row that goes was, and where the one is that stands for it."""
        gone = np.flatnonzero(~self._result.keep)
        with pq.ParquetWriter(path, DROPPED_SCHEMA, compression="zstd") as writer:
            for begin in range(0, len(gone), ROWS_PER_GROUP):
                rows = gone[begin : begin + ROWS_PER_GROUP]
                stand_ins = self._result.duplicate_of[rows]
                columns = [*self._places(rows), *self._places(stand_ins), pa.array(self._result.distance[rows])]
                writer.write_batch(pa.record_batch(columns, schema=DROPPED_SCHEMA))

    def _places(self, rows: np.ndarray) -> list[pa.Array]:
        """The file's name, the row in it and the global row."""
        files = np.searchsorted(self._starts, rows, side="right") - 1
        return [self._names.take(pa.array(files)), pa.array(rows - self._starts[files]), pa.array(rows)]

    def alarm(self) -> str | None:
        """The result's alarm, with the row named by its file."""
        row, _ = self._result.largest_cluster
        if row < 0:
            return None
        name, file_row, _ = self._places(np.array([row]))
        return self._result.alarm(f"row {file_row[0]} of {name[0]}")
