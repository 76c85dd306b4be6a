"""Tables in Parquet, CSV and JSON files as streams: first a column of texts, then all rows under one schema.

A table is walked through twice. The first walk gives the texts and the types that the columns need, which for JSON
are known at its end alone; the second gives the rows, under the schema that all files share. So no file has to fit in
memory, and a type never depends on where a block of a file happens to end.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from slmfast.errors import UserError
from slmfast.json_tables import JsonTable
from slmfast.readers.json_stream import MAX_VALUE_BYTES
from slmfast.store import ROWS_PER_GROUP
from slmfast.table_schema import columns_to_take, conform, plain_schema

BATCH_BYTES = 2 << 20  # of rows held at once, as far as a file tells how large they are
_READ_BYTES = 1 << 20
_CSV_BLOCKS = (1 << 20, 8 << 20, 64 << 20)  # bytes; a row fits in one block
_STRADDLES = "straddling object straddles"  # what Arrow says where it does not
_ROW_NUMBER = re.compile(r"\bRow #(\d+)")
_TEXTS = (pa.string(), pa.large_string(), pa.null())


class TableFile(Protocol):
    """A table in one file."""

    path: Path
    complete: bool  # whether the file names all its columns; else they are those that its rows have

    def texts(self, column: str) -> Iterator[tuple[pa.Schema, pa.Array]]:
        """The texts of a column in batches, in order, each with the schema of all columns as far as the batch tells.

        Raises UserError where the file can't be read, has no such column, or has one of something else.
        """

    def rows(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """The rows in batches, in order, under a schema that holds all that `texts` gave. Raises UserError."""


class ParquetTable:
    """A Parquet file; of its row groups, which may be large, only pages are in memory."""

    complete = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def texts(self, column: str) -> Iterator[tuple[pa.Schema, pa.Array]]:
        """See TableFile."""
        with _legible(self.path, "Parquet"), self._open() as file:
            schema = plain_schema(file.schema_arrow, self.path)
            kind = _text_type(self.path, schema, column)
            yield schema, pa.array([], kind)  # a table without rows is a table too
            for batch in file.iter_batches(batch_size=_batch_rows(file), columns=[column]):
                yield schema, batch.column(column).cast(kind)

    def rows(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """See TableFile."""
        with _legible(self.path, "Parquet"), self._open() as file:
            for batch in file.iter_batches(batch_size=_batch_rows(file)):
                yield conform(batch, schema, self.path)

    def _open(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.path, buffer_size=_READ_BYTES, pre_buffer=False)


class CsvTable:
    """A CSV file with a header; .gz and .zst too. All columns are texts, so that 007 stays 007."""

    complete = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def texts(self, column: str) -> Iterator[tuple[pa.Schema, pa.Array]]:
        """See TableFile."""
        with _legible(self.path, "CSV"):
            names = self._header()
            schema = plain_schema(pa.schema([(name, pa.string()) for name in names]), self.path)
            _text_type(self.path, schema, column)
            yield schema, pa.array([], pa.string())  # as is a header alone
            for batch in self._batches(names, [column]):
                yield schema, batch.column(column)

    def rows(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """See TableFile."""
        with _legible(self.path, "CSV"):
            for batch in self._batches(schema.names, None):
                yield conform(batch, schema, self.path)

    def _header(self) -> list[str]:
        with self._lines() as lines:
            names = next(csv.reader(lines), [])
        if not names:
            raise UserError(f"{self.path} is empty, or its first line is: give a CSV file with a header")
        if any("\ud800" <= letter <= "\udfff" for letter in "".join(names)):
            raise UserError(f"{self.path} has a header that is not UTF-8: convert the file")
        return names

    def _batches(self, names: list[str], columns: list[str] | None) -> Iterator[pa.RecordBatch]:
        """Streams by small blocks, of which Arrow reads many ahead, and by larger ones where a row doesn't fit."""
        done = 0
        for size in _CSV_BLOCKS:
            seen = 0
            with pa.input_stream(str(self.path)) as stream:
                source = _WholeLineEnds(stream)
                try:
                    for batch in _open_csv(source, names, columns, size):
                        new = batch.slice(max(0, done - seen))
                        seen += len(batch)
                        done = max(done, seen)
                        yield new
                except pa.ArrowInvalid as error:
                    if _STRADDLES not in str(error) or size == _CSV_BLOCKS[-1]:
                        raise
                else:
                    if source.quotes % 2:
                        self._refuse_open_quote()
                    return

    @contextmanager
    def _lines(self) -> Iterator[io.TextIOWrapper]:
        limit = csv.field_size_limit(MAX_VALUE_BYTES)  # for the whole process, so it is put back
        try:
            with pa.input_stream(str(self.path)) as stream:
                yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        finally:
            csv.field_size_limit(limit)

    def _refuse_open_quote(self) -> None:
        """Refuses a file whose last quote is never closed: Arrow takes all that follows it for one value."""
        with self._lines() as lines:
            reader = csv.reader(lines, strict=True)
            line = 0
            try:
                for _ in reader:
                    line = reader.line_num
            except csv.Error as error:
                raise UserError(f"{self.path}, line {line + 1}: broken CSV ({error}): close the quote") from error


class _WholeLineEnds:
    """A stream for Arrow that counts the quotes, ends its last line, and no piece of which ends between CR and LF.

    There Arrow would drop the LF, even from a value in quotes; and it would call a header that no line end follows
    an empty file.
    """

    closed = False

    def __init__(self, stream: pa.NativeFile) -> None:
        self.quotes = 0
        self._stream = stream
        self._held = b""
        self._last = b""

    def read(self, size: int) -> bytes:
        """`size` bytes, more than 1, or one less; fewer or none at the end."""
        data, self._held = self._held, b""
        while len(data) < size and (more := self._stream.read(size - len(data))):
            data += more
        if len(data) == size and data.endswith(b"\r"):
            data, self._held = data[:-1], b"\r"
        elif len(data) < size and (data or self._last)[-1:] not in b"\r\n":
            data += b"\n"
        self._last = data[-1:]
        self.quotes += data.count(b'"')
        return data

    def close(self) -> None:
        """Leaves the stream to its owner."""


def _open_csv(
    source: _WholeLineEnds, names: list[str], columns: list[str] | None, size: int
) -> pyarrow.csv.CSVStreamingReader:
    return pyarrow.csv.open_csv(
        source,
        read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=size),  # threads lose row numbers
        # In a table of one column an empty line is a row: an empty text.
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=len(names) > 1),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), include_columns=columns
        ),
    )


_KINDS: dict[str, type[ParquetTable] | type[CsvTable] | type[JsonTable]] = {
    ".parquet": ParquetTable,
    ".csv": CsvTable,
    ".jsonl": JsonTable,
    ".ndjson": JsonTable,
    ".json": JsonTable,
}
_PACKED = (".gz", ".zst")


def open_tables(inputs: Iterable[Path]) -> list[TableFile]:
    """The tables that files, folders of files and globs (`**` too) name, in the order given, each once.

    The files of one folder or glob are sorted by name. A folder's subfolders are left alone, since an output may lie in
    one. Raises UserError where one names no such file.
    """
    found: dict[Path, Path] = {}
    for given in inputs:
        for path in _files(given):
            found.setdefault(path.absolute(), path)
    return [_kind(path)(path) for path in found.values()]


def _files(given: Path) -> list[Path]:
    if given.is_dir():
        inside = sorted(path for path in given.iterdir() if path.is_file() and not path.name.startswith((".", "_")))
        files = [path for path in inside if _kind(path) is not None]
        if not files:
            raise UserError(
                f"{given} itself holds no file that ends in {', '.join(_KINDS)}: give another folder, files, or a glob "
                f"such as '{given}/**/*.jsonl' for its subfolders"
            )
        return files
    # A name may hold the characters of a glob and be the very file.
    names = [given] if given.exists() else sorted(map(Path, glob(str(given), recursive=True)))  # noqa: PTH207
    files = [path for path in names if not path.is_dir()]
    for path in files or [given]:
        if _kind(path) is None:
            raise UserError(f"{path}: give a file that ends in {', '.join(_KINDS)}; CSV and JSON also in .gz or .zst")
    if not files:
        raise UserError(f"{given} does not exist, or matches no file: give an existing file, folder or glob")
    return files


def _kind(path: Path) -> type[ParquetTable] | type[CsvTable] | type[JsonTable] | None:
    name = path.name.lower()
    for ending in _PACKED:
        if name.endswith(ending) and not name.endswith(f".parquet{ending}"):
            name = name.removesuffix(ending)
            break
    return _KINDS.get(Path(name).suffix)


@contextmanager
def _legible(path: Path, kind: str) -> Iterator[None]:
    """Turns what Arrow says of a damaged file into one line that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, csv.Error) as error:
        reason = " ".join(str(error).split()).removeprefix("CSV parse error: ")[:300].rstrip(": ")
        reason = _ROW_NUMBER.sub(r"row \1 (the header is row 1; blank lines do not count)", reason, count=1)
        if _STRADDLES in reason:
            reason = f"a row of more than {_CSV_BLOCKS[-1] >> 20} MiB, or a quote that is not closed"
        raise UserError(f"{path} is not readable as {kind}: {reason}: mend the file or leave it out") from error


def _text_type(path: Path, schema: pa.Schema, column: str) -> pa.DataType:
    if column not in schema.names:
        raise UserError(f"{path} has no column {column}: {columns_to_take(schema.names)}")
    kind = schema.field(column).type
    if kind not in _TEXTS:
        texts = [field.name for field in schema if field.type in _TEXTS]
        raise UserError(f"{path}, column {column}: holds {kind}, no texts: {columns_to_take(texts)}")
    return kind


def _batch_rows(file: pq.ParquetFile) -> int:
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    widest = max((group.total_byte_size / group.num_rows for group in groups if group.num_rows), default=1)
    return int(min(ROWS_PER_GROUP, max(16, BATCH_BYTES / max(widest, 1))))
