"""The index gives in parts what dedup gives of the whole, refuses what names no row, and keeps its settings."""

import random
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from slmfast import DedupIndex, UserError, dedup, index_file, near_duplicates, near_pairs, simhash

TEXTS = [
    *(
        f"Please write a short poem about the number {n} and the colour {c}."
        for n in range(30)
        for c in ("red", "blue")
    ),
    *(f"请写一首关于数字{n}和春天的短诗，谢谢！" for n in range(40)),
    None,
    "",
    "abc",
    "ABC",
    "½ of a pie and a very long story about it",
    "1⁄2 OF A PIE and a very long story about it",
] * 2


WORDS = {
    "en": "write poem about the colour number story please explain simply short long spring river ABC".split(),
    "zh": "请写 一首 关于 春天 的 短诗 数字 谢谢 解释 简单 长江 故事 颜色".split(),
}
FEW = ["abc", "ABC", "ab", "你好", "１２", "12", "①②", "ﬁ", "fi", "aaaaaaa", "AAAAAAAA", "۰۱", "½", "1⁄2"]
FOREIGN = ["ﬁnd", "Ａ", "ΣΑΣ", "ǅ", "é", "e\u0301", "한글", "ﷺ", "½"]


def some_texts(rng: random.Random, count: int) -> list[str | None]:
    """Both languages, with repeats, near repeats, changes of case, characters that Python normalises, and blanks."""
    texts: list[str | None] = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.06:
            texts.append(rng.choice([None, "", *FEW]))
        elif kind < 0.4 or not texts:
            language = rng.choice(["en", "zh"])
            gap = " " if language == "en" else ""
            texts.append(gap.join(rng.choice(WORDS[language]) for _ in range(rng.randint(2, 14))))
        else:
            text = rng.choice(texts) or "nothing of note"
            place = rng.randrange(len(text) + 1)
            changed = text[:place] + rng.choice(["", "x", "！", rng.choice(FOREIGN)]) + text[place:]
            texts.append(rng.choice([text, text.upper(), changed, changed, text[: max(1, len(text) - 2)]]))
    return texts


@pytest.mark.parametrize("k", range(9))
@pytest.mark.parametrize("verify", [None, 0.8])
def test_random_parts_give_what_the_whole_gives(tmp_path, k, verify):
    rng = random.Random(k + 100 * (verify is None))
    for ngram in (1, 3, rng.choice([2, 4, 5, 9])):
        texts = some_texts(rng, 240)
        ids = np.array(rng.sample(range(-1000, 1000), len(texts)))
        expected = dedup(texts, k=k, verify=verify, ngram=ngram)
        assert 0 < expected.n_kept < len(texts)
        path = tmp_path / f"{ngram}.index"
        cuts = [0, *sorted(rng.sample(range(len(texts)), rng.randint(1, 30))), len(texts)]
        index = DedupIndex(path, k, verify=verify, ngram=ngram)
        for begin, end in pairwise(cuts):
            if rng.random() < 0.5:
                index = DedupIndex(path, k, verify=verify, ngram=ngram)
            result = index.add(texts[begin:end], ids[begin:end], threads=rng.choice([1, 3]))
            assert result.keep.tolist() == expected.keep[begin:end].tolist()
            assert result.duplicate_of.tolist() == ids[expected.duplicate_of[begin:end]].tolist()
            assert result.distance.tolist() == expected.distance[begin:end].tolist()


def test_very_many_small_parts_are_merged(tmp_path, monkeypatch):
    monkeypatch.setattr(index_file, "MOST_SEGMENTS", 16)
    texts = some_texts(random.Random(5), 300)
    expected = dedup(texts)
    one, two = (DedupIndex(tmp_path / "kept.index") for _ in range(2))
    for row, text in enumerate(texts):
        result = (one if row % 3 else two).add([text], [row])
        assert result.duplicate_of.tolist() == [expected.duplicate_of[row]]
        assert result.distance.tolist() == [expected.distance[row]]
    again = index_file.IndexFile(one.path, {"k": 3, "verify": 0.8, "ngram": 3, "fingerprints": 1})
    assert len(again.segments) <= 16
    blank = sum(not text for text in texts)
    assert len(again) == len(DedupIndex(one.path)) == expected.n_kept - blank
    assert [path.name for path in tmp_path.iterdir()] == ["kept.index"]


@pytest.mark.parametrize("settings", [{}, {"k": 6, "verify": None}, {"k": 8, "verify": 0.5, "ngram": 2}])
@pytest.mark.parametrize("parts", [1, 3, 50])
def test_parts_give_what_the_whole_gives(tmp_path, settings, parts):
    ids = np.random.default_rng(0).permutation(len(TEXTS)) * 7 - 300
    expected = dedup(TEXTS, **settings)
    keep, duplicate_of, distance = [], [], []
    for rows in np.array_split(np.arange(len(TEXTS)), parts):
        index = DedupIndex(tmp_path / "kept.index", **settings)  # opened anew each time
        result = index.add([TEXTS[row] for row in rows], ids[rows])
        keep += result.keep.tolist()
        duplicate_of += result.duplicate_of.tolist()
        distance += result.distance.tolist()
    assert keep == expected.keep.tolist()
    assert duplicate_of == ids[expected.duplicate_of].tolist()
    assert distance == expected.distance.tolist()
    assert len(DedupIndex(tmp_path / "kept.index", **settings)) == expected.n_kept - 4  # two nulls, two empty texts


def test_arrow_columns_and_nothing_to_store(tmp_path):
    index = DedupIndex(tmp_path / "kept.index")
    assert index.add(pa.array([None, ""], pa.string_view()), [1, 2]).keep.all()
    assert index.add([], []).n_kept == 0 and not index.path.exists()
    column = pa.chunked_array([["a text of its own"], ["A TEXT of its own"]])
    assert index.add(column, [3, 4]).duplicate_of.tolist() == [3, 3]


def test_two_that_hold_one_file_lose_nothing_of_each_other(tmp_path):
    one, two = (DedupIndex(tmp_path / "kept.index") for _ in range(2))
    one.add(["the first text, which stays"], [1])
    result = two.add(["the first text, which stays", "a second one of quite other words"], [2, 3])
    assert result.duplicate_of.tolist() == [1, 3]
    assert one.add(["a second one of quite other words", "something third"], [4, 5]).duplicate_of.tolist() == [3, 5]
    with pytest.raises(ValueError, match="id 5 is in the index already"):
        two.add(["whatever else there may be"], [5])
    assert len(one) == len(two) == len(DedupIndex(tmp_path / "kept.index")) == 3


def test_numpys_numbers_are_settings(tmp_path):
    index = DedupIndex(tmp_path / "kept.index", np.int64(3), verify=np.float64(0.8), ngram=np.int32(3))
    index.add(["a text of its own"], [1])
    assert len(DedupIndex(tmp_path / "kept.index", 3)) == 1


@pytest.fixture
def stored(tmp_path):
    index = DedupIndex(tmp_path / "kept.index")
    index.add(TEXTS, range(len(TEXTS)))
    return index.path


def test_other_settings_are_refused(stored):
    with pytest.raises(UserError, match="was made with k=3"):
        DedupIndex(stored, k=5)
    with pytest.raises(UserError, match=r"verify=0\.8"):
        DedupIndex(stored, verify=None)
    with pytest.raises(ValueError, match="k must"):
        DedupIndex(stored, k=9)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([1], ValueError, "one for each of the 2"),
        (["a", "b"], TypeError, "integers"),
        ([900, 900], ValueError, "id 900 is given twice"),
        ([900, 0], ValueError, "id 0 is in the index already"),
        (np.array([1, 2**63], dtype=np.uint64), ValueError, "does not fit"),
    ],
    ids=str,
)
def test_ids_that_name_no_row_are_refused(stored, ids, error, message):
    before = stored.read_bytes()
    with pytest.raises(error, match=message):
        DedupIndex(stored).add(["a new text that stays", "and one more of them"], ids)
    assert stored.read_bytes() == before


def test_bad_texts_are_refused_before_anything_is_written(stored):
    before = stored.read_bytes()
    with pytest.raises(ValueError, match="row 1 is not valid UTF-8"):
        DedupIndex(stored).add(pa.array([b"fine", b"\xff"]).view(pa.string()), [901, 902])
    assert stored.read_bytes() == before


@pytest.mark.parametrize("order", ["ascending", "descending", "mixed"])
def test_known_ids_are_found_among_interleaved_ones(tmp_path, order):
    index = DedupIndex(tmp_path / "kept.index")
    ids = np.arange(-300, 300, 2)
    ids = {"ascending": ids, "descending": ids[::-1], "mixed": np.random.default_rng(0).permutation(ids)}[order]
    texts = [f"{n * 7919:x} is one of many numbers {n * n:b}" for n in range(len(ids))]
    for part in np.array_split(np.arange(len(ids)), 4):
        index.add([texts[row] for row in part], ids[part])
    for known in index._file.segments[2].ids[:5].tolist():
        with pytest.raises(ValueError, match=f"id {known} is in the index already"):
            index.add(["an odd text", "another odd text", ""], [known + 1, known, known - 1])
        with pytest.raises(ValueError, match=f"id {known} is in the index already"):
            index.add([None], [known])  # nothing to store, but the id names another row
    assert index.add(["an odd text of its own", None], [-1, 1]).keep.all()


@pytest.mark.parametrize("extreme", [-(2**63), 2**63 - 1])
def test_the_least_and_the_greatest_id_are_known_too(tmp_path, extreme):
    index = DedupIndex(tmp_path / "kept.index")
    index.add(["a text that is the first"], [extreme])
    for ids in ([extreme], [extreme, 0], [5, extreme]):
        with pytest.raises(ValueError, match=f"id {extreme} is in the index already"):
            index.add(["quite another one", "請寫一首關於春天的詩"][: len(ids)], ids)
    assert len(index) == 1


def test_ids_of_rows_that_are_not_stored_may_come_again(tmp_path):
    index = DedupIndex(tmp_path / "kept.index")
    index.add(["a text that is the first", "A text that is the first", None, ""], [1, 2, 3, 4])
    assert index.add(["quite another one", None, ""], [2, 3, 4]).keep.all()
    assert len(index) == 2


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**40, 10**30])
def test_settings_beyond_32_bits_are_refused_in_one_line(tmp_path, value):
    index = DedupIndex(tmp_path / "kept.index")
    calls = {
        "k": [lambda: dedup(["a"], k=value), lambda: near_pairs([], value), lambda: DedupIndex(index.path, value)],
        "ngram": [lambda: dedup(["a"], ngram=value), lambda: simhash(["a"], ngram=value)],
        "threads": [
            lambda: dedup(["a"], threads=value),
            lambda: near_pairs([], threads=value),
            lambda: simhash(["a"], threads=value),
            lambda: index.add(["a"], [1], threads=value),
        ],
    }
    for name, some in calls.items():
        for call in some:
            with pytest.raises(ValueError, match=rf"^{name} must fit 32 bits, not {value}$"):
                call()


def test_the_class_is_found_where_it_was_before():
    assert near_duplicates.DedupIndex is DedupIndex
    with pytest.raises(AttributeError, match="no attribute 'Index'"):
        near_duplicates.Index  # noqa: B018
