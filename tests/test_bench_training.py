"""bench/training.py on the miniature's shape: every case, its last line, and that another answer gets no ratio."""

import importlib.util
import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from slmfast import cli
from slmfast.errors import UserError
from slmfast.records import MESSAGE
from slmfast.training import run as run_module
from slmfast.training.loading import load_model

CHECKOUT = Path(__file__).parent.parent
BENCH = CHECKOUT / "bench"
MODEL = CHECKOUT / "slmfast" / "miniature" / "models" / "base"
KEYS = {"case", "peer", "version", "ours", "theirs", "unit", "ratio", "same_answer"}
KTO = ["TRL KTOTrainer, precomputed reference", "TRL KTOTrainer, its default"]
SFT = ["TRL SFTTrainer, padded", "TRL SFTTrainer, padding-free"]

# Says what a training says, without one: the losses and seconds are those that the test gives it by name of the side.
CHILD = """
import json, pathlib, sys
request = json.loads(pathlib.Path(sys.argv[1]).read_text())
told = json.loads((pathlib.Path(__file__).parent / "told.json").read_text())
say = lambda **content: print(json.dumps(content), flush=True)
own = {"losses": [0.5, 0.4, 0.3], "seconds": [9.0, 1.0, 3.0], "norm": 2.0} | told.get(request["side"], {})
turns = (pathlib.Path(__file__).parent / "turns").open("a")
say(ready=True, precompute_seconds=4.0 if request["side"] in ("ours", "precomputed") else None)
for number, (loss, seconds) in enumerate(zip(own["losses"], own["seconds"])):
    if not sys.stdin.readline():
        break
    if number == own.get("fails_at"):
        raise SystemExit("out of luck")
    print(request["side"], request["optimizer"], file=turns, flush=True)
    say(loss=loss, seconds=seconds, norm=own["norm"])
say(baseline=1000, peak=own.get("peak", 5000))
"""


@pytest.fixture
def bench(monkeypatch):
    """The benchmark as `slmfast bench` loads it, on made-up texts."""
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.delenv("SLMFAST_DATA", raising=False)
    spec = importlib.util.spec_from_file_location("bench_training", BENCH / "training.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    for name in ("inputs", "scoring_texts"):
        monkeypatch.setattr(importlib.import_module(name), "data_folder", lambda: None)
    monkeypatch.setattr(module, "data_folder", lambda: None)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


@pytest.fixture
def play(bench, monkeypatch, tmp_path):
    """Puts the child above in the place of the real one; what it is told is given by name of the side."""

    def told(**sides: dict) -> Path:
        (tmp_path / "child.py").write_text(CHILD)
        (tmp_path / "told.json").write_text(json.dumps(sides))
        monkeypatch.setattr(importlib.import_module("training_race"), "CHILD", tmp_path / "child.py")
        return tmp_path / "turns"

    return told


SMALL = ["--model-config", str(MODEL), "--tokenizer", str(MODEL), "--device", "cpu", "--threads", "1"]
TINY = ["--layers", "1", "--samples", "4", "--steps", "2"]


def run(bench, capsys, *arguments: str) -> tuple[int, dict, str]:
    """The exit code, the JSON object of the last line, and what stood before it."""
    code = bench.main([*SMALL, *TINY, *arguments])
    *before, last = capsys.readouterr().out.splitlines()
    return code, json.loads(last), "\n".join(before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kto_and_its_memory_beside_trl(bench, capsys, tmp_path, dtype):
    out = tmp_path / "figures" / "training.json"
    code, document, before = run(
        bench, capsys, "--case", "kto", "--case", "memory", "--dtype", dtype, "--out", str(out)
    )
    assert code == 0 and "no figure" not in before
    assert document.keys() == {"bench", "device", "commit", "results"} and document["bench"] == "training"
    assert json.loads(out.read_text()) == document
    rows = document["results"]
    assert all(row.keys() == KEYS and row["same_answer"] is True and row["version"] for row in rows)
    assert [row["peer"] for row in rows[:3]] == [*KTO, KTO[0]] and "computed once" in rows[2]["case"]
    for row in rows[:3]:
        assert row["unit"] == "s" and row["ratio"] == pytest.approx(row["theirs"] / row["ours"])
        assert f"1 layers, H=128, V=1,792, {dtype}" in row["case"] and row["case"] in before
    memory = rows[3:]
    assert [row["peer"] for row in memory] == [KTO[0], KTO[0], KTO[1], KTO[1], *[KTO[0]] * 4]
    for whole, beyond in zip(memory[::2], memory[1::2], strict=True):
        assert whole["unit"] == "MB" and 0 < beyond["ours"] < whole["ours"] and 0 < beyond["theirs"] < whole["theirs"]
        assert whole["ratio"] == pytest.approx(whole["ours"] / whole["theirs"])


@pytest.mark.slow
def test_sft_beside_trl(bench, capsys):
    code, document, before = run(bench, capsys, "--case", "sft")
    assert code == 0 and "no figure" not in before
    assert [(row["peer"], row["same_answer"]) for row in document["results"]] == [(peer, True) for peer in SFT]


@pytest.mark.slow
def test_a_peer_that_trains_other_weights_gets_no_ratio(bench, capsys, monkeypatch):
    context = importlib.import_module("training_context")
    right = context.Context._request

    def wrong(self, method, side, *more):
        return right(self, method, side, *more) | ({"seed": 1} if side == "padded" else {})

    monkeypatch.setattr(context.Context, "_request", wrong)
    monkeypatch.setattr(importlib.import_module("training_cases"), "SFT_PEERS", {"padded": None})
    code, document, before = run(bench, capsys, "--case", "sft")
    assert code == 1 and [(row["ratio"], row["same_answer"]) for row in document["results"]] == [(None, False)]
    assert "NO: no ratio" in before


def test_the_sides_take_their_steps_in_turn_and_the_first_does_not_count(bench, capsys, play):
    turns = play(precomputed={"seconds": [50.0, 4.0, 8.0]}, default={"seconds": [50.0, 5.0, 5.0]})
    code, document, _ = run(bench, capsys, "--case", "kto")
    assert code == 0
    assert turns.read_text().splitlines() == ["ours adamw", "precomputed adamw", "default adamw"] * 3
    steps, default, once = document["results"]
    assert (steps["ours"], steps["theirs"], steps["ratio"]) == (2.0, 6.0, 3.0)  # medians
    assert "p20 to p80 1.4-2.6 and 4.8-7.2 s" in steps["case"] and "p50 of 2 steps" in steps["case"]
    assert (default["ratio"], once["ours"], once["ratio"]) == (2.5, 4.0, 1.0)


def test_where_the_memory_does_not_hold_all_ours_runs_with_one_peer_at_a_time(bench, capsys, play, monkeypatch):
    monkeypatch.setattr(importlib.import_module("training_context").Context, "_free", lambda self: 0)
    turns = play()
    code, document, _ = run(bench, capsys, "--case", "sft")
    assert code == 0 and [row["peer"] for row in document["results"]] == SFT
    assert turns.read_text().split()[::2] == ["ours", "padded"] * 3 + ["ours", "padding-free"] * 3


def test_memory_is_told_of_the_trainings_that_were_timed(bench, capsys, play):
    turns = play(precomputed={"peak": 9000})
    code, document, _ = run(bench, capsys, "--case", "kto", "--case", "memory")
    assert code == 0
    eight = [f"{side} {kind}" for kind in ("adamw8bit-split", "adamw8bit") for side in ("ours", "precomputed") * 2]
    assert turns.read_text().splitlines() == ["ours adamw", "precomputed adamw", "default adamw"] * 3 + eight
    whole, beyond = document["results"][3:5]
    assert (whole["ours"], whole["theirs"], whole["ratio"]) == (0.005, 0.009, pytest.approx(5 / 9))
    assert (beyond["ours"], beyond["theirs"], beyond["ratio"]) == (0.004, 0.008, 0.5)


WRONG = {
    "a loss": {"losses": [0.5, 0.4 * (1 + 2e-5), 0.3]},
    "the first gradient": {"norm": 2.0 * (1 + 2e-5)},
    "not a number": {"losses": [0.5, float("nan"), 0.3]},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("side", ["ours", "precomputed"])
def test_another_answer_gets_no_ratio(bench, capsys, play, side, change):
    play(**{side: change})
    code, document, before = run(bench, capsys, "--case", "kto", "--case", "memory")
    wrong = [row for row in document["results"] if side == "ours" or row["peer"] == KTO[0]]
    right = [row for row in document["results"] if row not in wrong]
    assert code == 1 and "NO: no ratio" in before and len(wrong) >= 6
    assert all((row["ratio"], row["same_answer"]) == (None, False) for row in wrong)
    assert all(row["ratio"] is not None and row["same_answer"] is True for row in right)


def test_in_bf16_the_answers_are_compared_in_fp32_before(bench, capsys, play, monkeypatch):
    """Both curves of the fake are the same in either precision; what differs is one side's in fp32 alone."""
    turns = play()
    code, document, _ = run(bench, capsys, "--case", "sft", "--dtype", "bfloat16")
    assert code == 0 and all(row["same_answer"] for row in document["results"])
    assert turns.read_text().split()[::2] == ["ours", "padded", "padding-free"] * (2 + 3)
    gate = importlib.import_module("training_gate")
    context = importlib.import_module("training_context")
    right = gate.same_answer
    monkeypatch.setattr(
        context, "same_answer", lambda ours, theirs, allowed: allowed != gate.FP32 and right(ours, theirs, allowed)
    )
    code, document, _ = run(bench, capsys, "--case", "sft", "--dtype", "bfloat16")
    assert code == 1 and [row["ratio"] for row in document["results"]] == [None, None]


def test_a_peer_that_fails_is_named_and_costs_no_other_figure(bench, capsys, play):
    play(precomputed={"fails_at": 1})
    code, document, before = run(bench, capsys, "--case", "kto")
    assert code == 0 and [row["peer"] for row in document["results"]] == [KTO[1]]
    assert f"no figure: {KTO[0]}, kto: its process ended with code 1: out of luck" in before


def test_where_every_peer_fails_the_exit_code_says_so(bench, capsys, play):
    play(precomputed={"fails_at": 1}, default={"fails_at": 1})
    code, document, before = run(bench, capsys, "--case", "kto")
    assert code == 1 and document["results"] == [] and before.count("no figure: ") == 2


def test_our_side_takes_the_packs_of_a_training(bench, monkeypatch, tmp_path):
    """On a device for which a plan is made, those of the plan."""
    ours = importlib.import_module("training_ours")
    told = []

    def planned(settings, mark, model, device, longest, warmup):
        told.append((longest, warmup))
        return replace(settings, pack_tokens=77, checkpointing="on")

    monkeypatch.setattr(run_module, "fitted", planned)
    rows = [{"role": "user", "content": "why?"}], [{"role": "assistant", "content": "so"}]
    table = {
        name: pa.array([side] * 8, pa.list_(MESSAGE)) for name, side in zip(("prompt", "completion"), rows, strict=True)
    }
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    request = {"method": "sft", "samples": 4, "optimizer": "adamw", "dtype": "float32", "seed": 0, "device": "cpu"}
    folders = {"scratch": str(tmp_path), "data": str(tmp_path / "rows.parquet"), "tokenizer": str(MODEL)}
    trainer, _ = ours.build(load_model(MODEL), request | folders)
    assert trainer._budget.at(0) == 77 and trainer._objective._passes.checkpointing
    assert len(told) == 1 and told[0][1] == 0


def test_our_own_side_that_fails_is_an_exit_code(bench, capsys, play):
    play(ours={"fails_at": 0})
    code, document, before = run(bench, capsys, "--case", "kto")
    assert code == 1 and document["results"] == [] and "no figure: slmfast, kto: its process ended" in before


def test_a_curve_that_stands_still_shows_nothing(bench):
    gate = importlib.import_module("training_gate")
    still, moving = gate.Curve([0.5, 0.5, 0.5], 1.0), gate.Curve([0.5, 0.4999, 0.501], 1.0)
    assert gate.same_answer(moving, moving) and not gate.same_answer(still, still)
    assert not gate.same_answer(moving, gate.Curve(moving.losses[:2], 1.0))


def test_optimizer_steps_beside_bitsandbytes(bench, capsys):
    code, document, _ = run(bench, capsys, "--case", "optimizer")
    assert code == 0
    split_time, split_bytes, whole_time, whole_bytes = document["results"]
    for row in (split_time, whole_time):
        assert row["unit"] == "s" and row["ratio"] == pytest.approx(row["theirs"] / row["ours"])
    for row in (split_bytes, whole_bytes):
        assert row["unit"] == "bytes a weight" and row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
        # weight 4, gradient 4, two states of 1; small tensors have larger states, and coarse ones keep up to 4 bytes
        assert 10.0 < row["ours"] < 14.5 and 10.0 < row["theirs"] < 10.6
    assert all(row["peer"].startswith("bitsandbytes AdamW8bit") and row["same_answer"] for row in document["results"])


def test_an_optimizer_that_forgets_its_first_moment_gets_no_ratio(bench, capsys, monkeypatch):
    optimizers = importlib.import_module("training_optimizers")
    right = optimizers._step

    def wrong(optimizer, device):
        right(optimizer, device)
        if type(optimizer).__name__ == "SplitAdamW8bit":
            for state in optimizer.state.values():
                state["exp_avg"].zero_()

    monkeypatch.setattr(optimizers, "_step", wrong)
    code, document, _ = run(bench, capsys, "--case", "optimizer")
    assert code == 1 and [row["ratio"] is None for row in document["results"]] == [True, True, False, False]


def test_rows_are_those_of_an_alignment(bench):
    rows_of, texts = importlib.import_module("training_rows"), importlib.import_module("scoring_texts")
    tokenizer = bench.load_tokenizer(MODEL)
    drawer = texts.Drawer(tokenizer, 3)
    kto, again = (rows_of.draw_rows(drawer, "kto", 22, 3) for _ in range(2))
    assert kto.table.equals(again.table) and kto.table.num_rows == 22 and len(kto.lengths) == 22
    prompts, labels = kto.table["prompt"].to_pylist(), kto.table["label"].to_pylist()
    assert sum(labels) == 11 and all(one != other for one, other in pairwise(prompts))
    assert all(prompts.count(prompt) == 2 for prompt in prompts)
    sft = rows_of.draw_rows(drawer, "sft", 7, 3)
    assert sft.table.num_rows == 7 and sft.table.column_names == ["prompt", "completion"]
    assert sft.first(4).table.num_rows == len(sft.first(4).lengths) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "6"], "--samples 6: give a multiple of 4"),
        (["--samples", "0"], "--samples must be at least 1, not 0"),
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--layers", "0"], "--layers must be at least 1, not 0"),
        (["--layers", "5"], "--layers 5: the model has 4"),
        (["--threads", "0"], "--threads must be at least 1, not 0"),
        (["--model-config", "/nowhere"], "--model-config /nowhere: no config.json there"),
        (["--tokenizer", "/nowhere"], "/nowhere"),
    ],
)
def test_a_user_error_is_one_line_that_names_its_remedy(bench, capsys, arguments, message):
    with pytest.raises(UserError) as error:
        bench.main([*SMALL, *TINY, *arguments, "--case", "kto"])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_too_many_samples_are_refused_in_one_line(bench, play):
    play()
    with pytest.raises(UserError, match="give a smaller"):
        bench.main([*SMALL, "--layers", "1", "--samples", "40000", "--case", "kto"])


def test_without_a_tokenizer_the_command_says_what_to_give(bench, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SLMFAST_DATA", str(tmp_path))
    assert cli.main(["bench", "training", "--case", "kto"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "give --tokenizer FOLDER" in said[0]


def test_a_device_that_is_not_there(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch sees no CUDA device"):
        bench.main(["--device", "cuda"])
