"""bench/dedup.py: its last line, and that no ratio is given to a peer who finds other pairs."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).parent.parent / "bench" / "dedup.py"


@pytest.fixture
def bench(monkeypatch):
    """The benchmark as a module, each of whose cases runs once."""
    spec = importlib.util.spec_from_file_location("bench_dedup", BENCH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ENOUGH_SECONDS", 0.0)
    return module


def run(bench, capsys, *arguments) -> tuple[int, dict]:
    """The exit code, and the JSON object of the last line."""
    code = bench.main(["--n", "1000", *arguments])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def brute_force(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    i, j = np.nonzero(np.bitwise_count(values[:, None] ^ values[None]) <= k)
    return i[i < j], j[i < j]


@pytest.mark.parametrize("k", [0, 3])
def test_the_last_line_is_the_document(bench, capsys, k):
    code, document = run(bench, capsys, "--k", str(k))
    assert code == 0
    assert document.keys() == {"bench", "device", "commit", "results"} and document["bench"] == "dedup"
    rows = document["results"]
    keys = {"case", "peer", "version", "ours", "theirs", "unit", "ratio", "same_answer"}
    assert all(row.keys() == keys for row in rows)
    assert rows[0]["unit"] == "MB/s" and rows[0]["peer"] is rows[0]["ratio"] is rows[0]["same_answer"] is None
    joins = [row for row in rows if row["peer"] == "numpy brute force"]
    for row, draw in zip(joins, (bench.uniform, bench.templates), strict=True):
        values = draw(1000, 0)
        pairs = len(brute_force(values, k)[0])
        assert row["case"] == f"join, {draw.__name__}, n={len(values):,}, k={k}, pairs={pairs:,}"
        assert row["same_answer"] is True and row["version"] == np.__version__
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"])


def wrong(change):
    """A join by brute force whose pairs are then changed."""
    return lambda values, k: (lambda: change(*brute_force(values, k)), lambda pairs: pairs)


@pytest.mark.parametrize(
    "change",
    [lambda i, j: (i[1:], j[1:]), lambda i, j: (np.append(i, 0), np.append(j, 1)), lambda i, j: (j, i)],
    ids=["one pair less", "one pair more", "turned around"],
)
def test_a_peer_with_other_pairs_gets_no_ratio(bench, capsys, monkeypatch, change):
    honest, liar = bench.Peer("honest", "numpy", wrong(lambda i, j: (i, j))), bench.Peer("liar", "numpy", wrong(change))
    absent = bench.Peer("absent", "no-such-package-anywhere", wrong(lambda i, j: (i, j)))
    monkeypatch.setattr(bench, "peers", lambda threads: [honest, liar, absent])
    code, document = run(bench, capsys)
    assert code == 1
    found = [(row["peer"], row["same_answer"], row["ratio"] is None) for row in document["results"][1:]]
    assert found == [("honest", True, False), ("liar", False, True)] * 2


def test_a_missing_peer_is_named_with_its_remedy(bench, capsys, monkeypatch):
    absent = bench.Peer("absent", "no-such-package-anywhere", wrong(lambda i, j: (i, j)))
    monkeypatch.setattr(bench, "peers", lambda threads: [absent])
    assert bench.main(["--n", "1000"]) == 0
    assert "absent: not installed; pip install no-such-package-anywhere" in capsys.readouterr().out


def test_too_few_rows_are_refused(bench, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--n", "999"])
    assert stopped.value.code == 2
    assert "--n must be at least 1000" in capsys.readouterr().err
