"""bench/fusion.py: its last line, and that no ratio is given to an average that is another."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from slmfast.errors import UserError

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch):
    """The benchmark as `slmfast bench` loads it, with models of a few weights."""
    monkeypatch.syspath_prepend(BENCH)
    spec = importlib.util.spec_from_file_location("bench_fusion", BENCH / "fusion.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "shapes", lambda scale: {"a": (300, 7), "b": (5,)})
    return module


def test_the_last_line_is_the_document(bench, capsys, tmp_path):
    out = tmp_path / "fusion.json"
    folder = tmp_path / "models"
    folder.mkdir()
    arguments = ["--case", "cached", "--runs", "1", "--folder", str(folder), "--out", str(out)]
    assert bench.main(arguments) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == json.loads(out.read_text()) and last["bench"] == "fusion"
    time, memory = last["results"]
    assert time["same_answer"] is True and time["ratio"] == pytest.approx(time["ours"] / time["theirs"])
    assert memory["unit"] == "MB" and 10 < memory["ours"] < 2000
    assert not list(folder.iterdir())  # gigabytes at full size


def test_another_average_gives_no_ratio(bench, tmp_path, monkeypatch):
    context = bench.Context(folder=tmp_path, runs=1, threads=1)
    bench.make_models(context, 1.0)

    def measured(side, threads, output, *models, script):
        if side == "fuse":
            output.mkdir()
            data = bytearray((context.models[0] / bench.SINGLE).read_bytes())
            data[-4 * (300 * 7 + 5) :] = average.tobytes()
            (output / bench.SINGLE).write_bytes(data)
        return {"seconds": 1.0, "peak_bytes": 1}

    monkeypatch.setattr(bench, "measured", measured)
    flat = [np.frombuffer((m / bench.SINGLE).read_bytes()[-4 * 2105 :], dtype=np.float32) for m in context.models]
    average = np.average(flat, axis=0, weights=bench.WEIGHTS).astype(np.float32)
    time, _ = bench.CASES["cached"](context)
    assert time.same_answer and time.ratio == 1.0
    average = np.nextafter(average, np.float32(1))
    time, _ = bench.CASES["cached"](context)
    assert time.same_answer is False and time.ratio is None


@pytest.mark.parametrize("options", [["--runs", "0"], ["--threads", "0"], ["--scale", "0"], ["--scale", "1.5"]])
def test_options_out_of_range_are_named(bench, options):
    with pytest.raises(UserError, match="must be above 0"):
        bench.main(options)
