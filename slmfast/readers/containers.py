"""One file -> its raw objects, whatever it is wrapped in: JSON, JSON lines, CSV or Parquet; plain, gz, zst or tar.

JSON lines and JSON arrays are told apart by their first characters, not by name: many a `.json` holds lines.
"""

import csv
import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from slmfast.readers.json_stream import MAX_VALUE_BYTES, Broken, Empty, Malformed, read_array, read_lines, read_values

_HEAD_BYTES = 1 << 16  # what is looked at to tell the shape of a file
_PARQUET_ROWS = 1024
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst")
_TAR_MARK = slice(257, 262), b"ustar"  # where a tar archive's first member says what it is
_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_ZSTD_BYTES = 2048  # are unpacked at a time: to 64 MiB at the most, in whatever way they were packed


class Raw(NamedTuple):
    """A raw object as it stands in a file, or Malformed in its place."""

    member: str  # the file's name inside an archive; empty outside one
    line: int  # 1-based; in a JSON array the number of the element, in Parquet of the row
    value: Any
    unit: str = "line"  # what `line` counts: line, element or row


def read_file(path: Path) -> Iterator[Raw]:
    """Yields the raw objects of a file in order.

    Raises Broken where the rest of the file can't be read, and OSError where it can't be opened.
    """
    name = path.name.lower()
    if name.endswith(".parquet"):
        yield from (Raw("", row, value, "row") for row, value in _read_parquet(path))
    elif name.endswith(_TAR_SUFFIXES):
        yield from _read_tar(path)
    else:
        with path.open("rb") as file:
            yield from _read_packed(file, name)


def _read_packed(file: BinaryIO, name: str, member: str = "") -> Iterator[Raw]:
    """Reads a file that may be compressed; damage to the compression ends the reading as Broken."""
    stem, _, suffix = name.rpartition(".")
    if suffix == "gz":
        try:
            with gzip.open(file) as stream:
                yield from _read_text(stream, stem, member)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Broken(f"damaged gzip data: {error}") from error
    elif suffix in ("zst", "zstd"):
        import zstandard

        try:
            with io.BufferedReader(_Unzstd(file)) as stream:
                yield from _read_text(stream, stem, member)
        except (EOFError, zstandard.ZstdError) as error:
            raise Broken(f"damaged zstd data: {error}") from error
    else:
        yield from _read_text(file, name, member)


def _read_tar(path: Path) -> Iterator[Raw]:
    """Reads the members in archive order. A member that breaks costs only its own rest."""
    with ExitStack() as stack:
        file: Any = stack.enter_context(path.open("rb"))
        magic = file.peek()[:4]
        # Unpacked here, for tarfile's own streams don't see that a packed one is cut off.
        if magic.startswith(_GZIP_MAGIC):
            file = stack.enter_context(gzip.open(file))
        elif magic == _ZSTD_MAGIC:
            file = stack.enter_context(io.BufferedReader(_Unzstd(file)))
        blocks = _Blocks(file)
        try:
            archive = stack.enter_context(tarfile.open(fileobj=blocks, mode="r|*", tarinfo=_Member))
            while (member := archive.next()) is not None:
                archive.members.clear()  # it would keep millions of them
                # Names with a leading dot are the droppings of file managers ("._data.json"), never data.
                if not member.isfile() or Path(member.name).name.startswith("."):
                    continue
                yield from _read_member(archive.extractfile(member), member.name)
            while blocks.read(_HEAD_BYTES):
                pass  # a packed file's checksum stands at its end
        except tarfile.TarError as error:
            raise Broken(f"damaged tar archive: {blocks.damage or error}") from error
        if blocks.damage is not None:
            raise Broken(f"damaged tar archive: {blocks.damage}")


class _Blocks:
    """What tarfile reads from. Damage is an end of the data, and kept, so that nothing before it is lost."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.damage: Exception | None = None

    def read(self, size: int) -> bytes:
        if self.damage is not None:
            return b""
        data, self.damage = _read_up_to(self._stream, size)
        if isinstance(self.damage, OSError) and not isinstance(self.damage, gzip.BadGzipFile):
            raise self.damage  # the disk's, and not the archive's
        return data


class _Member(tarfile.TarInfo):
    """A member whose header must be whole: tarfile takes a damaged or missing one for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Member":
        """See tarfile.TarInfo. The end of an archive is a block of zeros."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} where a member or the archive's end should be") from error


class _Unzstd(io.RawIOBase):
    """A stream of zstd's frames, unpacked. Raises EOFError where the last frame is cut off, which zstandard's own
    stream_reader takes for the end of the data, and ZstdError for damage."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._packed, self._text = b"", memoryview(b"")
        self._frame: Any = None  # that is being read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._text and (self._packed or self._more()):
            self._unpack()
        size = min(len(self._text), len(buffer))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size

    def _more(self) -> bool:
        self._packed = self._file.read(_ZSTD_BYTES)
        if not self._packed and self._frame is not None:
            raise EOFError("it is cut off")
        return bool(self._packed)

    def _unpack(self) -> None:
        import zstandard

        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._text = memoryview(self._frame.decompress(self._packed))
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None


def _read_member(stream: BinaryIO, name: str) -> Iterator[Raw]:
    last = Raw(name, 0, None)
    try:
        for last in _read_packed(stream, name.lower(), name):
            yield last
    except Broken as error:
        yield Raw(name, last.line + 1, Malformed(f"nothing more of this member can be read: {error}"), last.unit)


def _read_text(stream: BinaryIO, name: str, member: str) -> Iterator[Raw]:
    head, damage = _read_up_to(stream, _HEAD_BYTES)
    if not head.strip():
        raise damage or Empty("it is empty")
    if head.startswith(_UTF16_BOMS):
        raise Broken("it is UTF-16, not UTF-8")
    where, mark = _TAR_MARK
    if head[where] == mark:
        raise Broken(f"it is a tar archive: unpack it, or give it a name that ends in {', '.join(_TAR_SUFFIXES)}")
    start = len(_UTF8_BOM) if head.startswith(_UTF8_BOM) else 0
    whole = io.BufferedReader(_Replay(head[start:], stream, damage), buffer_size=_HEAD_BYTES)
    if name.endswith(".csv"):
        yield from (Raw(member, line, value) for line, value in _read_csv(whole))
        return
    shape = _json_shape(head[start:], name)
    read = {"lines": read_lines, "array": read_array, "values": read_values}[shape]
    unit = "element" if shape == "array" else "line"
    yield from (Raw(member, number, value, unit) for number, value in read(whole))


def _json_shape(head: bytes, name: str) -> str:
    """Tells from a file's beginning whether it holds lines, an array, or values that span lines."""
    text = head.lstrip()
    first, _, rest = text.partition(b"\n")
    if first.strip() == b"{" and not rest.lstrip().startswith(b"{"):
        return "values"
    if not text.startswith(b"["):
        return "lines"
    after = text[1:].lstrip()[:1]
    if after not in (b"{", b"]", b"") and name.endswith((".jsonl", ".ndjson")):
        return "lines"
    if rest.strip() and first.rstrip().endswith(b"]"):
        try:
            alone = not isinstance(next(read_lines(io.BytesIO(first)))[1], Malformed)
        except StopIteration:
            alone = False
        return "lines" if alone else "array"
    return "array"


def _read_csv(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Yields (line of its beginning, row as a dict of columns) for each row under the header."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_VALUE_BYTES))  # of the process: never lower than others need
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    rows = csv.reader(_csv_lines(text), strict=True)
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise Broken(f"broken CSV header: {error}") from error
    if len(set(header)) < len(header):  # a row as a dict would lose a cell without a word
        twice = next(name for i, name in enumerate(header) if name in header[:i])
        raise Broken(f"column {twice[:40]!r} stands twice in the CSV header")
    while True:
        line = rows.line_num + 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, Malformed(f"broken CSV: {error}")
            continue
        if len(cells) == len(header):
            yield line, dict(zip(header, cells, strict=True))
        elif cells:
            yield line, Malformed(f"{len(cells)} cells under a header of {len(header)} columns")


def _csv_lines(text: TextIO) -> Iterator[str]:
    while line := text.readline(MAX_VALUE_BYTES):
        if len(line) == MAX_VALUE_BYTES and not line.endswith(("\n", "\r")):
            raise Broken(f"line of more than {MAX_VALUE_BYTES} characters")
        yield line


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):  # a row as a dict would lose a value without a word
                twice = next(name for i, name in enumerate(names) if name in names[:i])
                raise Broken(f"column {twice[:40]!r} stands twice")
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for value in _rows(batch):
                    number += 1
                    yield number, value
    except (pa.ArrowException, OSError) as error:
        raise Broken(f"damaged Parquet data after row {number}: {' '.join(str(error).split())}") from error


def _rows(batch: Any) -> list[Any]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # one bad row (not UTF-8, a date no Python has) must not cost the others
        return [_row(batch, i) for i in range(batch.num_rows)]


def _row(batch: Any, i: int) -> Any:
    try:
        return batch.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return Malformed(f"text that is not UTF-8: {error.reason}")
    except (ValueError, OverflowError) as error:
        return Malformed(f"a value that can't be read: {' '.join(str(error).split())}")


def _read_up_to(stream: BinaryIO, size: int) -> tuple[bytes, Exception | None]:
    """The next bytes of a stream, fewer only at its end or at the damage that ends it."""
    parts: list[bytes] = []
    try:
        while size > 0 and (data := stream.read1(size)):
            parts.append(data)
            size -= len(data)
    except Exception as damage:  # of whatever kind: it is raised where the reading gets there
        return b"".join(parts), damage
    return b"".join(parts), None


class _Replay(io.RawIOBase):
    """A stream whose beginning has been read already, whole again. Compressed streams can't seek back cheaply."""

    def __init__(self, head: bytes, stream: BinaryIO, damage: Exception | None) -> None:
        self._head = head
        self._stream = stream
        self._damage = damage

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        if not self._head and self._damage is not None:
            raise self._damage
        # read1 and not read, which would lose what it has when it comes upon damage
        data = self._head[: len(buffer)] or self._stream.read1(len(buffer))
        self._head = self._head[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)
