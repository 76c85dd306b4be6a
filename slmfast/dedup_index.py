"""DedupIndex: deduplication in parts, against all that was kept before.

A new row is joined with the stored fingerprints, which lie in the mapped file; only of those within k is the text
looked at. An add costs a pass over the stored fingerprints, the work on the new texts, and a look at the stored texts
that these are compared with. It writes the new rows only, but for one add in a thousand or so, which first writes the
whole file anew.
"""

import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from slmfast import _native
from slmfast.arrow_texts import native_texts, text_column
from slmfast.index_file import IndexFile
from slmfast.index_format import Columns
from slmfast.near_duplicates import DedupResult, Fingerprints, dedup, fingerprint_column, whole_number

_ROWS_PER_PIECE = 1 << 14  # rows whose normalised texts are held at a time


class DedupIndex:
    """A persistent, append-only index of kept texts.

    Adding texts in parts keeps the same rows, with the same stand-ins, as `dedup` of all of them in one call: only
    kept rows ever stand for others, so only they are stored. The file is memory-mapped; an add takes memory in
    proportion to the rows added. What another DedupIndex or process adds to the file is seen by the next add; only one
    writes at a time.

    Args:
        path: the index file; the first `add` makes it. Its folder must exist.
        k, verify, ngram: as for slmfast.dedup; an existing file must have been made with the same.

    Raises:
        UserError: the file is damaged, no index, of another version, or made with other settings.
    """

    def __init__(self, path: str | os.PathLike[str], k: int = 3, *, verify: float | None = 0.8, ngram: int = 3) -> None:
        self.path = Path(path)
        dedup([], k=k, verify=verify, ngram=ngram)  # refuses settings out of range before anything is stored under them
        number = None if verify is None else float(verify)  # numpy's numbers are none to JSON
        self._dedup: dict[str, Any] = {"k": operator.index(k), "verify": number, "ngram": operator.index(ngram)}
        self._file = IndexFile(self.path, {**self._dedup, "fingerprints": _native.FORMAT_VERSION})

    def __len__(self) -> int:
        """How many rows are kept that may stand for others (nulls and empty texts never do)."""
        return len(self._file)

    def add(self, texts: Any, ids: Any, *, threads: int = 0) -> DedupResult:
        """Deduplicates texts against the index and one another, and stores those that are kept.

        Args:
            texts: as for slmfast.dedup.
            ids: n different integers of 64 bits, by which later calls name these rows. None may be a stored row's;
                those of nulls, empty texts and duplicates are not stored, so they may come again.
            threads: 0 uses every core that the process may run on.

        Returns:
            A DedupResult whose duplicate_of holds ids: that of the stand-in, new or old; the row's own where kept.

        Raises:
            TypeError, ValueError: as slmfast.dedup, or the ids are not n different integers, or one is a stored row's.
            UserError: the file can't be written, was damaged, or somebody else is writing to it; nothing is added.
        """
        threads = whole_number("threads", threads)
        column = text_column(texts)
        new_ids = _checked_ids(ids, len(column))
        added = _Added(native_texts(column), fingerprint_column(column, self._dedup["ngram"], threads), threads)
        if not added.storable.any():  # nothing that could be stored, so not even a file is needed
            self._file.refresh()
            self._refuse_known(new_ids, threads)
            return DedupResult(np.ones(len(new_ids), bool), new_ids, np.zeros(len(new_ids), np.uint8))
        with self._file.writing() as append:
            self._refuse_known(new_ids, threads)
            places, distance = self._cluster(added)
            keep = places == np.arange(len(places))
            rows = np.flatnonzero(keep & added.storable)
            result = DedupResult(keep, self._ids_of(places, new_ids), distance)
            if len(rows):
                append(added.columns(rows, new_ids))
        return result

    def _cluster(self, added: "_Added") -> tuple[np.ndarray, np.ndarray]:
        """For each new row the place among them of its stand-in, or -1 - p for place p of the index; the distance."""
        found = added.found
        return _native.cluster_against(
            [(segment.fingerprints, segment.states, segment.texts) for segment in self._file.segments],
            added.texts,
            native_texts(found.replaced),
            found.replaced_rows,
            found.values,
            found.states,
            **self._dedup,
            threads=added.threads,
        )

    def _ids_of(self, places: np.ndarray, new_ids: np.ndarray) -> np.ndarray:
        ids = new_ids[np.maximum(places, 0)]
        old = np.flatnonzero(places < 0)
        stored = -1 - places[old]
        begins = np.cumsum([0, *(len(segment) for segment in self._file.segments)])
        holders = np.searchsorted(begins, stored, side="right") - 1
        for number in np.unique(holders):
            of_this = holders == number
            ids[old[of_this]] = self._file.segments[number].ids[stored[of_this] - begins[number]]
        return ids

    def _refuse_known(self, new_ids: np.ndarray, threads: int) -> None:
        ascending = new_ids if _ascend(new_ids) else np.sort(new_ids)
        for segment in self._file.segments:
            first = np.searchsorted(ascending, segment.lowest, side="left")
            last = np.searchsorted(ascending, segment.highest, side="right")  # highest + 1 may not fit int64
            inside = ascending[first:last]
            found = _native.common_id(inside, segment.ids, threads) if len(inside) else -1
            if found >= 0:
                raise ValueError(f"id {inside[found]} is in the index already: give each row an id of its own")


class _Added:
    """The new texts with what was found out about them."""

    def __init__(self, texts: _native.Texts, found: Fingerprints, threads: int) -> None:
        self.texts = texts
        self.found = found
        self.threads = threads
        self.storable = found.states >= _native.FEW  # neither null nor empty

    def columns(self, rows: np.ndarray, ids: np.ndarray) -> Columns:
        """The given rows (int64, ascending) as they are stored."""

        def pieces(values: np.ndarray) -> Iterator[np.ndarray]:
            return (values[some] for some in _pieces(rows))

        found = self.found
        return Columns(len(rows), pieces(ids), pieces(found.values), pieces(found.states), self._normalised(rows))

    def _normalised(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        found = self.found
        for some in _pieces(rows):
            first, last = np.searchsorted(found.replaced_rows, (some[0], some[-1] + 1))
            replaced = native_texts(found.replaced.slice(first, last - first))
            yield _native.normalised(self.texts, replaced, found.replaced_rows[first:last], some, self.threads)


def _pieces(rows: np.ndarray) -> Iterator[np.ndarray]:
    for begin in range(0, len(rows), _ROWS_PER_PIECE):
        yield rows[begin : begin + _ROWS_PER_PIECE]


def _checked_ids(ids: Any, count: int) -> np.ndarray:
    """The ids as int64, once they are known to be one a text, integers, and different."""
    values = np.asarray(ids)
    if values.ndim != 1 or len(values) != count:
        raise ValueError(f"ids must be one for each of the {count} texts, not of shape {values.shape}")
    if count and values.dtype.kind not in "iu":
        raise TypeError(f"ids must be integers, not {values.dtype}: number the rows")
    if values.dtype == np.uint64 and count and values.max() > np.iinfo(np.int64).max:
        raise ValueError(f"id {values.max()} does not fit 64 bits with a sign: use smaller ids")
    values = np.ascontiguousarray(values, np.int64)
    if not _ascend(values):
        ordered = np.sort(values)
        twice = np.flatnonzero(ordered[1:] == ordered[:-1])
        if len(twice):
            raise ValueError(f"id {ordered[twice[0]]} is given twice: give each row an id of its own")
    return values


def _ascend(values: np.ndarray) -> bool:
    return bool(np.all(values[1:] > values[:-1]))
