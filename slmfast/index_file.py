"""The file of a DedupIndex: opened, checked, appended to by one writer at a time (slmfast.index_format has the bytes).

The file is mapped into memory and never read as a whole into it. A writer holds an advisory lock (flock) on the file;
readers need none, since committed bytes never change. A file of very many segments is written anew as one, beside the
old file, and renamed over it.
"""

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from slmfast import index_format
from slmfast.errors import UserError
from slmfast.index_format import Columns, Commit, Damage, Segment
from slmfast.store import atomic_path

LOCK_SECONDS = 10.0  # how long a second writer waits for the first
MOST_SEGMENTS = 1024  # so many are merged into one before the next append, if there is room for the merged file
_ROWS_PER_PIECE = 1 << 16  # rows that are copied at a time
_MOST_ROWS = (1 << 32) - 2  # of one segment: the native module's limit
_REMEDY = "restore it from a copy, or delete it to begin anew"


class IndexFile:
    """The segments of the file at `path`, as far as it was read; a path without a file has none.

    Raises:
        UserError: the file can't be read, is damaged, no index, of another version, or made with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.segments: list[Segment] = []
        self._settings = settings
        self._commit: Commit | None = None  # up to which the file was read
        self._identity: tuple[int, int] | None = None  # of the file that the segments lie in
        self._merge_at = 0  # segments before which no merge is tried, because the last one failed
        self.refresh()

    def __len__(self) -> int:
        return self._commit.rows if self._commit else 0

    def refresh(self) -> None:
        """Reads what was appended since; all of it, if another file has taken the place of the one read."""
        with self._explained("opened", "see that it is a file and may be read, and try again"):
            try:
                with self.path.open("rb", buffering=0) as file:
                    self._read(file)
            except FileNotFoundError:
                if self._commit is not None:
                    raise UserError(f"{self.path} is gone: open the index anew to begin an empty one") from None

    def _read(self, file: FileIO) -> None:
        status = os.fstat(file.fileno())
        identity = (status.st_dev, status.st_ino)
        prefix, commit = self._read_commit(file)
        if identity == self._identity and commit == self._commit:
            return
        settings, known = index_format.parse_settings(prefix, file, commit)
        if settings != self._settings:
            odd = ", ".join(f"{key}={value}" for key, value in settings.items() if self._settings.get(key) != value)
            raise UserError(f"{self.path} was made with {odd}: open it with the same, or give another path")
        self.segments = self._grown(file, identity, commit) or index_format.read_segments(file, known, commit)
        self._commit, self._identity = commit, identity

    def _grown(self, file: FileIO, identity: tuple[int, int], commit: Commit) -> list[Segment] | None:
        """The segments, if the file is the one that was read and has but grown since."""
        if self._commit is None or identity != self._identity:
            return None
        try:
            return [*self.segments, *index_format.read_segments(file, self._commit, commit)]
        except Damage:  # or somebody copied another index over it: reading it whole will tell
            return None

    def _read_commit(self, file: FileIO) -> tuple[bytes, Commit]:
        """The first bytes of an unbuffered file (a buffer would give the same bytes again), and what they commit."""
        prefix = b""
        while True:
            file.seek(0)
            before, prefix = prefix, file.read(index_format.PREFIX)
            version, ours = index_format.parse_version(prefix), index_format.VERSION
            if version is None:
                raise UserError(f"{self.path} is not a dedup index; {_REMEDY}")
            if version != ours:
                raise UserError(f"{self.path} is a dedup index of version {version}, not {ours}; {_REMEDY}")
            try:
                return prefix, index_format.parse_commit(prefix, os.fstat(file.fileno()).st_size)
            except Damage:
                if prefix == before:  # else a writer may have been at the record while it was read
                    raise

    @contextmanager
    def writing(self) -> Iterator[Callable[[Columns], None]]:
        """Keeps other writers out, brings the segments up to date, and yields what appends rows, all or none of them.

        Raises:
            UserError: the file can't be written, another process is writing for longer than LOCK_SECONDS, or it is
                damaged; nothing is appended.
        """
        while True:
            with self._locked() as file:
                self.refresh()
                if len(self.segments) < max(MOST_SEGMENTS, self._merge_at) or len(self) > _MOST_ROWS:
                    yield lambda columns: self._append(file, columns)
                    return
                self._merge()  # into another file, which is yet to be locked; else not again so soon

    @contextmanager
    def _locked(self) -> Iterator[FileIO]:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            with self._explained_write():
                file = self._open()
            with file:
                with self._explained_write():
                    ours = _try_lock(file)
                try:
                    if ours and self._in_place(file):
                        yield file
                        return
                finally:
                    if ours:
                        _unlock(file)
            if time.monotonic() > deadline:
                raise UserError(f"{self.path}: another process is writing to the index; add the same texts again later")
            time.sleep(0.02)

    def _open(self) -> FileIO:
        try:
            return self.path.open("r+b", buffering=0)
        except FileNotFoundError:
            if self._commit is not None:
                raise UserError(f"{self.path} is gone: open the index anew to begin an empty one") from None
        self._create()
        return self.path.open("r+b", buffering=0)

    def _create(self) -> None:
        """Gives the name to a whole file without rows, unless somebody else has done so meanwhile."""
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(index_format.new_file(self._settings)[0])
                _put_on_disk(file)
            try:
                os.link(temporary, self.path)
            except FileExistsError:
                return
            except OSError:  # a file system without hard links
                if not self.path.exists():
                    temporary.replace(self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)

    def _in_place(self, file: FileIO) -> bool:
        """Whether the path still leads to this file: another writer may have put a merged one in its place."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def _append(self, file: FileIO, columns: Columns) -> None:
        before = self._commit
        with self._explained_write():
            if before is None or self._read_commit(file)[1] != before:  # nothing but the lock prevents it
                raise UserError(f"{self.path} was written to by another process meanwhile: add the same texts again")
            try:
                segment, commit = index_format.write_segment(file, before, columns)
                _put_on_disk(file)
            except BaseException:  # nothing is added, and the room is given back
                with suppress(OSError):
                    file.truncate(before.end)
                raise
            try:
                index_format.write_commit(file, commit)
                _put_on_disk(file)
            except BaseException:  # nothing is added; no room is given back, as a reader may have mapped it by now
                with suppress(OSError):
                    index_format.write_commit(file, before)
                raise
        self.segments, self._commit = [*self.segments, segment], commit

    def _merge(self) -> None:
        """Writes all segments anew as one, or puts that off where the system refuses it."""
        try:
            path = self.path.resolve()  # a link stays a link
            content, empty = index_format.new_file(self._settings)
            with atomic_path(path) as temporary, temporary.open("w+b", buffering=0) as file:
                shutil.copymode(path, temporary)
                file.write(content)
                _, commit = index_format.write_segment(file, empty, _all_columns(self.segments))
                index_format.write_commit(file, commit)
        except OSError:  # no room for a second file, or a read-only folder: an append can do without either
            self._merge_at = len(self.segments) + MOST_SEGMENTS

    def _explained_write(self) -> AbstractContextManager[None]:
        remedy = f"see that it and the folder {self.path.parent} exist, may be written to and have room"
        return self._explained("written", remedy)

    @contextmanager
    def _explained(self, doing: str, remedy: str) -> Iterator[None]:
        """Makes an error of the system and damage of the file one line for the user."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{self.path}: the index can't be {doing} ({reason}); {remedy}") from error
        except Damage as damage:
            raise UserError(f"{self.path}: the index is damaged, {damage}; {_REMEDY}") from damage


def _all_columns(segments: list[Segment]) -> Columns:
    def pieces(name: str) -> Iterator[np.ndarray]:
        return (getattr(segment, name) for segment in segments)

    def texts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for segment in segments:
            for begin, end in pairwise([*range(0, len(segment), _ROWS_PER_PIECE), len(segment)]):
                offsets = segment.offsets[begin : end + 1]
                yield offsets, segment.text_bytes[offsets[0] : offsets[-1]]

    rows = sum(len(segment) for segment in segments)
    return Columns(rows, pieces("ids"), pieces("fingerprints"), pieces("states"), texts())


def _try_lock(file: FileIO) -> bool:
    """Whether the file is ours to write until it is unlocked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(file: FileIO) -> None:
    fcntl.flock(file, fcntl.LOCK_UN)  # closing would not do: what is mapped through the file holds the lock too


def _put_on_disk(file: BinaryIO | FileIO) -> None:
    file.flush()
    os.fsync(file.fileno())
