"""Fingerprints against an independent implementation of the format that csrc/simhash.hpp writes down."""

import random
import sys
import unicodedata
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from slmfast import _native, simhash
from slmfast.arrow_texts import native_texts, normalise, text_column

MASK = 2**64 - 1
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJ,.;:!?0123456789\n\t\0",
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动，。！？：；（）「」……、",
    "ÀÉÎõüß½²³ªµ¸ΑΣΩας АБвг ½…‥․①⑩℃㎏ｱｲｳﾞｶﾞ가각ㄱ　"
    "ＡＢｃ１２＃İıǅﬁ e\u0301\u0327 a\u0308 \u00a0\u2003\u2011 😀👍🏽\u200d\ufe0f𠀀",
]
VECTORS = {  # frozen: format version 1, n = 3
    "": 0x0000000000000000,
    "a": 0x4F5DA978776A9DB1,
    "ab": 0x9FB3844FE632C73C,
    "ABC": 0x31BE0ED090436848,
    "abcd": 0xA0BA2EFA9022E828,
}


def reference_normal_form(text: str) -> str:
    text = unicodedata.normalize("NFKC", text)
    while (again := unicodedata.normalize("NFKC", text.lower())) != text:
        text = again
    return text


def reference_mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
    return z ^ z >> 31


def reference_fingerprint(text: str, n: int) -> int:
    points = [ord(character) for character in reference_normal_form(text)]
    width = min(n, len(points))
    votes = Counter(tuple(points[i : i + width]) for i in range(len(points) - width + 1) if points)
    ones = [0] * 64
    for gram, count in votes.items():
        digest = 0
        for j in range(0, width, 3):
            digest = reference_mix(digest ^ sum(c << 21 * place for place, c in enumerate(gram[j : j + 3])))
        for bit in range(64):
            ones[bit] += count * (digest >> bit & 1)
    total = votes.total()
    bits = [bit & 1 if 2 * ones[bit] == total else int(2 * ones[bit] > total) for bit in range(64)]
    return sum(value << bit for bit, value in enumerate(bits)) if total else 0


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        alphabet = "".join(rng.sample(ALPHABETS, rng.randint(1, 3)))
        texts.append("".join(rng.choices(alphabet, k=rng.choice([0, 1, 2, 3, 4, 5, 8, 30, 120, 600]))))
    return texts


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("ngram", [1, 2, 3, 4, 6, 9])
def test_equals_the_reference_on_every_instruction_set(isa, ngram, monkeypatch):
    monkeypatch.setenv("SLMFAST_ISA", isa)
    assert _native.active_isa() == isa
    texts = random_texts(250, seed=ngram)
    expected = [reference_fingerprint(text, ngram) for text in texts]
    assert simhash(texts, ngram=ngram).tolist() == expected


@pytest.mark.parametrize("isa", _native.available_isas())
def test_long_texts_do_not_overflow_the_byte_counters(isa, monkeypatch):
    monkeypatch.setenv("SLMFAST_ISA", isa)
    texts = ["a" * 255 + "b", "ab" * 300, "长文本" * 1000, "x" * 256, "x" * 257]
    assert simhash(texts).tolist() == [reference_fingerprint(text, 3) for text in texts]


def majority_of_every_beginning(hashes: np.ndarray) -> np.ndarray:
    """uint64[n]: the i-th is the majority (step 4 of the format) of hashes[: i + 1], with counts by numpy's cumsum."""
    bits = hashes[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)
    twice = 2 * np.cumsum(bits.astype(np.int64), axis=0)
    votes = np.arange(1, len(hashes) + 1)[:, None]
    odd = np.arange(64) % 2 == 1
    ones = np.where(twice == votes, odd, twice > votes)
    return np.packbits(ones, axis=1, bitorder="little").view("<u8").ravel()


VOTES = 2000
HIGHEST = "\U0010fffd\U0010fffc\U0002a6df"  # code points of 21 and 18 bits
MANY_VOTES = {
    "random": "".join(random.Random(3).choices("abcdefghij 的一是在不了有和", k=VOTES + 2)),
    "of all planes": "".join(random.Random(4).choices("ab的一" + HIGHEST, k=VOTES + 2)),
    "all equal": "x" * (VOTES + 2),
    "tied at every even number": "ab" * (VOTES // 2 + 1),
    "tied after a lead": "x" * 300 + "y" * (VOTES - 298),
}


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("ngram", [1, 2, 3])
@pytest.mark.parametrize("kind", MANY_VOTES)
def test_the_majority_of_every_number_of_votes(isa, ngram, kind, monkeypatch):
    monkeypatch.setenv("SLMFAST_ISA", isa)
    text = MANY_VOTES[kind]
    points = [ord(character) for character in text]
    grams = zip(*(points[place:] for place in range(ngram)), strict=False)
    packed = (sum(c << 21 * place for place, c in enumerate(gram)) for gram in grams)
    hashes = np.array([reference_mix(word) for word in packed], np.uint64)
    found = simhash([text[:length] for length in range(ngram, len(text) + 1)], ngram=ngram)
    assert np.array_equal(found, majority_of_every_beginning(hashes))


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("ngram", [1, 3, 5])
def test_a_text_of_under_four_distinct_grams_is_known_as_such(isa, ngram, monkeypatch):
    monkeypatch.setenv("SLMFAST_ISA", isa)
    rng = random.Random(ngram)
    texts = ["a" * 20 + "bcdefg"[:end] for end in range(7)] + ["abc" * 9, "abcd" * 9, "aabb" * 9]
    texts += ["".join(rng.choices("ab", k=rng.randint(1, 12))) for _ in range(400)]
    windows = [(text, min(ngram, len(text))) for text in texts]
    distinct = [len({text[i : i + width] for i in range(len(text) - width + 1)}) for text, width in windows]
    column = native_texts(text_column(texts))
    _, states = _native.fingerprints(column, normalised=False, ngram=ngram, threads=1)
    assert (states == _native.FEW).tolist() == [count < 4 for count in distinct]
    assert {3, 4} <= set(distinct) or ngram == 1


def test_frozen_vectors():
    assert _native.FORMAT_VERSION == 1
    assert simhash(list(VECTORS)).tolist() == list(VECTORS.values())


def test_same_bytes_on_any_number_of_threads():
    texts = random_texts(3000, seed=5)
    one = simhash(texts, threads=1)
    assert all(np.array_equal(one, simhash(texts, threads=threads)) for threads in (2, 7, 0))


def test_every_code_point_that_the_native_module_normalises_itself_agrees_with_unicodedata():
    handled = 0
    for point in (point for point in range(sys.maxunicode + 1) if not 0xD800 <= point <= 0xDFFF):
        character = chr(point)
        text = f"A{character}É{character}"  # between letters, at an end and after itself
        native = _native.normalise(text.encode())
        if native is not None:
            handled += 1
            assert native == reference_normal_form(text), f"U+{point:04X}"
    assert handled > 70_000  # CJK and Hangul alone


def test_handled_code_points_do_not_touch_their_neighbours():
    rng = random.Random(1)
    handled = [chr(p) for p in range(0x20, 0x30000) if not 0xD800 <= p <= 0xDFFF]
    handled = [c for c in handled if _native.normalise(c.encode()) is not None]
    rare = [c for c in handled if not "\u3400" <= c <= "\ud7a3" and c < "\U00020000"]
    for _ in range(3000):
        text = "".join(rng.choices(rare, k=40) + rng.choices(handled, k=10))
        assert _native.normalise(text.encode()) == reference_normal_form(text)


def test_python_normalisation_is_a_fixed_point():
    for text in random_texts(500, seed=9):
        assert normalise(text) == reference_normal_form(text) == normalise(normalise(text))


def test_null_and_empty_have_no_fingerprint():
    assert simhash(pa.array(["", None, "x"])).tolist()[:2] == [0, 0]
    assert len(simhash([])) == len(simhash(pa.array([], pa.string()))) == 0
    assert simhash(pa.nulls(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("setting", "message"), [({"ngram": 0}, "ngram"), ({"ngram": 10}, "ngram"), ({"threads": -1}, "threads")]
)
def test_settings_out_of_range_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        simhash(["text"], **setting)


def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("SLMFAST_ISA", "mmx")
    with pytest.raises(ValueError, match="SLMFAST_ISA=mmx"):
        simhash(["text"])
