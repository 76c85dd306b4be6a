"""Disks that fill up, folders that can't be written, two writers of one folder: a clear line, and no damage.

A full disk is a small tmpfs, and a read-only folder another one, where mounting is allowed; else a limit on the size of
files and a folder's mode stand for them.
"""

import fcntl
import os
import resource
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from slmfast.cli import main
from slmfast.errors import UserError
from slmfast.store import atomic_path, only_writer

RUN = [
    "world.size=300",
    "diversify.target=100",
    "classify.unit_rows=32",
    "regenerate.unit_rows=32",
    "rate.unit_rows=32",
    "align.sft_size=60",
    "threads=1",
]


def run(capfd, run_dir: Path, until: str = "align") -> tuple[int, str, str]:
    """The data stages of a small run: exit code, what it printed, and the last line of its errors."""
    overrides = [part for override in RUN for part in ("--set", override)]
    code = main(["run", "--run-dir", str(run_dir), "--until", until, *overrides])
    output, errors = capfd.readouterr()
    assert "Traceback" not in errors
    return code, output, (errors.splitlines() or [""])[-1]


def tables(run_dir: Path) -> dict[str, bytes]:
    """Every data file of a run."""
    found = sorted(run_dir.rglob("*.parquet"))
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in found}


class Disk:
    """A folder with room for so many bytes, or none to write at all."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
        self.mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True)

    @contextmanager
    def room(self, size: int):
        """Room for `size` bytes in all or, where nothing can be mounted, for a 32nd of it in each file."""
        if self.mounted:
            self.remount(f"size={size}")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 32, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            if self.mounted:
                self.remount("size=64m")

    @contextmanager
    def read_only(self):
        """Nothing below can be written."""
        if self.mounted:
            self.remount("ro")
            yield
            self.remount("rw")
            return
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere, and may not mount anything here")
        folders = [self.folder, *(path for path in self.folder.rglob("*") if path.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        yield
        for folder in folders:
            folder.chmod(0o755)

    def end(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.end()


@pytest.mark.slow
def test_a_run_on_a_full_disk_stops_in_one_line_and_goes_on_when_there_is_room(disk, tmp_path, capfd):
    """Twice full, then with room: the run goes on each time, and ends with the bytes of one that was never stopped."""
    run_dir, reached = disk.folder / "run", []
    for size in (150_000, 450_000):
        with disk.room(size):
            code, output, error = run(capfd, run_dir)
        assert code == 2
        assert error.startswith(f"slmfast: {run_dir}/"), error
        assert ": free some room" in error or "see to it and run again" in error
        assert not list(run_dir.rglob(".*.tmp")), "what was half-written has gone"
        reached.append(output.count(": running"))
        if not disk.mounted:  # a limit on each file stops no later stage than the first that writes a large one
            assert run(capfd, run_dir, "collect")[0] == 0
    assert reached[0] < reached[1], "the second stop comes in a later stage"
    code, output, _ = run(capfd, run_dir)
    assert code == 0 and "collect: up to date" in output
    assert run(capfd, tmp_path / "calm")[0] == 0
    assert tables(run_dir) == tables(tmp_path / "calm")


def test_a_folder_that_can_not_be_written_is_one_line(disk, capfd):
    (disk.folder / "run").mkdir()
    (disk.folder / "run" / ".lock").touch()
    with disk.read_only():
        for run_dir in (disk.folder / "run", disk.folder / "new", disk.folder / "new" / "deeper"):
            code, _, error = run(capfd, run_dir)
            assert code == 2
            assert error.startswith(f"slmfast: {disk.folder}/")
            assert ": Read-only" in error or ": Permission" in error
            assert error.endswith(("give a folder that can be written to", "name another"))
    assert [path.name for path in disk.folder.rglob("*")] == ["run", ".lock"]


def test_a_file_without_room_is_named_and_the_one_before_stays(disk):
    path = disk.folder / "file"
    path.write_bytes(b"whole")
    with disk.room(200_000), pytest.raises(OSError, match=f"'{path}'"), atomic_path(path) as temporary:
        temporary.write_bytes(bytes(1 << 20))
    assert path.read_bytes() == b"whole"
    assert [path.name for path in disk.folder.iterdir()] == ["file"]


def test_two_writers_of_one_folder(tmp_path):
    with only_writer(tmp_path / "out"):
        with pytest.raises(UserError, match=r"out is being written by another run: wait for it, or give another"):
            with only_writer(tmp_path / "out"):
                pass
        with only_writer(tmp_path / "other"):
            pass
    with only_writer(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == [], "no lock is left behind"


@pytest.mark.parametrize(
    "command",
    [
        ["categorize", "in", "-o", "out"],
        ["fuse", "a=1", "-o", "out"],
        ["train", "sft", "data", "--model", "m", "-o", "out", "--set", "learning_rate=1e-5"],
    ],
)
def test_a_command_leaves_the_folder_to_who_writes_it_already(command, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = tmp_path / "raw.jsonl"
    raw.write_text('{"instruction": "Name a colour.", "output": "Blue."}\n')
    assert main(["collect", str(raw), "--format", "alpaca", "-o", "in"]) == 0
    capfd.readouterr()
    with (tmp_path / ".out.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(command) == 2
    assert "out is being written by another run: wait for it" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
