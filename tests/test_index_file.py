"""The file of the index: no file that is not whole is ever believed, and no crash or second writer loses rows."""

import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from slmfast import DedupIndex, UserError, index_file

TEXTS = ["a short text", "请写一首关于春天的短诗", "Ünïcödé ½ and ﬁne", "ab"]


@pytest.fixture
def stored(tmp_path):
    """An index of two segments."""
    index = DedupIndex(tmp_path / "kept.index")
    index.add(TEXTS, [7, -3, 12, 2**62])
    index.add(["a third text, in a segment of its own"], [0])
    assert len(index) == 5
    return index.path


def refuse(path):
    with pytest.raises(UserError, match=r"kept\.index") as caught:
        DedupIndex(path)
    assert "\n" not in str(caught.value)


def test_every_damaged_byte_is_noticed(stored):
    whole = stored.read_bytes()
    for place in range(len(whole)):
        for bit in range(8) if place < 256 else [place % 8]:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            stored.write_bytes(damaged)
            refuse(stored)
    stored.write_bytes(whole)
    assert len(DedupIndex(stored)) == 5


def test_every_truncation_is_noticed(stored):
    """Also one between two segments, or behind the settings: the commit record knows where the file ends."""
    whole = stored.read_bytes()
    opened = DedupIndex(stored)
    for length in range(len(whole)):
        stored.write_bytes(whole[:length])
        refuse(stored)
    with pytest.raises(UserError, match="damaged, it is cut short"):
        opened.add(["something else that is new"], [99])


def test_exchanged_and_repeated_segments_are_noticed(stored):
    first = stored.read_bytes()
    DedupIndex(stored).add(["a fourth text that is of the same length"], [1])
    second = stored.read_bytes()
    tail = len(second) - len(first)
    stored.write_bytes(second[:-tail] + first[-tail:])
    refuse(stored)
    stored.write_bytes(first[:-tail] + second[-tail:])
    refuse(stored)


def test_an_interrupted_append_is_ignored_and_written_over(stored):
    whole = stored.read_bytes()
    for tail in (b"\0" * 7, bytes(range(256)) * 300, whole[-512:]):
        stored.write_bytes(whole + tail)
        index = DedupIndex(stored)
        assert len(index) == 5
        assert index.add(["a third text, in a segment of its own", "one more"], [50, 51]).duplicate_of.tolist() == [
            0,
            51,
        ]
        clean = stored.parent / "clean.index"
        clean.write_bytes(whole)
        DedupIndex(clean).add(["a third text, in a segment of its own", "one more"], [50, 51])
        assert stored.read_bytes() == clean.read_bytes()
        assert len(DedupIndex(stored)) == 6


def test_an_append_leaves_every_committed_byte_but_the_commit_record(stored):
    before = stored.read_bytes()
    DedupIndex(stored).add(["one more text to be appended"], [50])
    after = stored.read_bytes()
    assert after[:64] == before[:64] and after[128 : len(before)] == before[128:]
    assert after[64:128] != before[64:128]


def test_foreign_files_versions_and_folders_are_refused(stored):
    whole = bytearray(stored.read_bytes())
    whole[8:12] = struct.pack("<I", 1)
    stored.write_bytes(whole)
    with pytest.raises(UserError, match="version 1, not 2"):
        DedupIndex(stored)
    stored.write_bytes(b"PAR1" * 100)
    with pytest.raises(UserError, match="not a dedup index"):
        DedupIndex(stored)
    with pytest.raises(UserError, match="can't be opened"):
        DedupIndex(stored.parent)


def test_a_file_that_is_gone_or_replaced_is_noticed(stored):
    index = DedupIndex(stored)
    whole = stored.read_bytes()
    stored.unlink()
    with pytest.raises(UserError, match="is gone"):
        index.add(["a text without a home"], [50])
    assert not stored.exists()
    other = stored.with_name("other.index")
    DedupIndex(other).add(["a text without a home"], [60])
    other.rename(stored)
    assert index.add(["a text without a home", TEXTS[0]], [50, 51]).duplicate_of.tolist() == [60, 51]
    stored.write_bytes(whole)
    assert index.add(["a text without a home", TEXTS[0]], [50, 51]).duplicate_of.tolist() == [50, 7]


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"see that it and the folder .*nowhere exist"):
        DedupIndex(tmp_path / "nowhere" / "kept.index").add(["a text"], [1])


def run(script, *arguments, folder):
    """Runs a script in a process of its own, and gives what it printed."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


READ_ONLY = """
import os, pathlib
from slmfast import DedupIndex, UserError
for path, mode in (("kept.index", 0o444), (".", 0o555)):
    os.chmod(path, mode)
if os.geteuid() == 0:
    os.setuid(65534)
assert len(DedupIndex("kept.index")) == 5
for path in ("kept.index", "new.index"):
    try:
        DedupIndex(path).add(["a text that cannot be kept"], [50])
        raise SystemExit("was written")
    except UserError as error:
        assert "can't be written (Permission denied)" in str(error) and "\\n" not in str(error), error
"""


def test_a_read_only_index_opens_and_says_so(stored):
    before = stored.read_bytes()
    run(READ_ONLY, folder=stored.parent)
    stored.parent.chmod(0o755)
    assert stored.read_bytes() == before and list(stored.parent.iterdir()) == [stored]


KILLED_AT_EVERY_WRITE = """
import os, pathlib, signal, sys
from slmfast import DedupIndex, dedup, index_format
path, content = pathlib.Path("kept.index"), pathlib.Path("kept.index").read_bytes()
write, calls = index_format._write, 0

def killed(file, at, *contents):
    global calls
    calls += 1
    if calls == last:
        content = bytes(contents[0])
        if at != 64:  # the commit record: 64 bytes of one sector, which a disk writes whole or not at all
            write(file, at, content[: len(content) // 2 if half else None])
        elif not half:
            write(file, at, content)
        os.kill(os.getpid(), signal.SIGKILL)
    return write(file, at, *contents)

for last in range(1, 20):
    for half in (True, False):
        path.write_bytes(content)
        child = os.fork()
        if child == 0:
            index_format._write = killed
            DedupIndex(path).add(["a text that may be lost", "and one more like no other"], [50, 51], threads=1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        left = len(DedupIndex(path))
        ids = [60, 61] if left == 5 else [52, 53]
        result = DedupIndex(path).add(["a text that may be lost", "and one more like no other"], ids, threads=1)
        assert result.n_kept == (2 if left == 5 else 0), (last, half)
        assert len(DedupIndex(path)) == 7
        print(os.WIFSIGNALED(status), left)
"""


def test_a_process_killed_at_any_write_leaves_the_old_rows_or_the_new(stored):
    lines = run(KILLED_AT_EVERY_WRITE, folder=stored.parent).split("\n")
    assert {"True 5", "True 7", "False 7"} == {*lines} - {""}


KILLED_ANY_TIME = """
import hashlib, os, random, signal, time
from slmfast import DedupIndex
rng = random.Random(0)
done = 5
for life in range(25):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        index = DedupIndex("kept.index")
        for n in range(100000):
            text = hashlib.sha256(f"{life} {n}".encode()).hexdigest()
            index.add([text], [1000 + life * 100000 + n], threads=1)
            os.write(writing, b".")
    os.close(writing)
    done += os.read(reading, 1).count(b".")  # however slow the disk is, one add has ended
    time.sleep(rng.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    done += os.read(reading, 1 << 16).count(b".")
    os.close(reading)
    left = len(DedupIndex("kept.index"))
    assert left in (done, done + 1), (left, done)
    done = left
print(done)
"""


def test_a_process_killed_at_any_time_loses_no_add_that_ended(stored):
    assert int(run(KILLED_ANY_TIME, folder=stored.parent)) >= 5 + 25  # each of 25 lives added one or more


def test_a_second_writer_waits_and_is_then_told(stored, monkeypatch):
    one, two = DedupIndex(stored), DedupIndex(stored)
    monkeypatch.setattr(index_file, "LOCK_SECONDS", 0.1)
    with one._file.writing():
        with pytest.raises(UserError, match="another process is writing to the index"):
            two.add(["a text that comes too early"], [50])
        assert two.add(["", None], [51, 52]).keep.all()  # nothing to be stored
    monkeypatch.setattr(index_file, "LOCK_SECONDS", 60.0)
    waits, sleep = threading.Event(), time.sleep
    monkeypatch.setattr(index_file.time, "sleep", lambda seconds: (waits.set(), sleep(seconds)))
    with one._file.writing():
        waiting = threading.Thread(target=two.add, args=(["a text that waits"], [50]))
        waiting.start()
        assert waits.wait(60), "the second writer did not wait"
    waiting.join()
    assert one.add(["a text that waits"], [51]).duplicate_of.tolist() == [50]


def test_without_locks_what_was_written_meanwhile_is_not_written_over(stored, monkeypatch):
    monkeypatch.setattr(index_file, "_try_lock", lambda _: True)
    one, two = DedupIndex(stored), DedupIndex(stored)
    with one._file.writing() as append:
        two.add(["another process adds this one"], [50])
        with pytest.raises(UserError, match="was written to by another process meanwhile"):
            append(None)
    assert one.add(["another process adds this one"], [51]).duplicate_of.tolist() == [50]


TWO_WRITERS = """
import hashlib, sys
from slmfast import DedupIndex, index_file
index_file.MOST_SEGMENTS = 8
index, me = DedupIndex("new.index"), int(sys.argv[1])
for n in range(40):
    shared = f"text {n * 7919:b} of {n}"
    own = hashlib.sha256(f"{me} {n}".encode()).hexdigest()
    result = index.add([shared, own], [2 * (n + 1000 * me), 2 * (n + 1000 * me) + 1], threads=1)
    print(n, *result.duplicate_of.tolist())
"""


def test_two_processes_that_write_lose_nothing_of_each_other(tmp_path):
    children = [
        subprocess.Popen([sys.executable, "-c", TWO_WRITERS, str(me)], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for me in (1, 2)
    ]
    printed = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    one, two = ([list(map(int, line.split())) for line in text.splitlines()] for text in printed)
    assert len(one) == len(two) == 40
    for (n, shared, own), (_, other_shared, other_own) in zip(one, two, strict=True):
        assert shared == other_shared and shared in (2 * (n + 1000), 2 * (n + 2000))  # one of them stands for both
        assert (own, other_own) == (2 * (n + 1000) + 1, 2 * (n + 2000) + 1)
    assert len(DedupIndex(tmp_path / "new.index")) == 120
    assert [path.name for path in tmp_path.iterdir()] == ["new.index"]


def test_a_failed_write_adds_nothing(stored, monkeypatch):
    before = stored.read_bytes()
    index = DedupIndex(stored)
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"can't be written \(No space left on device\)"):
        index.add(["a text for which there is no room"], [50])
    monkeypatch.setattr(os, "fsync", real)
    assert stored.read_bytes() == before and len(index) == 5
    assert index.add(["a text for which there is no room"], [50]).n_kept == 1


MEMORY = """
import sys
import numpy as np, pyarrow as pa
from slmfast import DedupIndex

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

def texts(begin, end):
    return pa.array([f"{n * 104729:b} {n * 7919:x} {n}" for n in range(begin, end)])

rows = 200_000
if sys.argv[1] == "build":
    DedupIndex("large.index", 0).add(texts(0, rows), np.arange(rows))
else:
    few = texts(rows, rows + 1000)
    DedupIndex("small.index", 0).add(few, np.arange(1000), threads=1)
    before = anonymous()
    index = DedupIndex("large.index", 0)
    assert index.add(few, np.arange(rows, rows + 1000), threads=1).n_kept == 1000
    print(anonymous() - before, len(index))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as Linux tells it")
def test_what_is_stored_takes_no_memory_of_its_own(tmp_path):
    run(MEMORY, "build", folder=tmp_path)
    grown, rows = map(float, run(MEMORY, "open", folder=tmp_path).split())
    size = (tmp_path / "large.index").stat().st_size / 2**20
    assert rows == 201_000 and size > 12
    assert grown < size / 4, f"{grown:.1f} MiB more for a file of {size:.1f} MiB"


def test_stored_columns_are_what_was_added(stored):
    segments = DedupIndex(stored)._file.segments
    assert [segment.ids.tolist() for segment in segments] == [[7, -3, 12, 2**62], [0]]
    assert [(segment.lowest, segment.highest) for segment in segments] == [(-3, 2**62), (0, 0)]
    texts = [
        segment.text_bytes[segment.offsets[row] : segment.offsets[row + 1]].tobytes().decode()
        for segment in segments
        for row in range(len(segment))
    ]
    expected = ["a short text", "请写一首关于春天的短诗", "ünïcödé 1⁄2 and fine", "ab"]
    assert texts == [*expected, "a third text, in a segment of its own"]
    assert not any(np.shares_memory(segments[0].ids, segment.ids) for segment in segments[1:])


def test_a_merge_keeps_links_and_permissions(stored, monkeypatch):
    monkeypatch.setattr(index_file, "MOST_SEGMENTS", 2)
    stored.chmod(0o640)
    link = stored.with_name("link.index")
    link.symlink_to(stored.name)
    DedupIndex(link).add(["a text that is one too many"], [50])
    assert link.is_symlink() and stored.stat().st_mode & 0o777 == 0o640
    index = DedupIndex(stored)
    assert len(index._file.segments) == 2 and len(index) == 6
    assert index.add([TEXTS[1], "a third text, in a segment of its own"], [51, 52]).duplicate_of.tolist() == [-3, 0]


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    DedupIndex(tmp_path / "kept.index").add(["a text"], [1])
    assert len(DedupIndex(tmp_path / "kept.index")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["kept.index"]
