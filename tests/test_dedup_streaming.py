"""`slmfast dedup` on files in processes of its own: memory that stays small, and a run that is killed."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from slmfast.dedup_files import dedup_files


def child(code: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


KILLED = """
import os, signal, sys
from pathlib import Path
from slmfast import dedup_files
dedup_files._Rows.write_dropped = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
dedup_files.dedup_files([Path(sys.argv[1])], "text", Path(sys.argv[2]))
"""


def test_a_killed_run_leaves_nothing_that_looks_whole(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "one text"}\n{"text": "One text"}\n{"text": "another"}\n')
    assert child(KILLED, path, tmp_path / "out").returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"t.jsonl", ".out.tmp", ".out.lock"}  # the file, what was being written, and whose it was
    dedup_files([path], "text", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "t.jsonl"}


LIMITED = """
import resource, sys
from slmfast.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
sys.exit(main(["dedup", sys.argv[1], "--column", "text", "-o", sys.argv[2]]))
"""


def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(f'{{"text": "{i:0100}"}}\n' for i in range(1000)))
    done = child(LIMITED, path, tmp_path / "out")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith(f"slmfast: {tmp_path / 'out'} can't be written (")
    assert "make room" in done.stderr
    assert list(tmp_path.iterdir()) == [path]


# Runs dedup over a small table, then over a large one, and prints by how many bytes the peak of the anonymous memory
# of the second exceeds the memory in use after the first; then the same for a block of memory of a known size.
MEASURED = """
import sys, threading, time
from pathlib import Path
import pyarrow
from slmfast import json_tables, store, table_files
from slmfast.dedup_files import dedup_files

pyarrow.set_cpu_count(1)  # each thread has an arena of its own, so growth would depend on who does what
pyarrow.set_io_thread_count(1)
store.BYTES_PER_SHARD = 4 << 20  # these are in proportion to the table
json_tables.BLOCK_BYTES = table_files.BATCH_BYTES = 1 << 20
table_files._CSV_BLOCKS = (1 << 18, 1 << 20)

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

def growth(work):
    before = peak = anonymous()
    done = threading.Event()
    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    held = work()
    time.sleep(0.02)
    done.set()
    watcher.join()
    return peak - before

small, large, output = map(Path, sys.argv[1:])
dedup_files([small], "text", output / "small", threads=1)
print(growth(lambda: dedup_files([large], "text", output / "large", threads=1)))
print(growth(lambda: b"x" * (50 << 20)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_a_table_larger_than_the_memory_streams(kind, tmp_path):
    digits = random.Random(6).randbytes(120_000_000).hex()
    texts = [digits[i : i + 3000] for i in range(0, len(digits), 3000)]
    texts[1::20] = texts[0::20]
    table = pa.table({"id": range(len(texts)), "text": texts})
    for name, rows in (("small", table.slice(0, 6000)), ("large", table)):
        path = tmp_path / f"{name}.{kind}"
        if kind == "parquet":
            pq.write_table(rows, path, row_group_size=len(rows))
        elif kind == "csv":
            pyarrow.csv.write_csv(rows, path)
        else:
            path.write_text("".join(f'{{"id": {i}, "text": "{texts[i]}"}}\n' for i in range(len(rows))))
    small, large, size = tmp_path / f"small.{kind}", tmp_path / f"large.{kind}", len(digits)
    done = child(MEASURED, small, large, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    grown, seen = map(int, done.stdout.split())
    assert seen > 45 << 20  # the measure sees what is held
    assert size > 3 * grown, f"{grown >> 20} MiB for a table of {size >> 20} MiB"
    assert pq.read_table(tmp_path / "out" / "large" / "kept", columns=["id"]).num_rows == 76_000
