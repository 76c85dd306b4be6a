"""JSON lines and JSON arrays as streams of Arrow batches.

Arrow infers a column's type from one block of a file, and its own streaming reader holds on to what the first block
says. Here each block is inferred by itself and the types are brought together (slmfast.table_schema), so a column may
begin with a million nulls. What looks like a time stays the text that it is, and an integer that a column of floats
would round is refused. A line holds one whole object: Arrow would take more, or less, but only within a block.
"""

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pyarrow as pa
import pyarrow.json

from slmfast.errors import UserError
from slmfast.readers.json_stream import MAX_VALUE_BYTES, Broken, RawDecoder, read_array
from slmfast.table_schema import CommonSchema, columns_to_take, conform, holds_floats, with_leaves

BLOCK_BYTES = 4 << 20
MAX_DEPTH = 100  # of objects and lists in one another; of tens of thousands Arrow would crash

_BOM = b"\xef\xbb\xbf"
_LONG_INTEGER = re.compile(rb"(?:^|[\s:,\[])-?\d{16,}\s*(?:[,}\]\s]|$)")  # one that a float may not hold exactly
_ROW = re.compile(r" in row (\d+)$")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_NO_BRACKET = re.compile(rb"[^\[\]{}]")


class _Block(NamedTuple):
    """Some lines of a file. An array's elements are written out as lines and then called elements."""

    data: bytes
    first: int  # 1-based number of the first line or element
    unit: str = "line"

    def full_lines(self) -> list[int]:
        """The indices of the lines that are not blank."""
        return [index for index, line in enumerate(self.data.split(b"\n")) if line.strip()]


class JsonTable:
    """The rows of a JSON lines file, or of a file that holds one JSON array of objects; .gz and .zst too."""

    complete = False  # a row may lack any column, and so may a whole file

    def __init__(self, path: Path) -> None:
        self.path = path
        self._types = CommonSchema()  # of this file alone

    def texts(self, column: str) -> Iterator[tuple[pa.Schema, pa.Array]]:
        """The column's texts in blocks, each with the schema of the block. See table_files.TableFile."""
        names: dict[str, None] = {}
        found, empty = False, True
        for block in self._blocks():
            self._check_lines(block)
            table = self._parse(block, pa.schema([(column, pa.string())]), "infer")
            lines = len(block.full_lines())
            if len(table) != lines:  # where they agree, each line is one object: all begin and end with a brace
                self._refuse(block, None, f"{len(table)} objects on {lines} lines, not one on each", None)
            found = found or self._mentions(block, column, table)
            empty = False
            names |= dict.fromkeys(table.column_names)
            schema = pa.schema([(field.name, with_leaves(field.type, _without_times)) for field in table.schema])
            self._types.add(self.path, schema, complete=False)
            yield schema, table.column(column).combine_chunks()
        if not (found or empty):
            others = columns_to_take(name for name in names if name != column)
            raise UserError(f"{self.path} has no column {column}: {others}")

    def rows(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """All rows under a schema, in blocks. See table_files.TableFile."""
        own = self._types.result()
        floats = [field.name for field in own if holds_floats(field.type)]
        for block in self._blocks():
            table = self._parse(block, own, "error")
            if floats and _LONG_INTEGER.search(block.data):
                self._refuse_rounding(block, floats)
            for batch in table.combine_chunks().to_batches():
                yield conform(batch, schema, self.path)

    def _check_lines(self, block: _Block) -> None:
        try:
            block.data.decode()
        except UnicodeDecodeError as error:
            self._refuse(block, block.data.count(b"\n", 0, error.start), "not UTF-8", error)
        for index, line in enumerate(block.data.split(b"\n")):
            line = line.strip()
            if line and not (line.startswith(b"{") and line.endswith(b"}")):
                self._refuse(block, index, "not one whole object on this line", None)
            if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _depth(line) > MAX_DEPTH:
                self._refuse(block, index, f"lists and objects nested more than {MAX_DEPTH} deep", None)

    def _mentions(self, block: _Block, column: str, table: pa.Table) -> bool:
        """Whether a block has the column at all: nulls alone may also mean that no row names it."""
        if table.column(column).null_count < len(table):
            return True
        return column in self._parse(block, pa.schema([]), "infer").column_names

    def _parse(self, block: _Block, schema: pa.Schema, unexpected: str) -> pa.Table:
        try:
            return pyarrow.json.read_json(
                pa.BufferReader(block.data),
                read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(block.data) + 1),
                parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior=unexpected),
            )
        except pa.ArrowException as error:
            reason = " ".join(str(error).split()).removeprefix("JSON parse error: ")
            row = _ROW.search(reason)
            full = block.full_lines()
            index = full[int(row[1])] if row and int(row[1]) < len(full) else None
            self._refuse(block, index, _ROW.sub("", reason).rstrip("."), error)

    def _refuse(self, block: _Block, index: int | None, reason: str, cause: Exception | None) -> NoReturn:
        if index is None:
            where = f"in the {len(block.data):,} bytes from {block.unit} {block.first}"
        else:
            where = f"{block.unit} {block.first + index}"
        raise UserError(f"{self.path}, {where}: {reason}: mend it or take it out") from cause

    def _refuse_rounding(self, block: _Block, columns: list[str]) -> None:
        for index, line in enumerate(block.data.split(b"\n")):
            if _LONG_INTEGER.search(line):
                try:
                    row = json.loads(line, parse_int=Decimal)  # of any number of digits
                except ValueError as error:  # Arrow reads Inf
                    self._refuse(block, index, str(error), error)
                for name in columns:
                    if (number := _rounded(row.get(name))) is not None:
                        reason = f"column {name} holds floats, none of which is {number:.40}: write it as a string"
                        self._refuse(block, index, reason, None)

    def _blocks(self) -> Iterator[_Block]:
        try:
            with pa.input_stream(str(self.path)) as stream:
                head = stream.read(BLOCK_BYTES)
            with pa.input_stream(str(self.path)) as stream:
                if head.startswith(_BOM):
                    stream.read(len(_BOM))
                array = head.removeprefix(_BOM).lstrip().startswith(b"[")
                blocks = _elements(stream) if array else self._lines(stream)
                yield from (block for block in blocks if not block.data.isspace())
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self.path} can't be read: {' '.join(str(error).split())}: give a whole file") from error
        except Broken as error:
            raise UserError(f"{self.path}: {error}: mend it, or write one object a line") from error

    def _lines(self, stream: Any) -> Iterator[_Block]:
        rest, number = b"", 1
        while piece := stream.read(BLOCK_BYTES):
            cut = piece.rfind(b"\n") + 1
            if cut:
                block = _Block(rest + piece[:cut], number)
                rest, number = piece[cut:], number + block.data.count(b"\n")
                yield block
            else:
                rest += piece
                if len(rest) > MAX_VALUE_BYTES:
                    raise UserError(f"{self.path}, line {number}: over {MAX_VALUE_BYTES >> 20} MiB: cut it up")
        if rest:
            yield _Block(rest, number)


def _elements(stream: Any) -> Iterator[_Block]:
    lines: list[bytes] = []
    size, number = 0, 0
    for number, element in read_array(stream, decoder=RawDecoder()):
        if not element.startswith("{"):
            raise Broken(f"element {number} is no object")
        try:
            # A line end is never part of a value: within strings JSON writes it \\n.
            lines.append(element.replace("\n", " ").encode())
        except UnicodeEncodeError as error:
            raise Broken(f"element {number} is not UTF-8") from error
        size += len(lines[-1])
        if size >= BLOCK_BYTES:
            yield _Block(b"\n".join(lines), number - len(lines) + 1, "element")
            lines, size = [], 0
    if lines:
        yield _Block(b"\n".join(lines), number - len(lines) + 1, "element")


def _depth(line: bytes) -> int:
    """How many brackets and braces are open at once, at most."""
    brackets = _NO_BRACKET.sub(b"", _STRING.sub(b"", line))
    return max(accumulate(1 if bracket in b"[{" else -1 for bracket in brackets), default=0)


def _without_times(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_timestamp(kind) else kind


def _rounded(value: Any) -> str | None:
    """The first integer, each of which is a Decimal, inside a JSON value that no float equals."""
    if isinstance(value, Decimal):
        return str(value) if Decimal(float(value)) != value else None
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((number for item in inner if (number := _rounded(item)) is not None), None)
