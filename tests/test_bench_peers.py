"""How the benchmark runs its peers: the protocol, the climb to the largest size, and a real environment."""

import importlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("peers")


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("timing")


ECHO = """
import json, sys
sys.path.insert(0, {scripts!r})
import numpy as np
from protocol import read_texts, serve, timed

def length(request):
    column = read_texts(request["input"])["text"]
    return timed(lambda: np.array([len(text) * request["times"] for text in column.to_pylist()]))

serve("numpy", {{"length": length}})
"""


def asked(peers, tmp_path: Path, source: str, timeout: float = 60.0):
    script = tmp_path / "peer.py"
    script.write_text(source)
    column = pa.chunked_array([["ab", "狐狸"], ["c"]])
    return peers.ask(Path(sys.executable), script, "length", column, {"times": 3}, timeout=timeout)


def test_an_answer_comes_back_with_its_time_and_version(peers, tmp_path):
    answer = asked(peers, tmp_path, ECHO.format(scripts=str(BENCH / "peer_scripts")))
    assert answer.value.tolist() == [6, 6, 3] and answer.version == np.__version__
    assert answer.seconds > 0 and answer.peak_bytes > 1 << 20


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise ValueError('no such row')", r"peer.py ended with code 1: ValueError: no such row"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", r"peer.py ended with code -9: it said nothing"),
        ("print('hello')", "peer.py gave no answer that can be read"),
        ('print(\'{"seconds": 1, "version": "1", "peak_bytes": 1}\')', "peer.py gave no answer that can be read"),
        ("", "peer.py gave no answer that can be read"),
    ],
    ids=["raises", "killed", "no JSON", "no file", "silent"],
)
def test_a_peer_that_breaks_the_protocol_is_told_in_a_line(peers, tmp_path, source, message):
    with pytest.raises(peers.PeerFailed, match=message) as failed:
        asked(peers, tmp_path, source)
    assert "\n" not in str(failed.value)


def test_a_peer_out_of_time_is_killed_with_its_children(peers, tmp_path):
    child = tmp_path / "child"
    source = f"""
import os, subprocess, sys, time
sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(child)!r} + ".part", "w").write(str(sleeper.pid))
os.replace({str(child)!r} + ".part", {str(child)!r})
time.sleep(600)
"""
    for timeout in (2, 10, 50):  # the first is enough unless the machine is busy
        with pytest.raises(peers.PeerFailed, match=f"peer.py was stopped after {timeout} s"):
            asked(peers, tmp_path, source, timeout=timeout)
        if child.exists():
            break
    pid = int(child.read_text())
    for _ in range(600):
        if not alive(pid):
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} outlived its parent")


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_both_sides_run_equally_often(timing):
    for seconds, runs in ((0.3, 3), (0.8, 2), (2.5, 1)):
        ours, theirs = [], []

        def peer(seconds=seconds, theirs=theirs):
            theirs.append(seconds)
            return seconds + len(theirs), "theirs"

        race = timing.in_turn(lambda ours=ours: ours.append(0), peer, (seconds, "first"))
        assert len(ours) == race.runs == len(theirs) + 1 and race.theirs == seconds
        assert race.runs == runs
    assert timing.described_runs(1) == "1 run each" and timing.described_runs(3) == "best of 3 runs each"


class Clock:
    """A peer whose seconds are a function of the size and the settings; it notes what it was asked."""

    def __init__(self, peers, seconds) -> None:
        self.peers, self.seconds, self.asked = peers, seconds, []

    def __call__(self, n: int, settings):
        self.asked.append((n, settings["blocks"]))
        seconds = self.seconds(n, settings["blocks"])
        if seconds is None:
            raise self.peers.PeerFailed("it fell over")
        return self.peers.Answer(seconds, "1", 1, np.zeros(0))


def choices(*blocks: int) -> list[dict[str, int]]:
    return [{"blocks": one} for one in blocks]


def test_the_climb_ends_at_the_size_asked_for_with_the_fastest_settings(peers, timing):
    clock = Clock(peers, lambda n, blocks: n * blocks / 1e6)
    reached = timing.climb(1_000_000, choices(9, 4, 5), clock, limit=100)
    assert (reached.n, reached.settings, reached.note) == (1_000_000, {"blocks": 4}, "")
    assert [blocks for n, blocks in clock.asked if n == 1_000_000] == [4, 5]  # 9 is more than half as slow again
    assert {n for n, _ in clock.asked} == {8_000, 40_000, 200_000, 1_000_000}


def test_the_climb_stops_before_a_size_that_would_take_too_long(peers, timing):
    clock = Clock(peers, lambda n, blocks: (n / 1e5) ** 2)  # 200,000: 4 s; 1,000,000: 100 s
    reached = timing.climb(1_000_000, choices(4), clock, limit=99)
    assert reached.n == 200_000 and reached.note == "no more within 99 s"
    assert max(n for n, _ in clock.asked) == 200_000


def test_the_climb_goes_on_without_settings_that_fail(peers, timing):
    clock = Clock(peers, lambda n, blocks: None if blocks == 4 and n > 10_000 else n * blocks / 1e6)
    reached = timing.climb(200_000, choices(4, 5), clock, limit=100)
    assert (reached.n, reached.settings) == (200_000, {"blocks": 5})
    assert (200_000, 4) not in clock.asked


def test_the_climb_keeps_the_size_below_the_one_that_fails(peers, timing):
    clock = Clock(peers, lambda n, blocks: None if n == 200_000 else 1.0)
    reached = timing.climb(200_000, choices(4), clock, limit=100)
    assert (reached.n, reached.note) == (40_000, "it fell over")


def test_a_peer_that_always_fails_has_no_size(peers, timing):
    with pytest.raises(peers.PeerFailed, match="it fell over"):
        timing.climb(200_000, choices(4, 5), Clock(peers, lambda n, blocks: None), limit=100)


@pytest.mark.parametrize(("power", "held"), [(0.5, 1.0), (1.0, 1.0), (1.6, 1.6), (3.0, 2.0)])
def test_growth_is_taken_from_the_last_two_sizes(timing, power, held):
    history = [(1_000, 99.0), (10_000, 2.0), (50_000, 2.0 * 5**power)]
    assert timing.expected(history, 500_000) == pytest.approx(2.0 * 5**power * 10**held)


def index_within_reach(folder: Path) -> bool:
    """Whether pip, without any of our code, gets a small package that has nothing to do with the peers."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-cache-dir", "-d", folder / "probe"]
    return subprocess.run([*command, "iniconfig"], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_a_real_peer_in_an_environment_of_its_own(peers, tmp_path):
    folder = peers.PeerFolder(tmp_path)
    assert peers.SIMHASH in folder.missing()
    if not index_within_reach(tmp_path):
        pytest.skip("no package index within reach")
    folder.install(peers.SIMHASH)
    assert folder.has(peers.SIMHASH) and peers.SIMHASH not in folder.missing()
    assert not folder.has(replace(peers.SIMHASH, install=(("numpy", "simhash==9"),)))  # another version is pinned
    texts = [
        "请写一个关于狐狸的短篇故事。",
        "Write a short story about a fox.",
        "WRITE a short story about a fox!",
        "",
        "?!",
    ]
    answer = folder.ask(peers.SIMHASH, "fingerprints", pa.chunked_array([texts]), {"threads": 1})
    values, has_features = answer.value
    assert answer.version == peers.SIMHASH.version and has_features.tolist() == [1, 1, 1, 0, 0]
    assert values[1] == values[2] != values[0] and values[3] == values[4]  # letters alone count to it


@pytest.mark.slow
def test_an_installation_that_fails_is_told_in_a_line_and_counts_as_missing(peers, tmp_path):
    broken = peers.Peer("broken", "1", "broken", "simhash_md5.py", ((os.fspath(tmp_path / "no such package"),),))
    folder = peers.PeerFolder(tmp_path / "peers")
    with pytest.raises(peers.PeerFailed, match="broken can't be installed: ") as failed:
        folder.install(broken)
    assert "\n" not in str(failed.value) and not folder.has(broken)
