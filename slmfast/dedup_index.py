"""DedupIndex: the rows kept so far, on disk, so that new texts can be deduplicated against all earlier ones.

The file: 8 bytes of magic, the format's version (uint32, little-endian), the length of the settings (uint32), 32 bytes
of BLAKE2b over all that follows, the settings as JSON, and an Arrow IPC file of the kept rows' ids and normalised
texts. Each `add` writes a new file beside the old one and renames it over it, so a crash leaves one or the other.
"""

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slmfast import _native
from slmfast.arrow_texts import native_texts, normalised_rows, text_column
from slmfast.errors import UserError
from slmfast.near_duplicates import DedupResult, dedup

_MAGIC = b"SLMDEDUP"
_VERSION = 1
_HEAD = struct.Struct("<8sII32s")
_SCHEMA = pa.schema([("id", pa.int64()), ("text", pa.large_string())])


class DedupIndex:
    """A persistent, append-only index of kept texts.

    Adding texts in parts keeps the same rows, with the same stand-ins, as `dedup` of all of them in one call: only
    kept rows ever stand for others, so only they are stored. One process writes an index at a time.

    Args:
        path: the index file; the first `add` makes it. Its folder must exist.
        k, verify, ngram: as for slmfast.dedup; an existing file must have been made with the same.

    Raises:
        UserError: the file is damaged, no index, of another version, or made with other settings.
    """

    def __init__(self, path: str | os.PathLike[str], k: int = 3, *, verify: float | None = 0.8, ngram: int = 3) -> None:
        self.path = Path(path)
        self._settings = {"k": k, "verify": verify, "ngram": ngram}
        dedup([], **self._settings)  # refuses settings out of range before anything is stored under them
        self._kept = self._read() if self.path.exists() else _SCHEMA.empty_table()

    def __len__(self) -> int:
        """How many rows are kept that may stand for others (nulls and empty texts never do)."""
        return self._kept.num_rows

    def add(self, texts: Any, ids: Any, *, threads: int = 0) -> DedupResult:
        """Deduplicates texts against the index and one another, and stores those that are kept.

        Args:
            texts: as for slmfast.dedup.
            ids: n different integers, none of them in the index yet, by which later calls name these rows.

        Returns:
            A DedupResult whose duplicate_of holds ids: that of the stand-in, new or old; the row's own where kept.

        Raises:
            TypeError, ValueError: as slmfast.dedup, or the ids are not n new and different integers.
        """
        column = _as_large(text_column(texts))
        new_ids = self._checked_ids(ids, len(column))
        earlier = self._kept.column("text")
        joined = pa.chunked_array([*earlier.chunks, *column.chunks], pa.large_string())
        whole = dedup(joined, **self._settings, threads=threads)
        start = len(earlier)
        all_ids = np.concatenate([self._kept.column("id").to_numpy(), new_ids])
        result = DedupResult(whole.keep[start:], all_ids[whole.duplicate_of[start:]], whole.distance[start:])
        rows = np.flatnonzero(result.keep & ~_blank(column))
        if len(rows):
            texts_kept = normalised_rows(column, rows)
            added = pa.table([pa.chunked_array([new_ids[rows]]), texts_kept], schema=_SCHEMA)
            kept = pa.concat_tables([self._kept, added])
            self._write(kept)
            self._kept = kept
        return result

    def _checked_ids(self, ids: Any, count: int) -> np.ndarray:
        values = np.asarray(ids)
        if values.ndim != 1 or len(values) != count:
            raise ValueError(f"ids must be one for each of the {count} texts, not of shape {values.shape}")
        if count and values.dtype.kind not in "iu":
            raise TypeError(f"ids must be integers, not {values.dtype}: number the rows")
        if values.dtype == np.uint64 and count and values.max() > np.iinfo(np.int64).max:
            raise ValueError(f"id {values.max()} does not fit 64 bits with a sign: use smaller ids")
        values = values.astype(np.int64)
        taken = np.isin(values, self._kept.column("id").to_numpy())
        if taken.any():
            raise ValueError(f"id {values[taken][0]} is in the index already: give each row an id of its own")
        unique, times = np.unique(values, return_counts=True)
        if len(unique) != len(values):
            raise ValueError(f"id {unique[times > 1][0]} is given twice: give each row an id of its own")
        return values

    def _read(self) -> pa.Table:
        remedy = "restore it from a copy, or delete it to begin anew"
        try:
            file = pa.memory_map(str(self.path))
        except OSError as error:
            raise UserError(f"{self.path}: the index can't be opened ({error.strerror}); {remedy}") from error
        content = file.read_buffer()
        if content.size < _HEAD.size or content.slice(0, 8).to_pybytes() != _MAGIC:
            raise UserError(f"{self.path} is not a dedup index; {remedy}")
        _, version, length, checksum = _HEAD.unpack_from(content)
        if version != _VERSION:
            raise UserError(f"{self.path} is a dedup index of version {version}, not {_VERSION}; {remedy}")
        body = content.slice(_HEAD.size)
        if length > body.size or hashlib.blake2b(body, digest_size=32).digest() != checksum:
            raise UserError(f"{self.path}: the index is damaged, its checksum does not fit; {remedy}")
        settings = json.loads(body.slice(0, length).to_pybytes())
        expected = self._header_settings()
        if settings != expected:
            odd = ", ".join(f"{key}={settings.get(key)}" for key in expected if settings.get(key) != expected[key])
            raise UserError(f"{self.path} was made with {odd}: open it with the same, or give another path")
        return pa.ipc.open_file(pa.BufferReader(body.slice(length))).read_all()

    def _header_settings(self) -> dict[str, Any]:
        return {**self._settings, "simhash": _native.FORMAT_VERSION}

    def _write(self, kept: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, _SCHEMA) as writer:
            writer.write_table(kept)
        settings = json.dumps(self._header_settings()).encode()
        padding = -(_HEAD.size + len(settings)) % 64  # Arrow wants its buffers aligned
        settings += b" " * padding
        body = sink.getvalue()
        digest = hashlib.blake2b(settings, digest_size=32)
        digest.update(body)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with temporary.open("wb") as file:
            file.write(_HEAD.pack(_MAGIC, _VERSION, len(settings), digest.digest()))
            file.write(settings)
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def _as_large(column: pa.ChunkedArray) -> pa.ChunkedArray:
    # Fingerprints first, for their error that names the row; Arrow's cast would not look at the bytes.
    _native.fingerprints(native_texts(column), normalised=False, ngram=1, threads=1)
    return column.cast(pa.large_string())


def _blank(column: pa.ChunkedArray) -> np.ndarray:
    lengths = pc.fill_null(pc.binary_length(column), 0)
    return lengths.to_numpy() == 0
