"""The files of a source in, one Record or one Rejection a raw object out. Nothing is skipped without a Rejection."""

import difflib
import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from slmfast.errors import UserError
from slmfast.readers.containers import Raw, read_file
from slmfast.readers.formats import FORMATS, BadRecord, Parsed, kind
from slmfast.readers.json_stream import Broken, Empty, Malformed

_KINDS = "UTF-8 JSON, JSON lines or CSV, plain or in .gz, .zst, .tar.gz or .tar.zst, or Parquet"


_PLACE = re.compile(r"\b(column|character|line|byte|position|turn|round) \d+")


class Record(NamedTuple):
    """A raw record that is one of ours."""

    source_row: int  # 0-based number in its source, malformed ones counted, blank lines not
    file: str  # relative to the folder that the source's files share; inside an archive: archive/member
    line: int  # 1-based; in a JSON array the number of the element, in Parquet of the row
    prompt: list[dict[str, str]]  # every turn before the last assistant turn
    reply: str  # the last assistant turn
    source_category: str | None


class Rejection(NamedTuple):
    """A raw record that can't be used, and why. The fields are those of Record."""

    source_row: int
    file: str
    line: int
    reason: str
    unit: str = "line"  # what `line` counts: line, element or row


def without_places(reason: str) -> str:
    """A reason without where in a line or file the fault stands, so that equal faults can be counted."""
    return _PLACE.sub(r"\1 …", reason)


def expand_paths(patterns: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files that paths and globs (`**` too) name, as absolute paths: each once, sorted.

    Raises UserError for a pattern that names no file, and where there is no pattern.
    """
    if isinstance(patterns, str | os.PathLike):
        patterns = [patterns]
    found: set[str] = set()
    for pattern in map(os.fspath, patterns):
        if Path(pattern).is_dir():
            raise UserError(f"{pattern} is a folder: name its files, for instance {Path(pattern) / '*.jsonl'}")
        # A name may hold the characters of a glob and be the very file.
        names = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)  # noqa: PTH207
        files = [os.path.abspath(name) for name in names if not Path(name).is_dir()]  # noqa: PTH100
        if not files:
            raise UserError(f"no file matches {pattern}: correct the path, or put the files there")
        found.update(files)
    if not found:
        raise UserError("no path is given: name at least one file")
    return [Path(name) for name in sorted(found)]


def read_source(
    name: str,
    format: str,
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    max_text_bytes: int = 1 << 20,
) -> Iterator[Record | Rejection]:
    """Streams a source: for each raw object, in the order of the files, a Record or a Rejection.

    `format` is a key of FORMATS, `paths` are files or globs, `max_text_bytes` bounds a prompt and a reply in UTF-8.
    Raises UserError, at once, for an unknown format or a path that names no file, and while reading, for a file of
    which nothing at all can be read.
    """
    check_format(name, format)
    return _read_files(FORMATS[format], expand_paths(paths), max_text_bytes)


def check_format(name: str, format: str) -> None:
    """Raises UserError where there is no such format."""
    if format not in FORMATS:
        close = difflib.get_close_matches(format, FORMATS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(FORMATS)}"
        raise UserError(f"unknown format {format!r} of {name}: {hint}")


def _read_files(
    parse: Callable[[dict[str, Any]], Parsed], files: list[Path], max_text_bytes: int
) -> Iterator[Record | Rejection]:
    row = 0
    common = os.path.commonpath([path.parent for path in files])
    for path in files:
        # A file's name may hold bytes that are not UTF-8; a table's text may not.
        file = path.relative_to(common).as_posix().encode(errors="replace").decode()
        for raw in _read_guarded(path):
            member = raw.member.encode(errors="replace").decode()
            where = f"{file}/{member}" if member else file
            try:
                parsed = _parse(raw.value, parse, max_text_bytes)
            except BadRecord as error:
                yield Rejection(row, where, raw.line, str(error), raw.unit)
            else:
                yield Record(row, where, raw.line, *parsed)
            row += 1


def _read_guarded(path: Path) -> Iterator[Raw]:
    """The raw objects of a file; its unreadable rest is one Malformed, an entirely unreadable file a UserError."""
    last = Raw("", 0, None)
    readable = False
    try:
        for last in read_file(path):
            readable = readable or not isinstance(last.value, Malformed)
            yield last
    except Empty as error:
        raise UserError(f"{path} is empty: give a file with records, or leave it out") from error
    except Broken as error:
        if not readable:
            raise UserError(f"nothing of {path} can be read: {error}; give {_KINDS}") from error
        yield Raw(last.member, last.line + 1, Malformed(f"the rest of the file can't be read: {error}"), last.unit)
    except OSError as error:
        what = " ".join((error.strerror or str(error)).split())
        raise UserError(f"{path} can't be read: {what}; check the file and its permissions") from error
    else:
        if isinstance(last.value, Malformed) and not readable:
            raise UserError(f"nothing of {path} can be read: {last.value.reason}; give {_KINDS}")


def _parse(value: Any, parse: Callable[[dict[str, Any]], Parsed], max_text_bytes: int) -> Parsed:
    """One raw object as prompt and reply; raises BadRecord with the reason why not."""
    if isinstance(value, Malformed):
        raise BadRecord(value.reason)
    if not isinstance(value, dict):
        raise BadRecord(f"the JSON value is {kind(value)}, not an object")
    parsed = parse(value)
    prompt_size = sum(_checked_size(message["content"], "prompt") for message in parsed.prompt)
    for what, size in (("prompt", prompt_size), ("reply", _checked_size(parsed.reply, "reply"))):
        if size > max_text_bytes:
            raise BadRecord(f"{what} of {size} bytes, over the limit of {max_text_bytes} (max_text_bytes)")
    if parsed.source_category is not None:
        _checked_size(parsed.source_category, "category")
    return parsed


def _checked_size(text: str, what: str) -> int:
    """The size of a text in UTF-8; raises BadRecord for one that is empty or that no UTF-8 file can hold."""
    if not text or text.isspace():
        raise BadRecord(f"empty {what}")
    if "\0" in text:
        raise BadRecord(f"NUL character in the {what}")
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # Where a stream was not UTF-8, its bytes have become these (PEP 383).
        cause = "not UTF-8, or a lone surrogate" if 0xDC80 <= code <= 0xDCFF else "lone surrogate"
        raise BadRecord(f"{cause} U+{code:04X} at character {error.start + 1} of the {what}") from error
