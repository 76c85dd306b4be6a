"""The choice among kernels: measured once, remembered in the process and in a file, the same in the next run."""

import json

import pytest

from slmfast.kernels import fastest as module
from slmfast.kernels.fastest import bucket, cache_file, fastest

CANDIDATES = {"fused": lambda: "by fused", "tiled": lambda: "by tiled"}


class Clock:
    """A timer that gives fixed times by a candidate's result, and counts its calls."""

    def __init__(self, **times):
        self.times, self.calls = times, 0

    def __call__(self, candidate):
        self.calls += 1
        return self.times[candidate().removeprefix("by ")]


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_chosen", {})
    return tmp_path / "deep" / "fastest.json"


def new_process(monkeypatch):
    monkeypatch.setattr(module, "_chosen", {})


def test_the_fastest_is_chosen_and_measured_once(path):
    clock = Clock(fused=2.0, tiled=1.0)
    assert [fastest("shape", CANDIDATES, clock, path) for _ in range(3)] == ["tiled"] * 3
    assert clock.calls == 2


def test_the_next_run_takes_the_same_kernel_though_it_would_measure_otherwise(path, monkeypatch):
    fastest("shape", CANDIDATES, Clock(fused=2.0, tiled=1.0), path)
    new_process(monkeypatch)
    other = Clock(fused=1.0, tiled=2.0)
    assert fastest("shape", CANDIDATES, other, path) == "tiled"
    assert other.calls == 0
    assert fastest("another shape", CANDIDATES, other, path) == "fused"
    assert json.loads(path.read_text()) == {"shape": "tiled", "another shape": "fused"}
    # the file and its lock, no temporary
    assert sorted(file.name for file in path.parent.iterdir()) == ["fastest.json", "fastest.lock"]


@pytest.mark.parametrize(
    "damage", ["", "{", "[1, 2]", "null", '{"shape": 3}', '{"shape": "a kernel of another version"}', "\udcff"]
)
def test_a_damaged_file_is_measured_anew_and_mended(path, damage):
    path.parent.mkdir()
    path.write_bytes(damage.encode("utf-8", "surrogateescape"))
    assert fastest("shape", CANDIDATES, Clock(fused=1.0, tiled=2.0), path) == "fused"
    assert json.loads(path.read_text()) == {"shape": "fused"}


def test_of_two_processes_that_measure_at_once_the_first_decides(path):
    class Slow(Clock):
        def __call__(self, candidate):
            path.parent.mkdir(exist_ok=True)
            path.write_text('{"shape": "fused", "other": "tiled"}')
            return super().__call__(candidate)

    assert fastest("shape", CANDIDATES, Slow(fused=2.0, tiled=1.0), path) == "fused"
    assert json.loads(path.read_text())["other"] == "tiled"


def test_a_folder_that_cannot_be_written_is_said_and_not_fatal(tmp_path, monkeypatch):
    new_process(monkeypatch)
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "fastest.json"
    clock = Clock(fused=2.0, tiled=1.0)
    with pytest.warns(UserWarning, match="keeps no choice of kernel"):
        assert fastest("shape", CANDIDATES, clock, path) == "tiled"
    assert fastest("shape", CANDIDATES, clock, path) == "tiled" and clock.calls == 2


def test_a_single_candidate_needs_no_clock(path):
    assert fastest("shape", {"fused": lambda: None}, None, path) == "fused"
    assert not path.exists()


def test_the_file_lies_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file() == tmp_path / "slmfast" / "fastest.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_file() == tmp_path / "home" / ".cache" / "slmfast" / "fastest.json"


def test_buckets_are_powers_of_two():
    assert [bucket(n) for n in (0, 1, 2, 3, 4, 5, 4096, 4097)] == [1, 1, 2, 4, 4, 8, 4096, 8192]
