"""The evaluation benchmark: its gate, its refusals, and one small run over real items."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from slmfast.errors import UserError

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch):
    """The benchmark as `slmfast bench` loads it, each of whose calls is timed once."""
    monkeypatch.syspath_prepend(BENCH)
    spec = importlib.util.spec_from_file_location("bench_evaluation", BENCH / "evaluation.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    monkeypatch.setattr(importlib.import_module("timing"), "ENOUGH_SECONDS", 0.0)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


OURS = [(-1.0, False), (-2.0, False), (-3.0, True), (-4.0, False)] * 2


def test_the_gate(bench):
    same_answer, accuracy, furthest = bench.same_answer, bench.accuracy, bench.furthest
    close = [(score + 9e-5, greedy) for score, greedy in OURS]
    assert same_answer(OURS, close, [0, 1], 4)
    assert furthest(OURS, close) == pytest.approx(9e-5) and accuracy(OURS, [0, 1], 4) == 0.5
    assert not same_answer(OURS, [(score + 2e-4, greedy) for score, greedy in OURS], [0, 1], 4)
    assert not same_answer(OURS, [(score, not greedy) for score, greedy in OURS], [0, 1], 4)
    assert not same_answer(OURS, OURS[:4], [0, 1], 4)
    assert not same_answer([(float("nan"), False)] * 4, [(float("nan"), False)] * 4, [0], 4)
    near = [(-1.0, False), (-1.00001, False)]
    assert not same_answer(near, near[::-1], [0], 2)  # within the tolerance, and yet another choice


def test_refusals(bench, monkeypatch, tmp_path):
    monkeypatch.setenv("SLMFAST_DATA", str(tmp_path))
    with pytest.raises(UserError, match="no items: set SLMFAST_DATA"):
        bench.main([])
    with pytest.raises(UserError, match="--subjects is 5: give a number from 1 to 4"):
        bench.main(["--subjects", "5"])


@pytest.mark.slow
def test_a_small_run(bench, real_data, tmp_path, capsys):
    from transformers import Qwen2Config

    small = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    Qwen2Config(vocab_size=151_936, hidden_size=32, tie_word_embeddings=True, **small).save_pretrained(tmp_path)
    options = ["--model-config", str(tmp_path), "--subjects", "1", "--items", "2", "--out", str(tmp_path / "line.json")]
    assert bench.main(options) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line == json.loads((tmp_path / "line.json").read_text())
    assert [row["case"].split(",")[0] for row in line["results"]] == ["mmlu", "cmmlu"]
    assert all(row["same_answer"] and row["ratio"] == row["theirs"] / row["ours"] for row in line["results"])
