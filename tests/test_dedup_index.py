"""The index on disk: parts give what the whole gives, and no file that is not whole is ever believed."""

import os
import struct
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from slmfast import DedupIndex, UserError, dedup, near_duplicates

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


def test_a_file_that_is_written_during_an_add_is_not_written_over(tmp_path, monkeypatch):
    index = DedupIndex(tmp_path / "kept.index")
    index.add(["the first text, which stays"], [1])
    dedup_itself = near_duplicates.dedup

    def interrupted(*args, **kwargs):
        monkeypatch.undo()
        DedupIndex(tmp_path / "kept.index").add(["another process adds this one"], [2])
        return dedup_itself(*args, **kwargs)

    monkeypatch.setattr(near_duplicates, "dedup", interrupted)
    with pytest.raises(UserError, match="was written to by another process meanwhile"):
        index.add(["a third text with words of its own"], [3])
    assert index.add(["a third text with words of its own"], [3]).n_kept == 1
    assert len(DedupIndex(tmp_path / "kept.index")) == 3


def test_numpys_numbers_are_settings(tmp_path):
    index = DedupIndex(tmp_path / "kept.index", np.int64(3), verify=np.float64(0.8), ngram=np.int32(3))
    index.add(["a text of its own"], [1])
    assert len(DedupIndex(tmp_path / "kept.index", 3)) == 1


@pytest.fixture
def stored(tmp_path):
    index = DedupIndex(tmp_path / "kept.index")
    index.add(TEXTS, range(len(TEXTS)))
    return index.path


def test_every_damaged_byte_is_noticed(stored):
    whole = stored.read_bytes()
    rng = np.random.default_rng(1)
    places = {*range(64), *rng.integers(0, len(whole), 150).tolist()}
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(0, 8)
        stored.write_bytes(damaged)
        with pytest.raises(UserError, match=r"kept\.index"):
            DedupIndex(stored)
    for length in {0, 1, 8, 47, 48, 60, len(whole) // 2, len(whole) - 1}:
        stored.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"kept\.index") as caught:
            DedupIndex(stored)
        assert "\n" not in str(caught.value)


def test_foreign_files_versions_and_folders_are_refused(stored):
    whole = bytearray(stored.read_bytes())
    whole[8:12] = struct.pack("<I", 99)
    stored.write_bytes(whole)
    with pytest.raises(UserError, match="version 99"):
        DedupIndex(stored)
    stored.write_bytes(b"PAR1" * 100)
    with pytest.raises(UserError, match="not a dedup index"):
        DedupIndex(stored)
    with pytest.raises(UserError, match="can't be opened"):
        DedupIndex(stored.parent)


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


def test_a_process_killed_between_write_and_rename_leaves_the_old_index(stored):
    before = stored.read_bytes()
    script = """
import os, pathlib, signal, sys
from slmfast import DedupIndex
pathlib.Path.replace = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
DedupIndex(sys.argv[1]).add(["a wholly new text that must be kept"], [12345])
"""
    done = subprocess.run([sys.executable, "-c", script, str(stored)], cwd=stored.parent, env=os.environ, check=False)
    assert done.returncode == -9
    assert stored.read_bytes() == before
    assert DedupIndex(stored).add(["a wholly new text that must be kept"], [12345]).n_kept == 1
