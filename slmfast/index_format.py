"""The bytes of a DedupIndex: a head, a commit record, and segments that are only ever appended.

Numbers are little-endian, every part begins at a multiple of 64 bytes, checksums are those of csrc/checksum.hpp.

    head     magic, version, length of the settings, checksum (of the head and the settings)
    commit   where the committed bytes end, how many segments and rows they hold, the last segment's checksum, and a
             checksum: the one part that is ever written over, 64 aligned bytes of one disk sector
    settings JSON, filled up with blanks
    segment  header: magic, rows, bytes of text, least and greatest id, checksum of the payload, checksum of the segment
             before (of the head for the first), checksum; then the payload:
             ids int64[n], fingerprints uint64[n], states uint8[n], offsets int64[n + 1], normalised texts in UTF-8

A segment is written behind the committed end and put on the disk; only then does the new commit record make it count.
So a crash leaves the old content or the new, and what lies behind the committed end is no one's. Every byte before it
is covered by a checksum that the commit record vouches for, so a flipped byte is found wherever it is, and so is a
file cut short, even between two segments.
"""

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from io import FileIO
from typing import Any, NamedTuple

import numpy as np

from slmfast import _native

VERSION = 2
PREFIX = 128  # bytes of head and commit record
MAGIC = b"SLMDEDUP"

_ALIGNMENT = 64
_HEAD = struct.Struct("<8sIIQ40x")
_COMMIT = struct.Struct("<QQQQ24xQ")
_SEGMENT = struct.Struct("<8sQQqqQQQ")
_SEGMENT_MAGIC = b"SEGMENT\0"
_MOST_ID = (1 << 63) - 1


class Damage(Exception):
    """The bytes are not what was written; the message is the end of a sentence about the file."""


@dataclass(frozen=True)
class Commit:
    """What of the file counts."""

    end: int
    segments: int
    rows: int
    chain: int
    """The checksum of the last segment's header, or of the head where there is none."""

    def pack(self) -> bytes:
        """The 64 bytes of the record."""
        body = _COMMIT.pack(self.end, self.segments, self.rows, self.chain, 0)[:-8]
        return body + struct.pack("<Q", _checksum(body))


@dataclass(frozen=True, eq=False)
class Segment:
    """The rows of one append, over memory of the mapped file."""

    ids: np.ndarray  # int64[n]
    fingerprints: np.ndarray  # uint64[n]
    states: np.ndarray  # uint8[n], the native RowState: few or full
    offsets: np.ndarray  # int64[n + 1]
    text_bytes: np.ndarray  # uint8[offsets[n]]
    lowest: int
    highest: int
    texts: _native.Texts

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Columns:
    """Rows to be written, column by column, each in pieces so that they are never all held."""

    rows: int
    ids: Iterable[np.ndarray]  # int64
    fingerprints: Iterable[np.ndarray]  # uint64
    states: Iterable[np.ndarray]  # uint8
    texts: Iterable[tuple[np.ndarray, np.ndarray]]
    """Each piece: int64[m + 1] of where its texts begin and end, and its bytes."""


def new_file(settings: dict[str, Any]) -> tuple[bytes, Commit]:
    """The content of an index without rows, and its commit."""
    text = json.dumps(settings).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    checksum = _checksum(_HEAD.pack(MAGIC, VERSION, len(text), 0) + text)
    commit = Commit(PREFIX + len(text), 0, 0, checksum)
    return _HEAD.pack(MAGIC, VERSION, len(text), checksum) + commit.pack() + text, commit


def parse_version(prefix: bytes) -> int | None:
    """The version that a file says it has; None where it is no index at all."""
    if len(prefix) < _HEAD.size or not prefix.startswith(MAGIC):
        return None
    return _HEAD.unpack_from(prefix)[1]


def parse_commit(prefix: bytes, size: int) -> Commit:
    """The commit record of a file of `size` bytes. Raises Damage."""
    if len(prefix) < PREFIX:
        raise Damage("it is cut short")
    record = prefix[_HEAD.size :]
    *values, checksum = _COMMIT.unpack(record)
    if _checksum(record[:-8]) != checksum:
        raise Damage("the checksum of its commit record does not fit")
    commit = Commit(*values)
    if commit.end > size:
        raise Damage(f"it is cut short, by {commit.end - size} bytes")
    return commit


def parse_settings(prefix: bytes, file: FileIO, commit: Commit) -> tuple[dict[str, Any], Commit]:
    """The settings, and the commit of the same file before its first segment. Raises Damage."""
    _, _, length, checksum = _HEAD.unpack_from(prefix)
    file.seek(PREFIX)
    text = file.read(min(length, commit.end - PREFIX))
    if _checksum(prefix[:16] + bytes(8) + prefix[24 : _HEAD.size] + text) != checksum:
        raise Damage("the checksum of its head does not fit")
    return json.loads(text), Commit(PREFIX + length, 0, 0, checksum)


def read_segments(file: FileIO, before: Commit, now: Commit) -> list[Segment]:
    """Maps and checks the segments from one commit to a later one. Raises Damage."""
    segments: list[Segment] = []
    at, chain, rows = before.end, before.chain, before.rows
    if at < now.end:
        memory = _Mapped(file, at, now.end)
        while at < now.end:
            header = _checked_header(memory, at, now.end, chain)
            segments.append(_segment(memory, at, header))
            at, chain, rows = header.starts(at).end, header.checksum, rows + header.rows
    if (at, before.segments + len(segments), rows, chain) != (now.end, now.segments, now.rows, now.chain):
        raise Damage("its segments do not add up")
    return segments


def write_segment(file: FileIO, before: Commit, columns: Columns) -> tuple[Segment, Commit]:
    """Writes rows behind the committed end, over whatever an interrupted append left there.

    Returns:
        The segment and the commit that makes it count, which is yet to be put on the disk, after the segment.
    """
    begin = before.end
    file.truncate(begin)  # so that the gaps between the arrays are zeros
    starts = _Starts(begin, columns.rows, 0)
    lowest, highest = _MOST_ID, -_MOST_ID - 1
    at = starts.ids
    for ids in columns.ids:
        lowest, highest = min(lowest, int(ids.min())), max(highest, int(ids.max()))
        at = _write(file, at, ids)
    _write(file, starts.fingerprints, *columns.fingerprints)
    _write(file, starts.states, *columns.states)
    text_size = _write_texts(file, starts, columns.texts)
    end = _Starts(begin, columns.rows, text_size).end
    file.truncate(end)
    memory = _Mapped(file, begin, end)
    payload = _native.checksum(memory.view(starts.ids, end), 0)
    fields = (columns.rows, text_size, lowest, highest, payload, before.chain)
    body = _SEGMENT.pack(_SEGMENT_MAGIC, *fields, 0)[:-8]
    header = _Header(*fields, _checksum(body))
    _write(file, begin, body + struct.pack("<Q", header.checksum))
    commit = Commit(end, before.segments + 1, before.rows + columns.rows, header.checksum)
    return _segment(memory, begin, header), commit


def write_commit(file: FileIO, commit: Commit) -> None:
    """Makes everything up to the commit count."""
    _write(file, _HEAD.size, commit.pack())


def _write_texts(file: FileIO, starts: "_Starts", pieces: Iterable[tuple[np.ndarray, np.ndarray]]) -> int:
    """Writes offsets and texts side by side, and gives the bytes of text."""
    at, total = starts.offsets, 0
    for offsets, content in pieces:
        at = _write(file, at, offsets[:-1] + (total - offsets[0]))
        total = _write(file, starts.texts + total, content) - starts.texts
    _write(file, at, struct.pack("<q", total))
    return total


def _write(file: FileIO, at: int, *contents: bytes | np.ndarray) -> int:
    """Writes contents at a place of an unbuffered file, and gives the place behind them."""
    file.seek(at)
    for content in contents:
        left = memoryview(content).cast("B")
        at += len(left)
        while left:  # the system may take a part at a time
            left = left[file.write(left) :]
    return at


class _Starts:
    """Where in the file the arrays lie of a segment at `begin`."""

    def __init__(self, begin: int, rows: int, text_size: int) -> None:
        self.ids = begin + _SEGMENT.size
        self.fingerprints = _aligned(self.ids + 8 * rows)
        self.states = _aligned(self.fingerprints + 8 * rows)
        self.offsets = _aligned(self.states + rows)
        self.texts = _aligned(self.offsets + 8 * (rows + 1))
        self.end = _aligned(self.texts + text_size)


class _Header(NamedTuple):
    rows: int
    text_size: int
    lowest: int
    highest: int
    payload: int
    before: int
    checksum: int

    def starts(self, begin: int) -> _Starts:
        return _Starts(begin, self.rows, self.text_size)


class _Mapped:
    """The bytes [begin, end) of a file as memory, addressed by their places in the file."""

    def __init__(self, file: FileIO, begin: int, end: int) -> None:
        self._begin = begin
        self._memory = _native.MappedBytes(file.fileno(), begin, end)

    def view(self, begin: int, end: int) -> memoryview:
        return memoryview(self._memory)[begin - self._begin : end - self._begin]

    def array(self, begin: int, count: int, kind: type) -> np.ndarray:
        return np.frombuffer(self._memory, kind, count, begin - self._begin)


def _checked_header(memory: _Mapped, at: int, limit: int, before: int) -> _Header:
    """The header at a place of the file, once it and its payload are proven whole. Raises Damage."""
    if at + _SEGMENT.size > limit:
        raise Damage(f"the segment at byte {at} is cut short")
    packed = bytes(memory.view(at, at + _SEGMENT.size))
    magic, *fields = _SEGMENT.unpack(packed)
    header = _Header(*fields)
    if magic != _SEGMENT_MAGIC or _checksum(packed[:-8]) != header.checksum or header.before != before:
        raise Damage(f"the segment at byte {at} has no valid header")
    starts = header.starts(at)
    if not header.rows or starts.end > limit:
        raise Damage(f"the segment at byte {at} has an impossible size")
    if _native.checksum(memory.view(starts.ids, starts.end), 0) != header.payload:
        raise Damage(f"the checksum of the segment at byte {at} does not fit")
    return header


def _segment(memory: _Mapped, at: int, header: _Header) -> Segment:
    starts, n = header.starts(at), header.rows
    offsets = memory.array(starts.offsets, n + 1, np.int64)
    text_bytes = memory.array(starts.texts, header.text_size, np.uint8)
    try:
        texts = _native.Texts([("large_string", n, 0, None, offsets, [text_bytes])])
    except ValueError as error:
        raise Damage(f"the segment at byte {at} is inconsistent ({error})") from error
    return Segment(
        memory.array(starts.ids, n, np.int64),
        memory.array(starts.fingerprints, n, np.uint64),
        memory.array(starts.states, n, np.uint8),
        offsets,
        text_bytes,
        header.lowest,
        header.highest,
        texts,
    )


def _aligned(place: int) -> int:
    return place + -place % _ALIGNMENT


def _checksum(content: bytes) -> int:
    return _native.checksum(content, 1)
