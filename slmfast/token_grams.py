"""Tokens of texts in any script, and hashes of their n-grams, by the million.

A token is a run of letters and digits where words are set apart by spaces, and a single character of Han or kana,
which are not. Case, width (NFKC), punctuation and spacing don't count. Texts are hashed as arrays of code points, so
that no token is ever a Python object; `tokens` gives the very same tokens as strings.

Source: 13-grams of words without punctuation are GPT-3's (Brown et al. 2020, appendix C); characters for Chinese are
what evaluations of Chinese models use. The hashes are polynomial ones over 64 bits (Karp and Rabin 1987).
"""

import functools
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

CHUNK_CHARACTERS = 1 << 16  # texts are hashed so many characters at a time; a longer text makes a chunk of its own

_APART, _ALONE, _WORD = 0, 1, 2  # what a character is: between tokens, a token by itself, part of a word
_COMPOSED = 4  # added where NFKC may join a character with others, or take it apart
_PLANES = 0x110000
_LETTERS = 0x20000  # above the first two planes there are only Han characters
_HAN = (0x20000, 0x3FFFF)
_COMPATIBLE = (0x2F800, 0x2FA1F)  # ... of which these are others' doubles
_CHARACTER_BASE = np.uint64(0x9E3779B97F4A7C15 | 1)
_TOKEN_BASE = np.uint64(0xD6E8FEB86659FD93 | 1)


class Tables(NamedTuple):
    """What every code point is, and the number that it is hashed as."""

    kinds: np.ndarray  # uint8 [code points]
    values: np.ndarray  # uint64 [code points], of the lower-case character of plain width


class Tokens(NamedTuple):
    """The tokens of some texts, in order."""

    hashes: np.ndarray  # uint64 [tokens]
    texts: np.ndarray  # int64 [tokens]: the text that each is of
    starts: np.ndarray  # int64 [texts + 1]: where each text's tokens begin


@functools.cache
def tables() -> Tables:
    """The tables, made once by a process from Python's Unicode data."""
    kinds = np.zeros(_PLANES, dtype=np.uint8)
    letters = np.arange(_PLANES, dtype=np.uint64)
    kinds[_HAN[0] : _HAN[1] + 1] = _ALONE
    kinds[_COMPATIBLE[0] : _COMPATIBLE[1] + 1] = _ALONE + _COMPOSED
    for code in range(_LETTERS):
        character = chr(code)
        plain = unicodedata.normalize("NFKC", character).lower()
        if len(plain) > 1 and not any(map(str.isalnum, plain)):
            # A space and a mark, as the acute accent that stands alone, is seen once its text has been normalised.
            kinds[code] = _COMPOSED if any(map(_is_mark, plain)) else _APART
            continue
        letters[code] = ord(plain[0])
        kinds[code] = _kind(plain[0])
        if len(plain) != 1 or _is_mark(plain) or 0x1100 <= code <= 0x11FF:
            kinds[code] += _COMPOSED
    return Tables(kinds, _mixed(letters))


def _kind(character: str) -> int:
    if not character.isalnum() and not _is_mark(character):
        return _APART
    name = unicodedata.name(character, "")
    return _ALONE if name.startswith(("CJK UNIFIED", "CJK COMPAT", "HIRAGANA LETTER", "KATAKANA LETTER")) else _WORD


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def _mixed(values: np.ndarray) -> np.ndarray:
    """Numbers spread over all 64 bits, one to one (the finalizer of SplitMix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def tokens(text: str) -> list[str]:
    """The tokens of one text as strings, lower case and of plain width."""
    found, word = [], ""
    for character in unicodedata.normalize("NFKC", text):
        plain = unicodedata.normalize("NFKC", character).lower()[:1]
        kind = tables().kinds[ord(character)] % _COMPOSED
        if kind == _WORD:
            word += plain
            continue
        if word:
            found.append(word)
            word = ""
        if kind == _ALONE:
            found.append(plain)
    return [*found, word] if word else found


def hash_tokens(texts: Sequence[str]) -> Tokens:
    """The tokens of all texts, hashed. Equal tokens have equal hashes; different ones practically never do."""
    codes, bounds = _codes(texts)
    kinds = tables().kinds[codes]
    composed = np.flatnonzero(kinds >= _COMPOSED)
    if len(composed):  # few texts have such characters, and only these are looked at as texts
        texts = list(texts)
        for text in np.unique(np.searchsorted(bounds, composed, side="right") - 1).tolist():
            texts[text] = unicodedata.normalize("NFKC", texts[text])
        codes, bounds = _codes(texts)
        kinds = tables().kinds[codes] % _COMPOSED
    word, alone = kinds == _WORD, kinds == _ALONE
    begins, ends = alone.copy(), alone.copy()
    begins[1:] |= word[1:] & ~word[:-1]
    begins[:1] |= word[:1]
    ends[:-1] |= word[:-1] & ~word[1:]
    first, last = np.flatnonzero(begins), np.flatnonzero(ends) + 1
    hashes = _mixed(_span_hashes(tables().values[codes], first, last, _CHARACTER_BASE))
    starts = np.searchsorted(first, bounds)
    return Tokens(hashes, np.repeat(np.arange(len(texts)), np.diff(starts)), starts)


def _codes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The code points of all texts, a line break after each, and where each begins."""
    codes = np.frombuffer("\n".join([*texts, ""]).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    return codes, np.cumsum([0, *(len(text) + 1 for text in texts)])


def _span_hashes(values: np.ndarray, first: np.ndarray, last: np.ndarray, base: np.uint64) -> np.ndarray:
    """Polynomial hashes, mod 2^64, of the values from each `first` to before its `last`."""
    powers, inverses = _powers(base, _room(len(values)))
    sums = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(values * powers[: len(values)], out=sums[1:])
    return (sums[last] - sums[first]) * inverses[first]


def _room(size: int) -> int:
    """The length of the table of powers that serves `size` values: a few sizes, so that few tables are made."""
    return max(CHUNK_CHARACTERS, 1 << max(size, 1).bit_length())


@functools.lru_cache(maxsize=4)
def _powers(base: np.uint64, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The powers of an odd number mod 2^64, and of its inverse."""
    inverse = np.uint64(pow(int(base), -1, 1 << 64))
    tables = []
    for factor in (base, inverse):
        powers = np.full(size, factor, dtype=np.uint64)
        powers[0] = 1
        tables.append(np.cumprod(powers))
    return tables[0], tables[1]


def gram_hashes(found: Tokens, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(hashes uint64 [grams], number of its first token int64 [grams]) of all n-grams that lie within one text."""
    if len(found.hashes) < n:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    hashes, width = found.hashes, 1
    for bit in bin(n)[3:]:  # doubles the window, and adds a token where the next bit of n is set
        power = np.uint64(pow(int(_TOKEN_BASE), width, 1 << 64))
        hashes, width = hashes[:-width] * power + hashes[width:], 2 * width
        if bit == "1":
            hashes, width = hashes[:-1] * _TOKEN_BASE + found.hashes[width:], width + 1
    places = np.flatnonzero(found.texts[: len(hashes)] == found.texts[n - 1 :])
    return _mixed(hashes[places]), places


def text_hashes(found: Tokens) -> np.ndarray:
    """One hash for all tokens of each text, uint64 [texts]; texts without tokens all have the same."""
    return _mixed(_span_hashes(found.hashes, found.starts[:-1], found.starts[1:], _TOKEN_BASE))


def chunks(texts: Iterable[str], characters: int = CHUNK_CHARACTERS) -> Iterable[list[str]]:
    """Texts in runs of about so many characters."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        if chunk and size + len(text) > characters:
            yield chunk
            chunk, size = [], 0
        chunk.append(text)
        size += len(text) + 1
    if chunk:
        yield chunk
