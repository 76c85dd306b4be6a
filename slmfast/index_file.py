"""The file behind DedupIndex: the ids and normalised texts of the rows kept so far, with a versioned, checked header.

8 bytes of magic, the format's version (uint32, little-endian), the length of the settings (uint32), 32 bytes of
BLAKE2b over the version and all that follows the checksum, the settings as JSON, and an Arrow IPC file. A new file is
written beside the old one and renamed over it, so a crash leaves one or the other. The texts are read in place from
the memory-mapped file.
"""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa

from slmfast.errors import UserError
from slmfast.store import atomic_path

SCHEMA = pa.schema([("id", pa.int64()), ("text", pa.large_string())])

_MAGIC = b"SLMDEDUP"
_VERSION = 1
_HEAD = struct.Struct("<8sII32s")
_REMEDY = "restore it from a copy, or delete it to begin anew"


def read_index(path: Path, settings: dict[str, Any]) -> pa.Table:
    """The stored rows, of SCHEMA.

    Raises:
        UserError: the file is damaged, no index, of another version, or made with other settings.
    """
    try:
        with pa.memory_map(str(path)) as file:
            content = file.read_buffer()
    except OSError as error:
        raise UserError(f"{path}: the index can't be opened ({error.strerror or error}); {_REMEDY}") from error
    if content.size < _HEAD.size or content.slice(0, len(_MAGIC)).to_pybytes() != _MAGIC:
        raise UserError(f"{path} is not a dedup index; {_REMEDY}")
    _, version, length, checksum = _HEAD.unpack_from(content)
    if version != _VERSION:
        raise UserError(f"{path} is a dedup index of version {version}, not {_VERSION}; {_REMEDY}")
    body = content.slice(_HEAD.size)
    if length > body.size or _checksum(length, body) != checksum:
        raise UserError(f"{path}: the index is damaged, its checksum does not fit; {_REMEDY}")
    stored = json.loads(body.slice(0, length).to_pybytes())
    if stored != settings:
        odd = ", ".join(f"{key}={value}" for key, value in stored.items() if settings.get(key) != value)
        raise UserError(f"{path} was made with {odd}: open it with the same, or give another path")
    return pa.ipc.open_file(pa.BufferReader(body.slice(length))).read_all()


def read_stamp(path: Path) -> bytes | None:
    """The head of the file, whose checksum tells one content from another; None where there is no file.

    Raises UserError where it can't be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(_HEAD.size)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: the index can't be opened ({error.strerror or error}); {_REMEDY}") from error


def write_index(path: Path, rows: pa.Table, settings: dict[str, Any]) -> None:
    """Writes rows of SCHEMA, all or nothing."""
    header = json.dumps(settings).encode()
    header += b" " * (-(_HEAD.size + len(header)) % 64)  # Arrow wants its buffers aligned
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(rows)
    payload = sink.getvalue()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(_HEAD.pack(_MAGIC, _VERSION, len(header), _checksum(len(header), header, payload)))
        file.write(header)
        file.write(payload)


def _checksum(length: int, *parts: Any) -> bytes:
    digest = hashlib.blake2b(struct.pack("<II", _VERSION, length), digest_size=32)
    for part in parts:
        digest.update(part)
    return digest.digest()
