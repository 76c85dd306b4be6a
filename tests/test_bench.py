"""bench/dedup.py: its last line, its tables, and that no ratio is given to a peer who finds other pairs."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from slmfast.errors import UserError

BENCH = Path(__file__).parent.parent / "bench"
KEYS = {"case", "peer", "version", "ours", "theirs", "unit", "ratio", "same_answer"}

# A peer that joins by brute force and then changes its answer as `CHANGE` says.
JOINS = """
import json, sys
import numpy as np
request = json.loads(open(sys.argv[1]).read())
values = np.load(request["input"])
i, j = np.nonzero(np.bitwise_count(values[:, None] ^ values[None]) <= request["k"])
i, j = i[i < j], j[i < j]
np.save(request["output"], np.stack([CHANGE]))
print("a remark of the peer's")
print(json.dumps({"seconds": 0.5, "version": "1.2.3", "peak_bytes": 1}))
"""


@pytest.fixture
def bench(monkeypatch):
    """The benchmark as `slmfast bench` loads it, each of whose calls is timed once."""
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.delenv("SLMFAST_DATA", raising=False)
    spec = importlib.util.spec_from_file_location("bench_dedup", BENCH / "dedup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    monkeypatch.setattr(importlib.import_module("timing"), "ENOUGH_SECONDS", 0.0)
    monkeypatch.setattr(importlib.import_module("inputs"), "data_folder", lambda: None)
    return module


def run(bench, capsys, peers: Path, *arguments: str) -> tuple[int, dict, str]:
    """The exit code, the JSON object of the last line, and what stood before it."""
    code = bench.main(["--peers", str(peers), *arguments])
    *before, last = capsys.readouterr().out.splitlines()
    return code, json.loads(last), "\n".join(before)


def brute_force(values: np.ndarray, k: int) -> int:
    i, j = np.nonzero(np.bitwise_count(values[:, None] ^ values[None]) <= k)
    return int((i < j).sum())


@pytest.mark.parametrize("k", [0, 3])
def test_the_last_line_is_the_document(bench, capsys, tmp_path, k):
    out = tmp_path / "figures" / "dedup.json"
    arguments = ["--case", "join", "--n", "1000", "--k", str(k), "--threads", "2", "--out", str(out)]
    code, document, before = run(bench, capsys, tmp_path, *arguments)
    assert code == 0
    assert document.keys() == {"bench", "device", "commit", "results"} and document["bench"] == "dedup"
    assert json.loads(out.read_text()) == document
    rows = document["results"]
    assert all(row.keys() == KEYS for row in rows)
    inputs = sys.modules["inputs"]
    joins = [row for row in rows if row["peer"] == "numpy brute force (1 thread)"]
    kinds = (inputs.uniform, inputs.one_row_in_ten_near, *inputs.ADVERSARIAL)
    draws = [(draw, count) for draw in kinds for count in ("1 thread", "2 threads")]
    for row, (draw, threads) in zip(joins, draws, strict=True):
        values = draw(1000, 0)
        name = draw.__name__.replace("_", " ")
        case = f"join, {name}, n={len(values):,}, k={k}, pairs={brute_force(values, k):,}, {threads} (1 run each)"
        assert row["case"].partition(", predicted")[0] == case
        assert row["same_answer"] is True and row["version"] == np.__version__
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"])
        assert case in before
    *families, worst = rows[-1 - len(inputs.ADVERSARIAL) :]
    for row, draw in zip(families, inputs.ADVERSARIAL, strict=True):
        assert f"({draw.__name__.replace('_', ' ')}) over uniform" in row["case"] and "pairs/s" in row["case"]
        assert f"pairs={brute_force(draw(1000, 0), k):,} (" in row["case"] and row["peer"] is None
        assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
    assert worst["ratio"] == max(row["ratio"] for row in families) and worst["case"].startswith("slowest of 6")
    assert "x uniform's time" in before and "x as fast" in before
    assert all("predicted if uniform" in row["case"] for row in rows)


def test_peers_that_are_not_installed_are_named_with_the_remedy(bench, capsys, tmp_path):
    _, document, before = run(bench, capsys, tmp_path, "--case", "k8", "--n", "1000")
    assert [row["peer"] for row in document["results"]] == [None]
    last = before.splitlines()[-1]
    assert all(peer.package in last for peer in bench.PEERS) and "slmfast bench dedup --install-peers" in last


def install_fake(bench, monkeypatch, folder: Path, source: str, *, one_thread: bool = False) -> None:
    """Puts a script in the place of simhash-pybind's, run by this interpreter."""
    joins, peers = sys.modules["joins"], sys.modules["peers"]
    (folder / "fake.py").write_text(source)
    fake = peers.Peer("fake", "0", "fake peer", str(folder / "fake.py"), (), one_thread)
    interpreter = peers.PeerFolder(folder).python(fake)
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    interpreter.chmod(0o755)
    (folder / "fake" / ".installed").touch()
    monkeypatch.setattr(joins, "SIMHASH_PYBIND", fake)


@pytest.mark.parametrize("change", ["i, j", "j[::-1], i[::-1]"], ids=["as they are", "turned around"])
def test_a_peer_with_the_same_pairs_gets_a_ratio(bench, capsys, monkeypatch, tmp_path, change):
    install_fake(bench, monkeypatch, tmp_path, JOINS.replace("CHANGE", change))
    code, document, _ = run(bench, capsys, tmp_path, "--case", "k8", "--n", "1000")
    row = document["results"][-1]
    assert (code, row["peer"], row["version"], row["same_answer"]) == (0, "fake peer", "1.2.3", True)
    assert row["theirs"] == 0.5 and row["ratio"] == pytest.approx(0.5 / row["ours"])


def test_a_peer_of_one_thread_meets_ours_on_one_and_on_all(bench, capsys, monkeypatch, tmp_path):
    install_fake(bench, monkeypatch, tmp_path, JOINS.replace("CHANGE", "i, j"), one_thread=True)
    _, document, _ = run(bench, capsys, tmp_path, "--case", "k8", "--n", "1000", "--threads", "2")
    alone, one, two = document["results"]
    assert (alone["peer"], one["peer"], two["peer"]) == (None, "fake peer", "fake peer")
    assert ", 2 threads" in alone["case"] and ", 1 thread (" in one["case"] and ", 2 threads (" in two["case"]
    for row in (one, two):
        assert row["theirs"] == 0.5 and row["same_answer"] is True and "1 run each" in row["case"]


@pytest.mark.parametrize(
    "change",
    ["i[1:], j[1:]", "np.append(i, 0), np.append(j, 1)", "np.append(i, i[0]), np.append(j, j[0])"],
    ids=["one pair less", "one pair more", "one pair twice"],
)
def test_a_peer_with_other_pairs_gets_no_ratio(bench, capsys, monkeypatch, tmp_path, change):
    install_fake(bench, monkeypatch, tmp_path, JOINS.replace("CHANGE", change))
    code, document, before = run(bench, capsys, tmp_path, "--case", "k8", "--n", "1000")
    row = document["results"][-1]
    assert code == 1
    assert (row["peer"], row["same_answer"], row["ratio"]) == ("fake peer", False, None)
    assert "NO: no ratio" in before


def test_a_peer_that_fails_is_a_row_that_says_why(bench, capsys, monkeypatch, tmp_path):
    install_fake(bench, monkeypatch, tmp_path, "raise SystemExit('out of luck')")
    code, document, before = run(bench, capsys, tmp_path, "--case", "k8", "--n", "1000")
    row = document["results"][-1]
    assert (code, row["peer"], row["theirs"], row["ratio"]) == (0, "fake peer", None, None)
    assert "fake.py ended with code 1: out of luck" in row["case"]
    assert "no figure: fake peer, join, uniform, k=8: fake.py ended with code 1: out of luck" in before


def test_the_prediction_stands_in_the_table_and_in_the_case(bench, capsys, monkeypatch, tmp_path):
    joins = sys.modules["joins"]
    monkeypatch.setattr(joins._native, "join_plan", lambda n, k: (5, 2, 14.0), raising=False)
    _, document, before = run(bench, capsys, tmp_path, "--case", "k8", "--n", "1000", "--threads", "2")
    assert document["results"][0]["case"].endswith(", predicted if uniform 7 s")
    assert "predicted" in before and "  7 s" in before


def test_memory_a_record_with_and_without_the_input(bench, capsys, tmp_path):
    _, document, _ = run(bench, capsys, tmp_path, "--case", "large", "--large-n", "300000")
    seconds, without, with_input = document["results"]
    assert seconds["unit"] == "s" and "n=300,000" in seconds["case"]
    assert with_input["ours"] == without["ours"] + 8  # a fingerprint has eight bytes
    assert without["ours"] > 0


def test_texts_and_the_index(bench, capsys, tmp_path):
    arguments = ["--case", "end-to-end", "--case", "index", "--texts", "3000", "--index-rows", "3000"]
    code, document, _ = run(bench, capsys, tmp_path, *arguments)
    rate, index = document["results"]
    assert code == 0 and rate["unit"] == "rows/s"
    assert index["same_answer"] is True and "append 30 to 3,000 rows" in index["case"]
    assert index["ratio"] == pytest.approx(index["ours"] / index["theirs"])


def test_a_join_whose_process_is_killed_costs_no_other_figure(bench, capsys, monkeypatch, tmp_path):
    dying = tmp_path / "measured_child.py"
    dying.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(sys.modules["own_child"], "CHILD", dying)
    code, document, before = run(bench, capsys, tmp_path, "--case", "k8", "--n", "1000", "--case", "large")
    assert code == 1 and len(document["results"]) == 1 and "k=8" in document["results"][0]["case"]
    assert "no figure: join, uniform with a neighbour for 1 row in 1,000, n=5,000,000, k=3: our process ended" in before
    assert "with code -9: it said nothing" in before


def test_a_case_that_fails_keeps_what_it_has_and_lets_the_others_run(bench, capsys, monkeypatch, tmp_path):
    def failing(context, sizes):
        yield sys.modules["result_table"].Result(group="joins", case="the first", ours=1.0, unit="s")
        raise MemoryError("too many rows")

    monkeypatch.setitem(bench.CASES, "join", failing)
    out = tmp_path / "dedup.json"
    arguments = ["--case", "join", "--case", "k8", "--n", "1000", "--out", str(out)]
    code, document, before = run(bench, capsys, tmp_path, *arguments)
    first, second = document["results"]
    assert code == 1 and first["case"] == "the first" and "k=8" in second["case"]
    assert "no figure: join: MemoryError: too many rows" in before and json.loads(out.read_text()) == document


@pytest.mark.parametrize("flag", ["--n", "--large-n", "--texts", "--index-rows"])
def test_too_few_rows_are_refused(bench, flag):
    with pytest.raises(UserError, match=f"{flag} must be at least 1000, not 999"):
        bench.main([flag, "999"])
