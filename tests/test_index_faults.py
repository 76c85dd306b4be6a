"""The file of the index when the system fails it: no room, no handle, a torn read, damage at a bad moment."""

import errno
import hashlib
import os

import pytest

from slmfast import DedupIndex, UserError, index_file, index_format

COMMIT = 64  # where the commit record lies


@pytest.fixture
def stored(tmp_path):
    """An index of three segments."""
    index = DedupIndex(tmp_path / "kept.index")
    for row, text in enumerate(["a short text", "请写一首关于春天的短诗", "one more of quite other words"]):
        index.add([text], [row])
    return index.path


def fails(_):
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_merge_that_fails_is_put_off_and_the_rows_appended(stored, monkeypatch, number):
    index, merges = DedupIndex(stored), []
    monkeypatch.setattr(index_file, "MOST_SEGMENTS", 3)

    def no_merge(_):
        merges.append(len(index._file.segments))
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(index_file, "_all_columns", no_merge)
        for row in range(3, 9):
            assert index.add([hashlib.sha256(bytes([row])).hexdigest()], [row]).n_kept == 1
    assert merges == [3, 6]  # not with every add, each of which would copy until there is no room
    assert len(index) == len(DedupIndex(stored)) == 9
    index.add(["there is room again"], [9])
    assert len(index._file.segments) == 2 and len(DedupIndex(stored)) == 10
    assert index.add(["A short text", "there is ROOM again"], [20, 21]).duplicate_of.tolist() == [0, 9]


def test_a_merge_that_fails_after_the_rename_loses_no_row(stored, monkeypatch):
    index = DedupIndex(stored)
    monkeypatch.setattr(index_file, "MOST_SEGMENTS", 3)
    atomic = index_file.atomic_path

    class Unsynced:
        """The new file has its name, but the folder could not be put on the disk."""

        def __init__(self, path):
            self.inner = atomic(path)

        def __enter__(self):
            return self.inner.__enter__()

        def __exit__(self, *error):
            self.inner.__exit__(*error)
            fails(None)

    monkeypatch.setattr(index_file, "atomic_path", Unsynced)
    index.add(["a text that goes into the merged file"], [50])
    assert len(DedupIndex(stored)) == len(index) == 4


def test_a_commit_record_read_while_it_was_written_is_read_again(stored, monkeypatch):
    whole = stored.read_bytes()
    torn = whole[: COMMIT + 20] + bytes(44) + whole[COMMIT + 64 :]
    stored.write_bytes(torn)
    parse, reads = index_format.parse_commit, []

    def the_writer_ends_meanwhile(prefix, size):
        reads.append(prefix)
        stored.write_bytes(whole)
        return parse(prefix, size)

    monkeypatch.setattr(index_format, "parse_commit", the_writer_ends_meanwhile)
    assert len(DedupIndex(stored)) == 3
    assert reads == [torn[:128], whole[:128]]


def test_a_record_damaged_during_an_add_is_told_in_one_line(stored, monkeypatch):
    index = DedupIndex(stored)
    cluster = index._cluster

    def hurt(added):
        with stored.open("r+b") as file:
            file.seek(COMMIT + 6)
            file.write(b"\xff")
        return cluster(added)

    monkeypatch.setattr(index, "_cluster", hurt)
    with pytest.raises(UserError, match=r"^.*kept\.index: the index is damaged, .*commit record.*$"):
        index.add(["a text that comes too late"], [50])


def test_a_record_that_cannot_be_read_during_an_add_is_told_in_one_line(stored, monkeypatch):
    index = DedupIndex(stored)
    with pytest.raises(UserError, match=r"can't be written \(Input/output error\)"), index._file.writing() as append:
        monkeypatch.setattr(index_format, "parse_commit", lambda *_: fails(_))
        append(None)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ENOMEM])
def test_only_damage_is_a_reason_to_delete_an_index(stored, monkeypatch, number):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    with pytest.raises(UserError, match="can't be opened") as of_folder:
        DedupIndex(stored.parent)
    with monkeypatch.context() as patch:
        patch.setattr(index_format, "read_segments", refused)
        with pytest.raises(UserError, match=os.strerror(number)) as of_file:
            DedupIndex(stored)
    for caught in (of_folder, of_file):
        assert "delete" not in str(caught.value) and "may be read" in str(caught.value)
    stored.write_bytes(stored.read_bytes()[:-64])
    with pytest.raises(UserError, match="delete it to begin anew"):
        DedupIndex(stored)


def test_a_commit_that_is_taken_back_leaves_what_a_reader_may_have_mapped(stored, monkeypatch):
    index, before, readers = DedupIndex(stored), stored.read_bytes(), []
    sync = os.fsync

    def fails_behind_the_commit(handle):
        if stored.read_bytes()[:128] == before[:128]:
            return sync(handle)
        readers.append(DedupIndex(stored))  # sees the new commit
        return fails(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails_behind_the_commit)
        with pytest.raises(UserError, match="can't be written"):
            index.add(["a text that is not to stay"], [50])
    after = stored.read_bytes()
    assert after[: len(before)] == before and len(index) == len(DedupIndex(stored)) == 3
    (reader,) = readers
    assert bytes(reader._file.segments[-1].text_bytes) == b"a text that is not to stay"
    assert after.find(b"a text that is not to stay") > len(before)
    assert reader.add(["a text that is not to stay"], [51]).n_kept == 1
    assert index.add(["a text that is not to stay"], [52]).duplicate_of.tolist() == [51]
