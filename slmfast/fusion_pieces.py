"""The weighted average of models, a piece of a tensor at a time: read, averaged, hashed and written while in cache.

A piece's float64 sums lie in a cache, so an average costs little more than to read and write the bytes, and what is
held does not grow with the model. Pieces are of a fixed size: neither the bytes nor the hashes that come out
depend on the number of threads.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import local
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from slmfast.errors import UserError
from slmfast.model_folder import ModelWeights, write_header
from slmfast.store import digest

PIECE = 1 << 18  # elements: the float64 sums take 2 MiB, and smaller pieces cost more in Python than caches give


class Part(NamedTuple):
    """A model and its share of the average; all shares sum to 1."""

    weights: ModelWeights
    share: float


_Result = tuple[list[bytes], Tensor | None]  # of a piece: each part's hash, and the average if it is to be kept


class _Piece(NamedTuple):
    name: str
    start: int
    count: int


def write_average(
    parts: Sequence[Part],
    path: Path,
    kind: torch.dtype,
    watch: Callable[[str, int, Tensor], None] | None = None,
) -> list[str]:
    """Writes one safetensors file with the average of models that have the same tensors.

    Parts are added in the order of their paths, so that no order of the caller's changes a bit.

    Args:
        kind: the type that is written.
        watch: is given every piece in order: the tensor's name, the piece's first element, the average in float32.

    Returns:
        A hash of the tensors of each part: their names, shapes, types and values.

    Raises:
        UserError: a tensor holds values that have no average, or whose average is beyond the type's range.
    """
    first = parts[0].weights
    shapes = {name: first.shape(name) for name in first.names}
    places = write_header(path, {name: (kind, shape) for name, shape in shapes.items()})
    pieces = [piece for name, shape in shapes.items() for piece in _pieces(name, torch.Size(shape).numel())]
    with path.open("r+b", buffering=0) as file:
        averager = _Averager(parts, file.fileno(), places, kind, keep=watch is not None)
        hashers = [xxhash.xxh3_128() for _ in parts]
        for piece, (hashes, average) in zip(pieces, _in_order(averager.run, pieces), strict=True):
            for hasher, piece_hash in zip(hashers, hashes, strict=True):
                hasher.update(piece_hash)
            if watch is not None and average is not None:
                watch(piece.name, piece.start, average)
    return [_digest(part.weights, hasher.hexdigest()) for part, hasher in zip(parts, hashers, strict=True)]


def _pieces(name: str, count: int) -> Iterator[_Piece]:
    for start in range(0, count, PIECE):
        yield _Piece(name, start, min(PIECE, count - start))


def _digest(weights: ModelWeights, values: str) -> str:
    layout = [[name, list(weights.shape(name)), str(weights.dtype(name))] for name in weights.names]
    return digest([layout, values])


def _in_order(work: Callable[[_Piece], _Result], pieces: Sequence[_Piece]) -> Iterator[_Result]:
    """The results of all pieces in order, computed by as many threads as torch has; after an error none is begun."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        try:
            yield from pool.map(work, pieces)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Averager:
    """Averages pieces into their places in a file; one call a piece, from any thread."""

    def __init__(self, parts: Sequence[Part], file: int, places: dict[str, int], kind: torch.dtype, *, keep: bool):
        self._parts = parts
        self._order = sorted(range(len(parts)), key=lambda number: parts[number].weights.path)
        self._file, self._places, self._kind, self._keep = file, places, kind, keep
        self._local = local()

    def run(self, piece: _Piece) -> _Result:
        """Writes a piece's average; gives the hash of every part's values and, if it is to be kept, the average."""
        if not hasattr(self._local, "sums"):
            self._local.sums = np.empty(PIECE), np.empty(PIECE), np.empty(PIECE, dtype=np.float32)
        total, product, rounded = (buffer[: piece.count] for buffer in self._local.sums)
        hashes, begun = [b""] * len(self._parts), False
        for number in self._order:
            part = self._parts[number]
            values, hashes[number] = self._read(part.weights, piece)
            if part.share == 0:
                continue
            # The sum starts from the first product: from zero, a stored -0.0 would come out as 0.0.
            target = product if begun else total
            np.copyto(target, values)
            target *= part.share
            if begun:
                total += product
            begun = True
        with np.errstate(over="ignore"):
            np.copyto(rounded, total, casting="same_kind")
        average = torch.from_numpy(rounded)
        stored = average if self._kind == torch.float32 else average.to(self._kind)
        # numpy looks through a piece twenty times as fast as torch.
        if not (np.isfinite(rounded).all() if stored is average else stored.isfinite().all()):
            raise self._beyond(piece) if np.isfinite(total).all() else self._no_average(piece)
        self._write(piece, stored)
        return hashes, average.clone() if self._keep else None

    def _read(self, weights: ModelWeights, piece: _Piece) -> tuple[np.ndarray, bytes]:
        """A piece's values, in a type that numpy has and that holds them exactly, and their hash."""
        kind = weights.dtype(piece.name)
        if not kind.is_floating_point:
            raise self._no_average(piece, weights)
        buffers = self._local.__dict__.setdefault("buffers", {})
        if kind not in buffers:
            buffers[kind] = torch.empty(PIECE, dtype=kind)
        values = buffers[kind][: piece.count]
        weights.read_piece(piece.name, piece.start, values)
        hashed = xxhash.xxh3_128_digest(memoryview(values.view(torch.uint8).numpy()))
        return (values.float() if kind.itemsize < 4 else values).numpy(), hashed

    def _write(self, piece: _Piece, stored: Tensor) -> None:
        data = memoryview(stored.view(torch.uint8).numpy())
        place = self._places[piece.name] + piece.start * stored.element_size()
        while data:
            count = os.pwrite(self._file, data, place)
            data, place = data[count:], place + count

    def _beyond(self, piece: _Piece) -> UserError:
        return UserError(
            f"tensor {piece.name} has an average beyond the range of {self._kind}: fuse as float32 or bfloat16"
        )

    def _no_average(self, piece: _Piece, weights: ModelWeights | None = None) -> UserError:
        """The error that names the part whose values can't be averaged."""
        if weights is None:
            blamed = [p.weights for p in self._parts if p.share > 0 and not p.weights[piece.name].isfinite().all()]
            weights = blamed[0] if blamed else self._parts[0].weights
        return UserError(
            f"tensor {piece.name} of {weights.path} holds values that have no average: train the model again"
        )
