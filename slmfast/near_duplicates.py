"""Near-duplicates of texts: SimHash fingerprints, the pairs within a Hamming distance, and who stands for whom.

The work is done by the native module; the fingerprints' frozen format is written down in csrc/simhash.hpp, the join
in csrc/hamming_join.hpp, the choice of representatives in csrc/clusters.hpp. Results are the same on any number of
threads and any instruction set. The environment variable SLMFAST_ISA (scalar, avx2, avx512) forces the latter.

Source: SimHash for near-duplicates is Charikar (2002) and Manku, Jain and Das Sarma (2007); 64 bits and k = 3 are the
latter's and the pipeline's paper's.
"""

import functools
import operator
import warnings
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from slmfast import _native
from slmfast.arrow_texts import native_texts, normalised_rows, text_column

MODES = ("representative", "components")
ALARM_ROWS = 10  # a cluster of more rows than this ...
ALARM_SHARE = 0.01  # ... and of more than this share of all rows is told to the user


class LargeClusterWarning(UserWarning):
    """One row stands for so many others that they are hardly all copies of it."""


class Cluster(NamedTuple):
    """A kept row and how many rows it stands for, itself included."""

    row: int
    size: int


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

    @functools.cached_property
    def largest_cluster(self) -> Cluster:
        """The first of the rows that stand for the most rows; Cluster(-1, 0) where there are no rows."""
        stand_ins = self.duplicate_of[~self.keep]
        if not len(stand_ins):
            return Cluster(int(self.duplicate_of[0]), 1) if len(self.keep) else Cluster(-1, 0)
        if 0 <= stand_ins.min() and stand_ins.max() < len(self.keep):
            copies = np.bincount(stand_ins)  # needs no sorting
            rows = None
        else:  # the ids of an index may be any integers
            rows, copies = np.unique(stand_ins, return_counts=True)
        most = int(copies.argmax())
        return Cluster(most if rows is None else int(rows[most]), int(copies[most]) + 1)

    def alarm(self, row_name: str | None = None) -> str | None:
        """One line for the user where a cluster takes more than 1 % of the rows, and more than 10; else None.

        `row_name` says what to call the row that stands for the others; unless given, it is called by its number.
        """
        row, size = self.largest_cluster
        rows = len(self.keep)
        if size <= max(ALARM_ROWS, ALARM_SHARE * rows):
            return None
        return (
            f"{row_name or f'row {row}'} stands for {size:,} of {rows:,} rows ({size / rows:.1%}): look at some of "
            "them; if they are no copies of one another, raise verify, lower k, or leave out what all texts share"
        )


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
    ngram, threads = whole_number("ngram", ngram), whole_number("threads", threads)
    return fingerprint_column(text_column(texts), ngram, threads).values


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
    k, threads = whole_number("k", k), whole_number("threads", threads)
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

    Warns:
        LargeClusterWarning: one row stands for more than 1 % of all rows, and more than 10.
    """
    result = find_duplicates(texts, k=k, mode=mode, verify=verify, ngram=ngram, threads=threads)
    if (alarm := result.alarm()) is not None:
        warnings.warn(alarm, LargeClusterWarning, stacklevel=2)
    return result


def find_duplicates(
    texts: Any,
    *,
    k: int = 3,
    mode: str = "representative",
    verify: float | None = 0.8,
    ngram: int = 3,
    threads: int = 0,
) -> DedupResult:
    """slmfast.dedup without its warning, for callers that tell the result's alarm in words of their own."""
    if mode not in MODES:
        raise ValueError(f"mode must be {' or '.join(MODES)}, not {mode!r}")
    k, ngram, threads = whole_number("k", k), whole_number("ngram", ngram), whole_number("threads", threads)
    if verify is not None and not isinstance(verify, Real):
        raise TypeError(f"verify must be None or a number between 0 and 1, not {verify!r}")
    column = text_column(texts)
    found = fingerprint_column(column, ngram, threads)
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


def __getattr__(name: str) -> Any:
    if name != "DedupIndex":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from slmfast.dedup_index import DedupIndex  # when asked for, because it imports this module

    return DedupIndex


def whole_number(name: str, value: Any) -> int:
    """A setting as an int of 32 bits, as the native module takes it; that one knows the exact range.

    Raises:
        TypeError, ValueError: it is no whole number, or does not fit; the message names it.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, not {value!r}") from None
    if not -(1 << 31) <= number < 1 << 31:
        raise ValueError(f"{name} must fit 32 bits, not {number}")
    return number


@dataclass(frozen=True)
class Fingerprints:
    """What the native module found out about each row of a column, with Python's help for rare characters."""

    values: np.ndarray  # uint64[n]
    states: np.ndarray  # uint8[n], the native RowState
    replaced_rows: np.ndarray  # int64: the rows that Python normalised
    replaced: pa.ChunkedArray  # their normalised texts


def fingerprint_column(column: pa.ChunkedArray, ngram: int, threads: int) -> Fingerprints:
    """Fingerprints and states of a column as text_column gives it. ValueError names a row that is not UTF-8."""
    values, states = _native.fingerprints(native_texts(column), normalised=False, ngram=ngram, threads=threads)
    rows = np.flatnonzero(states == _native.FOREIGN)
    replaced = normalised_rows(column, rows)
    values[rows], states[rows] = _native.fingerprints(
        native_texts(replaced), normalised=True, ngram=ngram, threads=threads
    )
    return Fingerprints(values, states, rows, replaced)
