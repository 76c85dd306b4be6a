"""Arrow chunks for the fuzzer: whole ones in every layout, damaged ones, and a careful reader of both.

A chunk is the tuple that slmfast._native.Texts takes: (layout, length, offset, validity or None, offsets or views,
[data buffers]). Every buffer is a numpy array of exactly its size, so that a sanitizer sees the first byte too far.
"""

import random
import struct
from collections.abc import Callable, Sequence

import numpy as np

LAYOUTS = ("string", "large_string", "string_view")
WILD_INTEGERS = [0, 1, -1, 7, 13, 255, 2**15, 2**31 - 1, -(2**31), 2**31, 2**40, 2**40 + 1, 2**62, 2**63 - 1, -(2**63)]
BAD_UTF8 = [
    *(b"\x80", b"\xbf\xbf", b"\xc0\x80", b"\xc1\xbf", b"\xc2", b"\xc2\x41", b"\xdf\xc0"),  # lone, overlong, cut off
    *(b"\xe0\x80\x80", b"\xe0\x9f\xbf", b"\xe4\xb8", b"\xe4\x41\xad", b"\xed\xa0\x80", b"\xed\xbf\xbf"),  # surrogates
    *(b"\xf0\x80\x80\x80", b"\xf0\x8f\xbf\xbf", b"\xf0\x9f\x98", b"\xf4\x90\x80\x80"),  # past U+10FFFF
    *(b"\xf5\x80\x80\x80", b"\xf8\x88\x80\x80\x80", b"\xfc\x84\x80\x80\x80\x80", b"\xfe", b"\xff", b"\xef\xbf"),
]


def utf8(rng: random.Random, text: Callable[[], str]) -> bytes:
    """Bytes around what UTF-8 allows: a text with a wound, random bytes, or a whole text."""
    data = bytearray(text().encode())
    kind = rng.randrange(6)
    place = rng.randrange(len(data) + 1)
    if kind == 0:
        data[place:place] = rng.choice(BAD_UTF8)
    elif kind == 1 and place < len(data):
        data[place] = rng.randrange(256)
    elif kind == 2:
        del data[place:]
    elif kind == 3:
        data = bytearray(rng.randbytes(rng.randrange(70)))
    elif kind == 4 and place < len(data):
        del data[place]
    return bytes(data)


def buffer(data: bytes) -> np.ndarray:
    """The bytes in an allocation of exactly their size."""
    return np.frombuffer(data, np.uint8).copy()


def whole_chunk(rng: random.Random, texts: Sequence[bytes | None]) -> tuple:
    """A valid chunk of these texts, in a layout drawn by chance, perhaps behind other rows that its offset skips."""
    layout = rng.choice(LAYOUTS)
    skipped = rng.choice([0, 0, 1, 9])
    rows = [b"before"] * skipped + list(texts)
    bits = np.array([text is not None for text in rows], dtype=bool)
    validity = None if bits.all() and rng.random() < 0.7 else np.packbits(bits, bitorder="little")
    texts = [text or b"" for text in rows]
    if layout == "string_view":
        index, data = _views(rng, texts)
    else:
        ends = np.cumsum([0, *map(len, texts)], dtype=np.int32 if layout == "string" else np.int64)
        index, data = ends, [buffer(b"".join(texts))]
    return (layout, len(rows) - skipped, skipped, validity, index, data)


def _views(rng: random.Random, texts: Sequence[bytes]) -> tuple[np.ndarray, list[np.ndarray | None]]:
    data = [bytearray(), bytearray(b"unused")]
    views = bytearray()
    for text in texts:
        if len(text) <= 12:
            views += struct.pack("<i12s", len(text), text)
            continue
        number = rng.randrange(2)
        views += struct.pack("<i4sii", len(text), text[:4], number, len(data[number]))
        data[number] += text
    return buffer(bytes(views)), [buffer(bytes(part)) for part in data]


def damage(rng: random.Random, chunk: tuple) -> tuple:
    """The chunk with one to three things wrong, or, now and then, none that matters."""
    fields = list(chunk)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if len(fields) == 6:
            rng.choice([_damage_numbers, _damage_index, _damage_buffers, _damage_kind])(rng, fields)
    return tuple(fields)


def _damage_numbers(rng: random.Random, fields: list) -> None:
    place = rng.choice([1, 2])
    fields[place] = rng.choice([*WILD_INTEGERS, len(fields) + 1, 2**63, 2.5, None])
    if rng.random() < 0.3:
        fields[1], fields[2] = rng.randrange(-2, 12), rng.randrange(-2, 12)


def _damage_index(rng: random.Random, fields: list) -> None:
    index = fields[4]
    if not isinstance(index, np.ndarray):
        return
    numbers = index.copy()
    if fields[0] == "string_view":  # a view is four int32: length, prefix, buffer, offset
        numbers = numbers[: numbers.nbytes // 4 * 4].view(np.int32)
    if not numbers.size:
        return
    place = rng.randrange(numbers.size)
    if rng.random() < 0.5:
        value = rng.choice(WILD_INTEGERS)
    else:
        value = int(numbers[place]) + rng.choice([-20, -1, 1, 2, 20, 13])
    info = np.iinfo(numbers.dtype)
    numbers[place] = min(max(value, info.min), info.max)
    fields[4] = numbers


def _damage_buffers(rng: random.Random, fields: list) -> None:
    which = rng.choice([3, 4, 5])
    if which == 5:
        data = fields[5] or []
        part = rng.randrange(len(data)) if data else 0
        shorter = [None if rng.random() < 0.2 else d[: rng.randrange(d.size + 1)].copy() for d in data if d is not None]
        fields[5] = rng.choice([[], data[:part], [*data, None], [None], shorter, [*data, *data], None, data[::-1]])
        return
    old = fields[which]
    if isinstance(old, np.ndarray) and rng.random() < 0.7:
        fields[which] = rng.choice([old[: rng.randrange(old.size + 1)].copy(), old[::2], old[::-1]])
    else:
        fields[which] = rng.choice([None, b"", b"\0" * 40, np.float64(1), "text", 7])


def _damage_kind(rng: random.Random, fields: list) -> None:
    if rng.random() < 0.7:
        fields[0] = rng.choice([*LAYOUTS, *LAYOUTS, "binary", "", None, 3, "字"])
    else:
        del fields[rng.randrange(len(fields)) :]


def read_slowly(chunk: tuple) -> list[bytes | None]:
    """The texts of a chunk, or IndexError where one lies outside its buffers."""
    layout, length, offset, validity, index, data = chunk
    bits = None if validity is None else np.frombuffer(validity, np.uint8)
    raw = b"" if index is None else bytes(index)
    texts: list[bytes | None] = []
    for place in range(offset, offset + length):
        if bits is not None and not bits[place >> 3] >> (place & 7) & 1:
            texts.append(None)
        elif layout == "string_view":
            texts.append(_read_view(raw[place * 16 : place * 16 + 16], data))
        else:
            form = "<2i" if layout == "string" else "<2q"
            begin, end = struct.unpack_from(form, raw, place * struct.calcsize(form) // 2)
            texts.append(_part(data[0], begin, end))
    return texts


def _read_view(view: bytes, data: list) -> bytes:
    length, _, number, begin = struct.unpack("<4i", view)
    if 0 <= length <= 12:
        return view[4 : 4 + length]
    if number < 0:
        raise IndexError(number)
    return _part(data[number], begin, begin + length)


def _part(data: np.ndarray | None, begin: int, end: int) -> bytes:
    whole = b"" if data is None else bytes(data)
    if not 0 <= begin <= end <= len(whole):
        raise IndexError(f"{begin} to {end} of {len(whole)}")
    return whole[begin:end]
