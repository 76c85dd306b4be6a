"""JSON values decoded one by one from a binary stream, so that a file of any size takes little memory.

Three shapes are read: lines (one value a line), an array, and values one after another that span several lines. A bad
line costs only itself. Inside an array or a run of values nobody can say where the next value begins, so a break ends
the reading: `Broken` says where.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

MAX_VALUE_BYTES = 64 << 20  # a longer line or element can't be a record, and must not fill the memory
CHUNK_BYTES = 1 << 20

_SPACE = re.compile(r"[ \t\n\r]*")
# An error this near to the end of what has been read may only mean that the rest is still to come: the longest
# token that the decoder reports at its own beginning, other than a string, is "-Infinity".
_CUT_TOKEN = 12
_CUT_STRING = "Unterminated string"


class Malformed(NamedTuple):
    """Stands in for a raw object that could not be decoded."""

    reason: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Malformed:
    """A JSON object; one that has a key twice would lose a value without a word, so it is Malformed."""
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    keys = [key for key, _ in pairs]
    twice = next(key for i, key in enumerate(keys) if key in keys[:i])
    return Malformed(f"key {twice[:40]!r} stands twice in one object")


DECODER = json.JSONDecoder(object_pairs_hook=_object)


class Broken(Exception):
    """The rest of a file can't be read. The message says why and, where known, at which place."""


class Empty(Broken):
    """A file in which nothing stands."""


def read_lines(stream: BinaryIO, max_bytes: int = MAX_VALUE_BYTES) -> Iterator[tuple[int, Any]]:
    """Yields (1-based line number, value or Malformed) for each line that is not blank."""
    number = 0
    while line := stream.readline(max_bytes):
        number += 1
        if len(line) == max_bytes and not line.endswith(b"\n"):
            _skip_line(stream, max_bytes)
            yield number, Malformed(f"line of more than {max_bytes} bytes")
        elif not line.isspace():
            yield number, _decode_line(line)


def _fault(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" starting at")  # after which the decoder's own words have the place


def _skip_line(stream: BinaryIO, max_bytes: int) -> None:
    while (rest := stream.readline(max_bytes)) and not rest.endswith(b"\n"):
        pass


def _decode_line(line: bytes) -> Any:
    try:
        # Without its line end, after which a fault at the end of the line would stand in column 1.
        return DECODER.decode(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        return Malformed(f"not UTF-8 at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return Malformed(f"broken JSON at column {error.colno}: {_fault(error)}")
    except RecursionError:
        return Malformed("JSON nested too deep")
    except ValueError as error:  # a number of thousands of digits
        return Malformed(f"unreadable JSON: {error}")


class RawDecoder(json.JSONDecoder):
    """Gives each value as the text that it is."""

    def raw_decode(self, s: str, idx: int = 0) -> tuple[str, int]:
        """See json.JSONDecoder."""
        _, end = super().raw_decode(s, idx)
        return s[idx:end], end


def read_array(
    stream: BinaryIO, chunk_bytes: int = CHUNK_BYTES, decoder: json.JSONDecoder = DECODER
) -> Iterator[tuple[int, Any]]:
    """Yields (1-based number of the element, element) for each element of a JSON array.

    Bytes that are not UTF-8 become lone surrogates (U+DC80 to U+DCFF), so that they spoil no more than their element.
    Raises Broken where the JSON breaks or text follows the array.
    """
    buffer = _Buffer(stream, chunk_bytes, decoder)
    buffer.expect("[")
    number = 0
    if buffer.next_character() == "]":
        buffer.expect("]")
    else:
        while True:
            number += 1
            yield number, buffer.value()
            if buffer.next_character() != ",":
                break
            buffer.expect(",")
        buffer.expect("]")
    if buffer.next_character():
        raise Broken(f"text after the end of the JSON array, on line {buffer.line()}")


def read_values(stream: BinaryIO, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, Any]]:
    """Yields (1-based line of its beginning, value) for JSON values that follow each other, spread over lines."""
    buffer = _Buffer(stream, chunk_bytes)
    while buffer.next_character():
        line = buffer.line()
        yield line, buffer.value()


class _Buffer:
    """The part of a text stream that has been read and not yet consumed."""

    def __init__(self, stream: BinaryIO, chunk_bytes: int, decoder: json.JSONDecoder = DECODER) -> None:
        self._stream = stream
        self._decoder = decoder
        self._chunk_bytes = chunk_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        self._text = ""
        self._at = 0
        self._lines_before = 0  # line ends that have left the buffer
        self._ended = False

    def line(self, at: int | None = None) -> int:
        """The 1-based line of a place in the buffer, by default of the next character."""
        return self._lines_before + self._text.count("\n", 0, self._at if at is None else at) + 1

    def _read_more(self, size: int) -> None:
        data = self._stream.read(size)
        self._ended = not data
        self._lines_before += self._text.count("\n", 0, self._at)
        self._text = self._text[self._at :] + self._utf8.decode(data, final=self._ended)
        self._at = 0

    def next_character(self) -> str:
        """The next character that is not blank, not yet consumed; empty at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read_more(self._chunk_bytes)

    def expect(self, character: str) -> None:
        """Consumes one known character; raises Broken if another stands there."""
        found = self.next_character()
        if found != character:
            instead = repr(found) if found else "the end of the file"
            raise Broken(f"broken JSON on line {self.line()}: expected {character!r}, found {instead}")
        self._at += 1

    def value(self) -> Any:
        """Consumes one JSON value, reading on for as long as it may be incomplete; raises Broken if it is not one."""
        self.next_character()
        size = self._chunk_bytes
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended or not self._may_be_cut(error):
                    raise Broken(f"broken JSON on line {self.line(error.pos)}: {_fault(error)}") from error
            except (RecursionError, ValueError) as error:
                raise Broken(f"unreadable JSON on line {self.line()}: {error}") from error
            else:
                # Near the end of the buffer "12" may be the beginning of "12e5".
                cut = isinstance(value, int | float) and end >= len(self._text) - _CUT_TOKEN
                if not cut or self._ended:
                    self._at = end
                    return value
            if len(self._text) - self._at > MAX_VALUE_BYTES:
                raise Broken(f"element of more than {MAX_VALUE_BYTES} characters on line {self.line()}")
            self._read_more(size)
            size *= 2  # each retry decodes the element from its beginning: doubling keeps that linear

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith(_CUT_STRING) or error.pos >= len(self._text) - _CUT_TOKEN
