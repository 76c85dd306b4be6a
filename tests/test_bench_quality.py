"""What the benchmark measures on and against: the exact Jaccard join, the inputs, and the quality table."""

import importlib
from itertools import combinations
from pathlib import Path
from random import Random

import numpy as np
import pytest

from slmfast.arrow_texts import normalise
from slmfast.near_duplicates import dedup, near_pairs, simhash

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def room(monkeypatch):
    """Gives a file of bench/ as a module."""
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


def texts() -> list[str]:
    """Short texts, some of which are edits of others, in two languages and several widths and cases."""
    rng = Random(5)
    made = [
        "",
        "",
        "a",
        "A",
        "ab",
        "ａｂ",
        "abc",
        "aaaa",
        "aaaaaa",
        "abab",
        "ababab",
        "   ",
        "狐狸",
        "狐狸学",
        "ﬁnd it",
    ]
    for alphabet in ("abcde fgh", "狐狸学会读书的故事"):
        for _ in range(40):
            text = "".join(rng.choices(alphabet, k=rng.randint(3, 60)))
            place = rng.randrange(len(text))
            made += [text, text.upper() + "?", text[:place] + text[place + 1 :], text[place:]]
    return made


@pytest.mark.parametrize("least", [0.3, 0.8, 1.0])
def test_the_exact_join_equals_brute_force(room, least):
    made = texts()
    sets = [set() for _ in made]
    for grams, text in zip(sets, map(normalise, made), strict=True):
        grams.update({text[i : i + 3] for i in range(max(1, len(text) - 2))} if text else ())
    expected = [
        (a, b)
        for a, b in combinations(range(len(made)), 2)
        if sets[a] | sets[b] and len(sets[a] & sets[b]) / len(sets[a] | sets[b]) >= least
    ]
    i, j = room("exact_jaccard").jaccard_pairs(made, least)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == expected
    assert len(expected) >= 8


@pytest.mark.parametrize("made", [[], [""], ["", ""], ["ab"]])
def test_the_exact_join_of_next_to_nothing(room, made):
    i, j = room("exact_jaccard").jaccard_pairs(made, 0.8)
    assert len(i) == len(j) == 0


def test_adversarial_fingerprints_agree_where_they_say(room):
    inputs = room("inputs")
    for draw in (inputs.uniform, inputs.one_row_in_ten_near, *inputs.ADVERSARIAL):
        values = draw(50_000, 3)
        assert np.array_equal(values, draw(50_000, 3)) and len(np.unique(values)) == len(values) > 49_000
        blocks = [values >> np.uint64(shift) & np.uint64(0xFFFF) for shift in range(0, 64, 16)]
        fullest = sorted(int(np.bincount(block.astype(np.int64)).max()) for block in blocks)
        if draw is inputs.uniform:
            assert fullest[-1] < 20
        if draw is inputs.halves:
            assert fullest[1] < 20 and fullest[2] >= 450  # 1 % of the rows in one bucket of two blocks
        if draw is inputs.three_blocks_of_one:
            assert fullest[0] > 300  # likewise
        if draw is inputs.twenty_bits:
            assert fullest[1] < 300 and fullest[2] >= 450  # two whole blocks, and an eighth of the third
        if draw is inputs.three_blocks:
            assert fullest[0] > 300  # each block is shared by three quarters of the template's rows


def test_short_texts_are_short_bilingual_and_partly_near_copies(room, monkeypatch):
    inputs = room("inputs")
    monkeypatch.setattr(inputs, "data_folder", lambda: None)
    column = inputs.short_texts(4_000, 1)
    made = column.to_pylist()
    assert made == inputs.short_texts(4_000, 1).to_pylist() != inputs.short_texts(4_000, 2).to_pylist()
    chinese = sum(any("\u4e00" <= character <= "\u9fff" for character in text) for text in made)
    assert 1_500 < chinese < 2_500
    lengths = np.array([len(text) for text in made])
    assert np.quantile(lengths, 0.02) >= 10 and np.quantile(lengths, 0.98) <= 75
    i, _ = room("exact_jaccard").jaccard_pairs(made, 0.6)
    assert len(np.unique(i)) > 200


def test_rows_stand_for_others_as_in_dedup(room):
    quality = room("quality")
    made = [text for text in texts() if len({normalise(text)[i : i + 3] for i in range(len(text))}) > 6]
    i, j, _ = near_pairs(simhash(made), 7)
    keep = dedup(made, k=7, verify=None).keep
    assert np.array_equal(~quality.stood_for(len(made), i, j), keep) and not keep.all()


def test_quality_counts_pairs_and_rows(room):
    quality = room("quality")
    truth = quality.keyed(np.array([0, 2]), np.array([1, 3]))
    corpus = quality.Corpus("made", ["a"] * 6, truth, np.array([0, 1, 0, 1, 0, 0], dtype=bool))
    found = quality.keyed(np.array([0, 0, 4]), np.array([1, 4, 5]))
    gone = np.array([0, 1, 0, 0, 1, 0], dtype=bool)
    featureless = np.array([0, 0, 0, 0, 0, 1], dtype=bool)
    row = quality._judged(corpus, "tool", None, 3, found, gone, featureless)
    assert (row.pairs, row.featureless) == (3, 1)
    assert (row.precision, row.recall) == (pytest.approx(1 / 3), pytest.approx(1 / 2))
    assert (row.planted_precision, row.planted_recall) == (pytest.approx(1 / 2), pytest.approx(1 / 2))


def test_ours_on_the_miniature_pairs_no_text_without_features(room, tmp_path):
    quality, peers, context = room("quality"), room("peers"), room("context")
    made, planted = quality.miniature()
    some = Random(0).sample(range(len(made)), 1500)
    made, planted = ["", *[made[row] for row in some], ""], np.array([False, *planted[some], False])
    truth = quality.keyed(*room("exact_jaccard").jaccard_pairs(made, quality.SIMILAR))
    setting = context.Context(k=3, threads=1, seed=0, peers=peers.PeerFolder(tmp_path))
    rows = list(quality.quality(setting, quality.Corpus("miniature", made, truth, planted)))
    assert [(row.tool, row.k) for row in rows] == [(t, k) for t in (quality.OURS, quality.PLAIN) for k in (3, 5, 7)]
    assert all(row.featureless == 0 for row in rows)
    assert all(row.precision == 1 for row in rows if row.tool == quality.OURS)  # verification is exact
    recalls = [row.recall for row in rows if row.tool == quality.OURS]
    assert recalls == sorted(recalls) and recalls[0] > 0
    table = quality.quality_table(rows).splitlines()
    assert len(table) == len(rows) + 4 and "precision" in table[0]
    assert "is 1 by construction" in table[-2]
    results = [result.document() for result in quality.quality_results(rows)]
    assert {result["unit"] for result in results} == {"precision", "recall", "pairs"}
