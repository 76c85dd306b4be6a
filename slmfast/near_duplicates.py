"""Near-duplicates of texts: SimHash fingerprints, the pairs within a Hamming distance, and who stands for whom.

The work is done by the native module; the fingerprints' frozen format is written down in csrc/simhash.hpp, the join
in csrc/hamming_join.hpp, the choice of representatives in csrc/clusters.hpp. Results are the same on any number of
threads and any instruction set. The environment variable SLMFAST_ISA (scalar, avx2, avx512) forces the latter.

Source: SimHash for near-duplicates is Charikar (2002) and Manku, Jain and Das Sarma (2007); 64 bits and k = 3 are the
latter's and the pipeline's paper's.
"""

import operator
import os
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slmfast import _native
from slmfast.arrow_texts import native_texts, normalised_rows, text_column
from slmfast.errors import UserError
from slmfast.index_file import SCHEMA, read_index, read_stamp, write_index

MODES = ("representative", "components")


@dataclass(frozen=True, eq=False)
class DedupResult:
    """Which rows stay and which stand for the others; one value a row, in input order."""

    keep: np.ndarray
    """bool[n]: whether the row stays."""
    duplicate_of: np.ndarray
    """int64[n]: the row that stands for it; the row itself where it is kept."""
    distance: np.ndarray
    """uint8[n]: the Hamming distance to that row's fingerprint; 0 where kept."""

    @property
    def n_kept(self) -> int:
        """How many rows stay."""
        return int(np.count_nonzero(self.keep))


def simhash(texts: Any, *, ngram: int = 3, threads: int = 0) -> np.ndarray:
    """SimHash fingerprints over character n-grams of the NFKC-normalised, lower-case texts.

    Args:
        texts: see slmfast.dedup.
        ngram: code points in a gram, 1 to 9. Shorter texts are one gram.
        threads: 0 uses every core that the process may run on.

    Returns:
        uint64[n]. Nulls and empty texts get 0, which says nothing about likeness: dedup leaves them alone.

    Raises:
        TypeError, ValueError: as slmfast.dedup.
    """
    ngram, threads = _whole("ngram", ngram), _whole("threads", threads)
    return _fingerprints(text_column(texts), ngram, threads).values


def near_pairs(fingerprints: Any, k: int = 3, *, threads: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of fingerprints within Hamming distance k. Exact.

    Args:
        fingerprints: uint64[n], n < 2^32 - 1.
        k: 0 to 8.
        threads: 0 uses every core that the process may run on.

    Returns:
        (i int64[m], j int64[m], distance uint8[m]): each pair once, i < j, sorted by i and then j. Equal fingerprints
        give all their pairs, so m is quadratic in the size of such a group; dedup never holds these.

    Raises:
        TypeError: the fingerprints are not uint64, or a setting is no whole number.
        ValueError: they are not one-dimensional, or k or threads is out of range.
    """
    values = np.asarray(fingerprints)
    if values.dtype != np.uint64 and values.size:
        raise TypeError(f"fingerprints must be uint64, not {values.dtype}: pass what slmfast.simhash gives")
    k, threads = _whole("k", k), _whole("threads", threads)
    return _native.near_pairs(np.asarray(values, dtype=np.uint64, order="C"), k, threads)


def dedup(
    texts: Any,
    *,
    k: int = 3,
    mode: str = "representative",
    verify: float | None = 0.8,
    ngram: int = 3,
    threads: int = 0,
) -> DedupResult:
    """Finds near-duplicates and the row that stands for each.

    Rows are in order of priority. A null or an empty text is never a duplicate; a text of fewer than 4 different grams
    is one only of a row with equal normalised text.

    Args:
        texts: n rows, as anything with the Arrow PyCapsule interface (pyarrow, polars, pandas), a column of
            `datasets`, or a list of str and None. Arrow strings are read in place.
        k: greatest Hamming distance of two fingerprints, 0 to 8.
        mode: "representative": a row goes when an earlier kept row lies within k and verifies, and the earliest such
            row stands for it; chains do not merge. "components": rows that any chain of such pairs connects become
            one, for which the earliest stands; its distance may then exceed k.
        verify: least Jaccard similarity, 0 to 1, of the two rows' sets of normalised grams. None is plain SimHash.
        ngram: code points in a gram, 1 to 9.
        threads: 0 uses every core that the process may run on.

    Returns:
        A DedupResult of n rows.

    Raises:
        TypeError: texts is not a column of strings, or a setting is no number.
        ValueError: a row is not valid Unicode (the message names it), or a setting is out of range.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be {' or '.join(MODES)}, not {mode!r}")
    k, ngram, threads = _whole("k", k), _whole("ngram", ngram), _whole("threads", threads)
    if verify is not None and not isinstance(verify, Real):
        raise TypeError(f"verify must be None or a number between 0 and 1, not {verify!r}")
    column = text_column(texts)
    found = _fingerprints(column, ngram, threads)
    duplicate_of, distance = _native.cluster(
        native_texts(column),
        native_texts(found.replaced),
        found.replaced_rows,
        found.values,
        found.states,
        k=k,
        components=mode == "components",
        verify=verify,
        ngram=ngram,
        threads=threads,
    )
    return DedupResult(duplicate_of == np.arange(len(duplicate_of)), duplicate_of, distance)


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, not {value!r}") from None


@dataclass(frozen=True)
class _Fingerprints:
    values: np.ndarray  # uint64[n]
    states: np.ndarray  # uint8[n], the native RowState
    replaced_rows: np.ndarray  # int64: the rows that Python normalised
    replaced: pa.ChunkedArray  # their normalised texts


def _fingerprints(column: pa.ChunkedArray, ngram: int, threads: int) -> _Fingerprints:
    values, states = _native.fingerprints(native_texts(column), normalised=False, ngram=ngram, threads=threads)
    rows = np.flatnonzero(states == _native.FOREIGN)
    replaced = normalised_rows(column, rows)
    values[rows], states[rows] = _native.fingerprints(
        native_texts(replaced), normalised=True, ngram=ngram, threads=threads
    )
    return _Fingerprints(values, states, rows, replaced)


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
        dedup([], k=k, verify=verify, ngram=ngram)  # refuses settings out of range before anything is stored under them
        number = None if verify is None else float(verify)  # numpy's numbers are none to JSON
        self._dedup: dict[str, Any] = {"k": operator.index(k), "verify": number, "ngram": operator.index(ngram)}
        self._settings = {**self._dedup, "fingerprints": _native.FORMAT_VERSION}
        self._kept = SCHEMA.empty_table()
        self._stamp: bytes | None = None  # what tells the file that was read or written last from any other
        self._refresh()

    def __len__(self) -> int:
        """How many rows are kept that may stand for others (nulls and empty texts never do)."""
        return self._kept.num_rows

    def _refresh(self) -> None:
        """Reads the file again where it is not the one that was read or written last."""
        stamp = read_stamp(self.path)
        if stamp is not None and stamp != self._stamp:
            self._kept, self._stamp = read_index(self.path, self._settings), stamp

    def add(self, texts: Any, ids: Any, *, threads: int = 0) -> DedupResult:
        """Deduplicates texts against the index and one another, and stores those that are kept.

        Args:
            texts: as for slmfast.dedup.
            ids: n different integers, none of them in the index yet, by which later calls name these rows.

        Returns:
            A DedupResult whose duplicate_of holds ids: that of the stand-in, new or old; the row's own where kept.

        Raises:
            TypeError, ValueError: as slmfast.dedup, or the ids are not n new and different integers.
            UserError: somebody else wrote to the file meanwhile, or damaged it; nothing is added.
        """
        self._refresh()  # another DedupIndex may have added to the file
        column = _as_large(text_column(texts))
        new_ids = self._checked_ids(ids, len(column))
        earlier = self._kept.column("text")
        joined = pa.chunked_array([*earlier.chunks, *column.chunks], pa.large_string())
        whole = dedup(joined, **self._dedup, threads=threads)
        start = len(earlier)
        all_ids = np.concatenate([self._kept.column("id").to_numpy(), new_ids])
        result = DedupResult(whole.keep[start:], all_ids[whole.duplicate_of[start:]], whole.distance[start:])
        rows = np.flatnonzero(result.keep & ~_blank(column))
        if len(rows):
            texts_kept = normalised_rows(column, rows)
            added = pa.table([pa.chunked_array([new_ids[rows]]), texts_kept], schema=SCHEMA)
            kept = pa.concat_tables([self._kept, added])
            if read_stamp(self.path) not in (self._stamp, None):
                raise UserError(f"{self.path} was written to by another process meanwhile: add the same texts again")
            write_index(self.path, kept, self._settings)
            self._kept, self._stamp = kept, read_stamp(self.path)
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


def _as_large(column: pa.ChunkedArray) -> pa.ChunkedArray:
    # Fingerprints first, for their error that names the row; Arrow's cast would not look at the bytes.
    _native.fingerprints(native_texts(column), normalised=False, ngram=1, threads=1)
    return column.cast(pa.large_string())


def _blank(column: pa.ChunkedArray) -> np.ndarray:
    lengths = pc.fill_null(pc.binary_length(column), 0)
    return lengths.to_numpy() == 0
