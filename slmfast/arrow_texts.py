"""Text columns of every make, brought to Arrow, and Arrow handed to the native module without a copy."""

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from slmfast import _native

_LAYOUTS = {pa.string(): "string", pa.large_string(): "large_string", pa.string_view(): "string_view"}
_NORMALISE_ROUNDS = 8  # part of the frozen format; no known text needs more than three
_BATCH = 65_536


def text_column(texts: Any) -> pa.ChunkedArray:
    """Any column of texts as Arrow strings.

    Args:
        texts: anything with the Arrow PyCapsule interface (an array or a column of pyarrow, polars or pandas, or a
            table of one column), a column of `datasets`, or a list of str and None.

    Raises:
        TypeError: it is no column of texts; the message says what to pass instead.
        ValueError: a str of the list cannot be encoded; the message names its row.
    """
    column = _as_chunked(texts)
    if pa.types.is_struct(column.type):
        column = _only_field(column)
    if pa.types.is_dictionary(column.type):
        column = pa.chunked_array([_decoded(chunk) for chunk in column.chunks], _decoded_type(column.type))
    if pa.types.is_null(column.type):
        column = column.cast(pa.string())
    if column.type not in _LAYOUTS:
        raise TypeError(f"texts must be strings, not {column.type}: pass a string column, or cast it to one")
    return column


def _as_chunked(texts: Any) -> pa.ChunkedArray:
    if isinstance(texts, pa.ChunkedArray):
        return texts
    if isinstance(texts, pa.Array):
        return pa.chunked_array([texts])
    if hasattr(texts, "__arrow_c_stream__"):
        try:
            return pa.chunked_array(texts)
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # a pandas column of objects, not all of which are texts
            if not hasattr(texts, "tolist"):
                raise
            return pa.chunked_array([_from_list(texts.tolist())])
    if hasattr(texts, "__arrow_c_array__"):
        return pa.chunked_array([pa.array(texts)])
    if hasattr(texts, "column_name") and hasattr(getattr(texts, "source", None), "select_columns"):  # datasets
        if not hasattr(texts.source, "num_rows"):
            raise TypeError("texts is a column of a streamed dataset, which has no table: pass list(column)")
        table = texts.source.select_columns([texts.column_name]).with_format("arrow")[:]
        return table.column(texts.column_name)
    if isinstance(texts, (str, bytes)):
        raise TypeError("texts is one string: pass a list of them, or an Arrow column")
    if isinstance(texts, np.ndarray) and texts.ndim == 1 and texts.dtype.kind in "UO":
        texts = texts.tolist()
    if isinstance(texts, Sequence):
        return pa.chunked_array([_from_list(texts)])
    raise TypeError(f"texts is a {type(texts).__name__}: pass a list of str, or an Arrow column of strings")


def _decoded_type(type_: pa.DictionaryType) -> pa.DataType:
    # Not every version of Arrow can `take` from views.
    return pa.large_string() if type_.value_type == pa.string_view() else type_.value_type


def _decoded(chunk: pa.DictionaryArray) -> pa.Array:
    values = chunk.dictionary.cast(_decoded_type(chunk.type))
    return pa.DictionaryArray.from_arrays(chunk.indices, values).dictionary_decode()


def _from_list(texts: Sequence[str | None]) -> pa.Array:
    for row, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            raise TypeError(f"row {row} is a {type(text).__name__}: texts must be str or None")
    try:
        return pa.array(texts, pa.large_string())
    except UnicodeEncodeError as error:
        row = next(row for row, text in enumerate(texts) if text is not None and not _encodable(text))
        raise ValueError(f"row {row} holds a lone surrogate, which UTF-8 cannot encode: drop or repair it") from error


def _encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _only_field(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if column.type.num_fields != 1:
        names = ", ".join(field.name for field in column.type)
        raise TypeError(f"texts is a table of the columns {names}: pass one of them")
    chunks = [chunk.flatten()[0] for chunk in column.chunks]
    return pa.chunked_array(chunks, column.type.field(0).type)


def native_texts(column: pa.ChunkedArray) -> _native.Texts:
    """The native module's view of a column as text_column gives it; it reads Arrow's own memory and holds on to it."""
    layout = _LAYOUTS[column.type]
    chunks = []
    for chunk in column.chunks:
        validity, index, *data = chunk.buffers()
        if chunk.null_count == 0:
            validity = None
        if layout != "string_view" and not data:
            data = [None]
        chunks.append((layout, len(chunk), chunk.offset, validity, index, data))
    return _native.Texts(chunks)


def normalise(text: str) -> str:
    """The form in which texts are compared: NFKC and lower case, repeated until nothing changes (csrc/simhash.hpp)."""
    text = unicodedata.normalize("NFKC", text)
    for _ in range(_NORMALISE_ROUNDS):
        again = unicodedata.normalize("NFKC", text.lower())
        if again == text:
            break
        text = again
    return text


def normalised_rows(column: pa.ChunkedArray, rows: np.ndarray) -> pa.ChunkedArray:
    """The normalised texts of the given rows (int64, ascending, none of them null)."""
    batches = [
        pa.array([normalise(text) for text in texts], pa.large_string()) for texts in _batches_of_rows(column, rows)
    ]
    return pa.chunked_array(batches, pa.large_string())


def _batches_of_rows(column: pa.ChunkedArray, rows: np.ndarray) -> Iterator[list[str]]:
    start = 0
    for chunk in column.chunks:
        first, last = np.searchsorted(rows, (start, start + len(chunk)))
        for begin in range(first, last, _BATCH):
            places = rows[begin : min(begin + _BATCH, last)] - start
            if chunk.type == pa.string_view():  # not every version of Arrow can `take` from views
                yield [chunk[int(place)].as_py() for place in places]
            else:
                yield chunk.take(pa.array(places)).to_pylist()
        start += len(chunk)
