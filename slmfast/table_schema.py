"""One schema for the rows of many files: each column of a type that holds every file's values without loss."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa

from slmfast.errors import UserError


class CommonSchema:
    """Gathers the schemas of files, or of parts of them, in order."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[pa.DataType, Path]] = {}  # a column's type so far, and the file that it is from
        self._complete: dict[Path, set[str]] = {}
        self._latest: tuple[Path, pa.Schema] | None = None

    def add(self, path: Path, schema: pa.Schema, *, complete: bool) -> None:
        """Notes a schema found in a file. `complete`: the file has no more columns than these.

        Raises UserError where a column's types have nothing in common; the message names the file and the column.
        """
        if self._latest is not None and self._latest[0] == path and self._latest[1].equals(schema):
            return  # the blocks of a file are mostly alike
        self._latest = path, schema
        for field in schema:
            known, where = self._found.get(field.name, (field.type, path))
            common = common_type(known, field.type)
            if common is None:
                other = "another part of the file" if where == path else str(where)
                raise UserError(
                    f"{path}, column {field.name}: {field.type} here, but {known} in {other}: give it one type"
                )
            self._found[field.name] = common, where
        if complete:
            self._complete[path] = set(schema.names)

    def result(self) -> pa.Schema:
        """The common schema, columns in the order in which they were found.

        Raises UserError where a file lacks a column of the others, or a column holds nothing that Parquet can store.
        """
        for path, names in self._complete.items():
            for name, (_, where) in self._found.items():
                if name not in names:
                    raise UserError(f"{path} lacks the column {name} that {where} has: give files of the same columns")
        for name, (kind, where) in self._found.items():
            if _any_part(kind, lambda part: pa.types.is_struct(part) and part.num_fields == 0):
                raise UserError(f"{where}, column {name}: only empty objects, which Parquet can't store: leave it out")
        return pa.schema([(name, kind) for name, (kind, _) in self._found.items()])


def common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The narrowest type that both can be cast to, or None. The cast still has to be checked for each value."""
    if one == other:
        return one
    if _would_change(one, other):
        return None
    fields = [pa.schema([("", kind)]) for kind in (one, other)]
    try:
        return pa.unify_schemas(fields, promote_options="permissive").field(0).type
    except pa.ArrowTypeError:
        return None


def plain_schema(schema: pa.Schema, path: Path) -> pa.Schema:
    """A file's schema without metadata, dictionaries decoded and views laid out; what is lost are layouts, not values.

    Raises UserError where two columns have one name.
    """
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise UserError(f"{path} has two columns named {name!r}: give each a name of its own")
    return pa.schema([(field.name, with_leaves(field.type, _plain)) for field in schema])


def conform(batch: pa.RecordBatch, schema: pa.Schema, path: Path) -> pa.RecordBatch:
    """The rows of a batch under the common schema. Raises UserError for a value that would change."""
    columns = []
    for field in schema:
        present = field.name in batch.schema.names  # JSON rows may lack a column that other files have
        column = batch.column(field.name) if present else pa.nulls(len(batch), field.type)
        try:
            columns.append(column if column.type == field.type else column.cast(field.type))
        except pa.ArrowException as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}, column {field.name}: no {field.type} ({reason}): give it one type") from error
    return pa.record_batch(columns, schema=schema)


def holds_floats(kind: pa.DataType) -> bool:
    """Whether a type is, or has somewhere inside, a floating-point number."""
    return _any_part(kind, pa.types.is_floating)


def _any_part(kind: pa.DataType, test) -> bool:
    return test(kind) or any(_any_part(kind.field(i).type, test) for i in range(kind.num_fields))


def with_leaves(kind: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """A type of the same lists, objects and maps, with what they hold changed."""
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, with_leaves(field.type, change)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(with_leaves(kind.key_type, change), with_leaves(kind.item_type, change), kind.keys_sorted)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(with_leaves(kind.value_type, change), kind.list_size)
    if pa.types.is_list(kind):
        return pa.list_(with_leaves(kind.value_type, change))
    if pa.types.is_large_list(kind):
        return pa.large_list(with_leaves(kind.value_type, change))
    return change(kind)


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return with_leaves(kind.value_type, _plain)
    return {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}.get(kind, kind)


def _would_change(one: pa.DataType, other: pa.DataType) -> bool:
    """Whether Arrow's common type would round decimals, or call texts bytes, here or in parts of the same place."""
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        parts = {field.name: field.type for field in other}
        return any(_would_change(field.type, parts[field.name]) for field in one if field.name in parts)
    if one.num_fields and other.num_fields:  # lists and maps have one part, in which all else is
        return _would_change(one.field(0).type, other.field(0).type)
    tests = ((pa.types.is_decimal, pa.types.is_floating), (_is_text, _is_bytes))
    return any((is_a(one) and is_b(other)) or (is_b(one) and is_a(other)) for is_a, is_b in tests)


def _is_text(kind: pa.DataType) -> bool:
    return kind in (pa.string(), pa.large_string())


def _is_bytes(kind: pa.DataType) -> bool:
    return kind in (pa.binary(), pa.large_binary()) or pa.types.is_fixed_size_binary(kind)


def columns_to_take(names: Iterable[str]) -> str:
    """What to do instead of naming a column that isn't there."""
    known = ", ".join(names)
    return f"--column takes one of {known}" if known else "it has no column of texts, so leave the file out"
