"""Columns of every make give the same fingerprints, and what is no column of texts is refused by name."""

import random
import struct

import numpy as np
import pyarrow as pa
import pytest

from slmfast import _native, dedup, simhash
from slmfast.arrow_texts import native_texts, text_column

TEXTS = [
    "Hello, world",
    None,
    "你好，世界",
    "",
    "a rather longer text than fits a view",
    "½ cup",
    "hello, WORLD",
    "你好,世界",
]
EXPECTED = simhash(TEXTS)


def chunked(kind: pa.DataType) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(TEXTS[:3], kind), pa.array([], kind), pa.array(TEXTS[3:], kind)])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_layouts_slices_and_chunks(kind):
    whole = pa.array(TEXTS, kind)
    assert np.array_equal(simhash(whole), EXPECTED)
    assert np.array_equal(simhash(chunked(kind)), EXPECTED)
    for start in range(len(TEXTS)):
        for length in range(len(TEXTS) - start + 1):
            assert np.array_equal(simhash(whole.slice(start, length)), EXPECTED[start : start + length])
    padded = pa.concat_arrays([pa.array(["x"] * 11, kind), whole]).slice(11)  # the validity bits start inside a byte
    assert np.array_equal(simhash(padded), EXPECTED)
    assert dedup(chunked(kind)).duplicate_of.tolist() == dedup(TEXTS).duplicate_of.tolist() == [0, 1, 2, 3, 4, 5, 0, 2]


def test_dictionaries_are_decoded():
    for kind in (pa.string(), pa.large_string()):
        assert np.array_equal(simhash(pa.array(TEXTS, kind).dictionary_encode()), EXPECTED)
        assert np.array_equal(simhash(chunked(kind).dictionary_encode()), EXPECTED)


def test_a_table_of_one_column_is_that_column():
    assert np.array_equal(simhash(pa.table({"text": chunked(pa.string())})), EXPECTED)
    with pytest.raises(TypeError, match="columns a, b: pass one"):
        simhash(pa.table({"a": TEXTS, "b": TEXTS}))


def test_pandas():
    pandas = pytest.importorskip("pandas")
    for dtype in (object, "string"):
        assert np.array_equal(simhash(pandas.Series(TEXTS, dtype=dtype)), EXPECTED)


def test_polars():
    polars = pytest.importorskip("polars")
    assert np.array_equal(simhash(polars.Series(TEXTS)), EXPECTED)


def test_datasets_column_with_and_without_chosen_rows():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": TEXTS, "other": list(range(len(TEXTS)))})
    assert np.array_equal(simhash(data["text"]), EXPECTED)
    assert np.array_equal(simhash(data.select([7, 0])["text"]), EXPECTED[[7, 0]])


def addresses(column: pa.ChunkedArray) -> list[list[int | None]]:
    """Where the buffers of every chunk lie."""
    return [[buffer and buffer.address for buffer in chunk.buffers()] for chunk in column.chunks]


MANY = [None if i % 100 == 7 else f"text number {i} of a column that nobody copies" for i in range(5000)]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_arrow_columns_are_read_where_they_lie(kind):
    whole = pa.array(MANY, kind)
    for column in (pa.chunked_array([whole]), pa.chunked_array([whole.slice(3, 40), whole.slice(900)])):
        before = pa.total_allocated_bytes()
        assert addresses(text_column(column)) == addresses(column)
        native = native_texts(text_column(column))
        assert pa.total_allocated_bytes() == before
        assert len(native) == len(column)


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view"])
def test_the_native_module_sees_the_callers_own_bytes(kind):
    """Whoever changes the buffer changes the fingerprint, so there is no copy in between."""
    text = b"first words that are then others"
    data = bytearray(text)
    size = len(text)
    index = {"string": struct.pack("<2i", 0, size), "large_string": struct.pack("<2q", 0, size)}
    index["string_view"] = struct.pack("<i4s2i", size, text[:4], 0, 0)
    column = _native.Texts([(kind, 1, 0, None, index[kind], [data])])
    values, _ = _native.fingerprints(column, normalised=False, ngram=3, threads=1)
    assert values.tolist() == simhash([text.decode()]).tolist()
    data[6:11] = b"sword"
    values, _ = _native.fingerprints(column, normalised=False, ngram=3, threads=1)
    assert values.tolist() == simhash([data.decode()]).tolist() != simhash([text.decode()]).tolist()


def test_polars_memory_is_read_where_it_lies():
    polars = pytest.importorskip("polars")
    series = polars.Series(MANY)
    before = pa.total_allocated_bytes()
    one, two = text_column(series), text_column(series)  # both alive: a copy could not lie at the same place
    assert one.type == pa.string_view()
    assert addresses(one) == addresses(two)
    assert addresses(text_column(polars.DataFrame({"text": series})["text"])) == addresses(one)
    assert pa.total_allocated_bytes() == before


@pytest.mark.parametrize("dtype", ["str", "string[pyarrow]", "large_string[pyarrow]"])
def test_pandas_memory_is_read_where_it_lies(dtype):
    pandas = pytest.importorskip("pandas")
    series = pandas.Series(MANY, dtype=dtype)
    own = pa.chunked_array(series)
    before = pa.total_allocated_bytes()
    assert addresses(text_column(series)) == addresses(text_column(series)) == addresses(own)
    assert pa.total_allocated_bytes() == before


def test_datasets_memory_is_read_where_it_lies(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": MANY, "other": MANY})
    assert addresses(text_column(data["text"])) == addresses(data.data.table.column("text"))
    data.save_to_disk(str(tmp_path / "saved"))
    mapped = datasets.load_from_disk(str(tmp_path / "saved"))
    before = pa.total_allocated_bytes()
    column = text_column(mapped["text"])
    assert addresses(column) == addresses(mapped.data.table.column("text"))
    assert pa.total_allocated_bytes() == before  # it stays in the mapped file
    assert np.array_equal(simhash(column), simhash(MANY))


def test_numpy_strings():
    some = ["one", "two", "三"]
    assert np.array_equal(simhash(np.array(some)), simhash(some))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "one string"),
        (17, "a int"),
        (["a", 3], "row 1 is a int"),
        ([None, b"bytes"], "row 1 is a bytes"),
        (pa.array([1, 2]), "not int64"),
        (pa.array([b"x"]), "not binary"),
        (pa.array([["x"]]), "not list"),
    ],
    ids=str,
)
def test_what_is_no_column_of_texts_is_refused(texts, message):
    with pytest.raises(TypeError, match=message):
        simhash(texts)


def test_a_lone_surrogate_names_its_row():
    with pytest.raises(ValueError, match="row 2 holds a lone surrogate"):
        dedup(["fine", "好", "bad \ud800 one"])


BAD_UTF8 = [
    b"\xff",
    b"\xc0\x80",
    b"\xe0\x80\x80",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xe4\xbd",
    b"\x80",
    b"\xf0\x9f",
]


@pytest.mark.parametrize("bad", BAD_UTF8, ids=repr)
def test_bad_utf8_in_arrow_names_its_row(bad):
    column = pa.array([b"fine", "好½".encode(), b"text " + bad, bad]).view(pa.string())
    with pytest.raises(ValueError, match="row 2 is not valid UTF-8"):
        simhash(column)


def test_utf8_is_accepted_exactly_where_python_accepts_it():
    rng = random.Random(3)
    pieces = [b"a", "é".encode(), "好".encode(), "😀".encode(), *BAD_UTF8, b"\xe4", b"\xbf\xbf", b"\xf4\x8f\xbf\xbf"]
    for _ in range(5000):
        raw = b"".join(rng.choices(pieces, k=rng.randint(1, 4)))
        try:
            raw.decode()
            good = True
        except UnicodeDecodeError:
            good = False
        try:
            _native.normalise(raw)
            accepted = True
        except ValueError:
            accepted = False
        assert accepted == good, raw


def native_column(layout: str, index: bytes, data: list[bytes], length: int, offset: int = 0, validity=None):
    return _native.Texts([(layout, length, offset, validity, index, data)])


@pytest.mark.parametrize(
    ("layout", "index", "length", "offset"),
    [
        ("string", struct.pack("<2i", 0, 99), 1, 0),  # past the data
        ("string", struct.pack("<2i", -4, 2), 1, 0),  # before it
        ("string", struct.pack("<3i", 0, 3, 1), 2, 0),  # backwards
        ("string", struct.pack("<2i", 0, 3), 2, 0),  # fewer offsets than rows
        ("string", struct.pack("<2i", 0, 3), 1, 1),
        ("string", struct.pack("<2i", 0, 3), -1, 0),
        ("string", struct.pack("<2i", 0, 3), 2**62, 2**62),
        ("large_string", struct.pack("<2q", 0, 2**60), 1, 0),
        ("string_view", struct.pack("<4i", 20, 0, 0, 0), 1, 0),  # past the buffer
        ("string_view", struct.pack("<4i", 13, 0, 1, 0), 1, 0),  # no such buffer
        ("string_view", struct.pack("<4i", 13, 0, 0, -1), 1, 0),
        ("string_view", struct.pack("<4i", -1, 0, 0, 0), 1, 0),
    ],
)
def test_wild_offsets_are_refused(layout, index, length, offset):
    with pytest.raises(ValueError, match=r"row \d+ points outside|too short|impossible"):
        native_column(layout, index, [b"fourteen bytes"], length, offset)


def test_fuzzed_offsets_raise_or_read_but_never_crash():
    rng = random.Random(4)
    outcomes = {True: 0, False: 0}
    for _ in range(4000):
        layout, width = rng.choice([("string", "i"), ("large_string", "q"), ("string_view", "i")])
        index = struct.pack(f"<8{width}", *(rng.choice([-1, 0, 0, 1, 2, 5, 9, 13, 2**31 - 1]) for _ in range(8)))
        data = [rng.randbytes(13) if rng.random() < 0.5 else b"plain letters" for _ in range(rng.randint(0, 2))]
        try:
            column = native_column(
                layout, index, data, rng.randint(0, 3), rng.randint(0, 2), rng.choice([None, b"\x05"])
            )
            values, _ = _native.fingerprints(column, normalised=False, ngram=3, threads=1)
            assert len(values) == len(column)
            outcomes[True] += 1
        except ValueError:
            outcomes[False] += 1
    assert min(outcomes.values()) > 100


def test_a_short_validity_buffer_is_refused():
    with pytest.raises(ValueError, match="validity"):
        native_column("string", struct.pack("<10i", *[0] * 10), [b""], 9, validity=b"\xff")


def test_categories_of_polars_are_decoded():
    polars = pytest.importorskip("polars")
    texts = ["the very same text here", "another text altogether", "the very same text here"]
    for dtype in (polars.Categorical, polars.Enum(sorted(set(texts)))):
        assert dedup(polars.Series(texts, dtype=dtype)).duplicate_of.tolist() == [0, 1, 0]


def test_an_object_that_is_no_text_is_named_by_its_row():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match="row 1 is a int"):
        dedup(pandas.Series(["a", 1], dtype=object))


def test_a_column_of_a_streamed_dataset_is_refused_in_one_line():
    datasets = pytest.importorskip("datasets")
    streamed = datasets.Dataset.from_dict({"text": ["a", "b"]}).to_iterable_dataset()
    with pytest.raises(TypeError, match=r"streamed dataset.*list\(column\)"):
        dedup(streamed["text"])
