"""What the native module does for the index, against plain Python."""

import numpy as np
import pyarrow as pa
import pytest

from slmfast import _native
from slmfast.arrow_texts import native_texts, normalise
from slmfast.near_duplicates import fingerprint_column

MASK = 2**64 - 1


def mix(z):
    z = (z + 0x9E3779B97F4A7C15) & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def checksum(content, block=1 << 20):
    folded = 0
    for begin in range(0, len(content), block):
        lanes = [mix(lane) for lane in range(8)]
        some = content[begin : begin + block]
        for number, at in enumerate(range(0, len(some), 8)):
            x = (lanes[number % 8] ^ int.from_bytes(some[at : at + 8], "little")) * 0x9E3779B97F4A7C15 & MASK
            lanes[number % 8] = (x ^ x >> 32) * 0xBF58476D1CE4E5B9 & MASK
        of_block = 0
        for lane in lanes:
            of_block = mix(of_block ^ lane)
        folded = mix(folded ^ of_block)
    return mix(folded ^ len(content))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 63, 64, 65, 1000, (1 << 20) - 1, 1 << 20, (1 << 20) + 13])
def test_the_checksum_is_as_its_header_says(size):
    content = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    expected = checksum(content)
    for threads in (1, 2, 7):
        assert _native.checksum(content, threads) == expected


def test_the_checksum_is_frozen():
    assert _native.checksum(b"", 1) == 0xE220A8397B1DCDAF
    assert _native.checksum(bytes(range(256)) * 8192, 2) == 0x5E7D377AEB500111


def test_flipped_bits_in_words_of_one_lane_never_cancel_out():
    """Each pair, and each triple of which two in one word: a lane that multiplies once is blind to some whatever the
    rest of the bytes."""
    single = [1 << bit for bit in range(64)]
    halves = [1 << bit | 1 << bit + 32 for bit in range(32)]
    for content in (bytes(128), np.random.default_rng(0).bytes(128)):
        whole, words = _native.checksum(content, 1), np.frombuffer(content, "<u8").copy()
        for first in single:
            for second in single + halves:
                flipped = words.copy()
                flipped[[3, 11]] ^= np.array([first, second], np.uint64)
                assert _native.checksum(flipped, 1) != whole, (first, second)


def test_zeros_of_another_length_have_another_checksum():
    values = {_native.checksum(bytes(size), 1) for size in range(300)}
    assert len(values) == 300


def test_strided_memory_is_refused():
    with pytest.raises(ValueError, match="contiguous"):
        _native.checksum(np.zeros(20, np.uint8)[::2], 1)


@pytest.mark.parametrize("seed", range(20))
def test_the_first_common_id_is_found(seed):
    rng = np.random.default_rng(seed)
    few = np.unique(rng.integers(-(10**9), 10**9, rng.integers(0, 3000)))
    many = rng.integers(-(10**9), 10**9, rng.integers(1, 200_000))
    shared = few[rng.random(len(few)) < 0.01 * (seed % 2)]
    many = rng.permutation(np.concatenate([many, shared, [-(2**63), 2**63 - 1]]))
    expected = np.flatnonzero(np.isin(few, many))
    for threads in (1, 3):
        assert _native.common_id(few, many, threads) == (expected[0] if len(expected) else -1)


def test_rows_are_normalised_as_python_does():
    texts = [
        "Plain ASCII",
        "请写一首",
        None,
        "½ ﬁ",
        "",
        "ΣΑΣ",
        "e\u0301",
        "𝔘𝔫𝔦",
        "😀 Émile",
        "\U0010ffff",
        "ＡＢＣ",
        "ß",
    ] * 300
    column = pa.chunked_array([texts[:1000], texts[1000:]], pa.string())
    found = fingerprint_column(column, 3, 1)
    rows = np.array([row for row, text in enumerate(texts) if text is not None and row % 7])
    for threads in (1, 3):
        offsets, content = _native.normalised(
            native_texts(column), native_texts(found.replaced), found.replaced_rows, rows, threads
        )
        pieces = [content[offsets[i] : offsets[i + 1]].tobytes().decode() for i in range(len(rows))]
        assert pieces == [normalise(texts[row]) for row in rows]
        assert offsets[0] == 0 and offsets[-1] == len(content)
    with pytest.raises(ValueError, match="inside the column"):
        _native.normalised(native_texts(column), native_texts(found.replaced), found.replaced_rows, rows * 99, 1)


def test_mapped_bytes_are_those_of_the_file(tmp_path):
    content = np.random.default_rng(0).integers(0, 256, 20_000, np.uint8).tobytes()
    path = tmp_path / "some"
    path.write_bytes(content)
    with path.open("rb") as file:
        parts = [
            (begin, end, _native.MappedBytes(file.fileno(), begin, end)) for begin, end in ((0, 20_000), (4097, 9000))
        ]
    for begin, end, part in parts:
        assert bytes(part) == content[begin:end]
        assert memoryview(part).readonly
    with pytest.raises(ValueError, match="nothing to map"):
        _native.MappedBytes(0, 5, 5)
    with pytest.raises(OSError, match="Bad file descriptor"):
        _native.MappedBytes(-1, 0, 5)


def span(texts):
    column = pa.chunked_array([texts], pa.large_string())
    found = fingerprint_column(column, 3, 1)
    return found.values, found.states, native_texts(column)


def test_stored_rows_are_checked_and_claim_by_place():
    new = pa.chunked_array([["the second text", "a wholly new one", "ab", "THE SECOND TEXT"]], pa.large_string())
    found = fingerprint_column(new, 3, 1)
    no_texts = native_texts(pa.chunked_array([[]], pa.large_string()))

    def against(spans, k=3):
        return _native.cluster_against(
            spans, native_texts(new), no_texts, found.replaced_rows, found.values, found.states, k, 0.8, 3, 1
        )

    spans = [span(["the first text", "ab"]), span([]), span(["the second text"]), span(["the second text"])]
    places, distance = against(spans)
    assert places.tolist() == [-3, 1, -2, -3] and distance.tolist() == [0, 0, 0, 0]
    assert against([])[0].tolist() == [0, 1, 2, 0]
    values, states, texts = spans[0]
    with pytest.raises(ValueError, match="one fingerprint, one state and one text"):
        against([(values[:1], states, texts)])
    with pytest.raises(ValueError, match="three fields"):
        against([(values, states)])
