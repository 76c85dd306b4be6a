"""Killed at any instant and started again, a run ends with the same bytes; damaged checkpoints are passed over."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from slmfast.errors import UserError
from slmfast.training import checkpoint
from slmfast.training.kto import train_kto
from slmfast.training.settings import TrainSettings
from slmfast.training.sft import train_sft
from slmfast.training.trainer import StepTrainer

HERE = Path(__file__).parent
SETTINGS = TrainSettings(method="kto", learning_rate=1e-3, epochs=2, accumulation=2, warmup_ratio=0.3, save_steps=2)
SMALL = 60  # tokens: some packs a step
STEP = "slmfast.training.trainer:StepTrainer.training_step"
PACK = "slmfast.training.passes:Passes.train_logprobs"
REFERENCE = "slmfast.training.passes:Passes.score"
CHECKPOINT_FILE = "slmfast.training.checkpoint:file_digest"  # called for each file of a checkpoint that is written
SAVED = "slmfast.training.checkpoint:prune"
EXPORT = "slmfast.training.run:write_companions"
LAST = "slmfast.training.run:clear_work"  # when the model is in place


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(tiny_model, other_tiny_model, wide_model, kto_set, sft_set, tmp_path):
    kto = {"model": str(tiny_model), "dataset": str(kto_set), "settings": asdict(SETTINGS)}
    held = kto | {"reference": str(other_tiny_model)}
    small = asdict(replace(SETTINGS, method="sft", optimizer="adamw8bit"))
    sft = {"model": str(tiny_model), "dataset": str(sft_set), "settings": small}
    fine = asdict(replace(SETTINGS, method="sft", learning_rate=1e-8))  # with compensated tensors
    halves = replace(SETTINGS, learning_rate=1e-8, optimizer="adamw8bit-split", forward="split", pack_tokens=SMALL)
    split = {"model": str(wide_model), "dataset": str(kto_set), "settings": asdict(halves)}
    cases = [
        kto | {"kills": [[REFERENCE, 3]]},
        kto | {"kills": [[STEP, 1]]},
        held | {"settings": asdict(replace(SETTINGS, pack_tokens=SMALL)), "kills": [[PACK, 38]]},  # in a step's middle
        held | {"kills": [[CHECKPOINT_FILE, 9]]},  # in the middle of the second checkpoint
        kto | {"kills": [[SAVED, 2]]},
        sft | {"kills": [[STEP, 4], [STEP, 3], [STEP, 2]]},  # again and again
        sft | {"kills": [[EXPORT, 1]]},
        sft | {"kills": [[LAST, 1]]},
        sft | {"settings": fine, "kills": [[STEP, 6]]},
        split | {"kills": [[PACK, 38], [CHECKPOINT_FILE, 9], [STEP, 2]]},
    ]
    plan = tmp_path / "cases.json"
    plan.write_text(json.dumps(cases))
    # Of numba's ways to run threads this one outlives a fork.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_THREADING_LAYER": "workqueue"}
    done = subprocess.run(
        [sys.executable, HERE / "killed_runs.py", plan], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for case, verdict in zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert verdict["signals"] == [signal.SIGKILL] * len(case["kills"]), (case["kills"], verdict)
        assert verdict["same"], (case["kills"], verdict)
        assert verdict["steps"] == list(range(1, 7)), case["kills"]  # the log, too, has each step once
    assert "checkpoint-2" in json.loads(done.stdout.splitlines()[-1])[3]["left"]


def files(folder: Path) -> dict[str, bytes]:
    """All of a folder, as bytes."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_every_file_of_a_resumed_run_is_that_of_one_that_went_through(
    tiny_model, kto_set, tmp_path, monkeypatch, capsys
):
    calm = train_kto(tiny_model, kto_set, tmp_path / "calm", SETTINGS, progress=False)
    step, calls = StepTrainer.training_step, []
    monkeypatch.setattr(
        StepTrainer, "training_step", lambda *a: calls.append(1) or (len(calls) > 3 and stop()) or step(*a)
    )
    with pytest.raises(InterruptedError):
        train_kto(tiny_model, kto_set, tmp_path / "S1", SETTINGS, progress=False)
    assert (tmp_path / ".work" / "S1" / "checkpoint-2").exists()
    monkeypatch.undo()
    output = train_kto(tiny_model, kto_set, tmp_path / "S1", SETTINGS, progress=False)
    assert "2 of 6 steps are done, going on from there" in capsys.readouterr().err
    assert files(output) == files(calm) and {"training_log.json", "training.json"} < files(output).keys()
    rows = json.loads((output / "training_log.json").read_text())
    assert all(list(row)[:5] == ["step", "epoch", "loss", "learning_rate", "grad_norm"] for row in rows)


def damage(path: Path) -> None:
    """Flips one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", ["byte", "missing", "unmarked"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(tmp_path, capsys, harm):
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for number in (2, 10):
        folder = tmp_path / f"checkpoint-{number}"
        checkpoint.save(folder, model, optimizer, schedule, lambda path: Path(path).write_text("{}"))
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-10"
    if harm == "byte":
        damage(tmp_path / "checkpoint-10" / "weights.safetensors")
    else:
        (tmp_path / "checkpoint-10" / ("complete.json" if harm == "unmarked" else "scheduler.json")).unlink()
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-2"
    assert "checkpoint-10 is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("rate", [1e-3, 1e-9])  # at 1e-9 the weights are compensated: a residual is saved as well
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_checkpoint_gives_back_the_optimizer_bit_for_bit(tmp_path, name, rate):
    from slmfast.training.optimizer import make_optimizer

    settings = replace(SETTINGS, optimizer=name, learning_rate=rate)

    def fresh():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(70, 70), torch.nn.Linear(70, 4))
        optimizer = make_optimizer(model, settings, warmup_steps=1)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def step(model, optimizer, schedule, number):
        inputs = torch.randn(5, 70, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
        schedule.step()

    straight = fresh()
    for number in range(6):
        step(*straight, number)
        if number == 2:
            checkpoint.save(tmp_path / "checkpoint-3", *straight, lambda path: Path(path).write_text("{}"))
    resumed = fresh()
    checkpoint.load_weights(tmp_path / "checkpoint-3", resumed[0])
    checkpoint.load_optimizer(tmp_path / "checkpoint-3", *resumed[1:])
    for number in range(3, 6):
        step(*resumed, number)
    for ours, theirs in zip(resumed[0].parameters(), straight[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
        state = resumed[1].state[ours]
        assert ("residual" in state and bool(state["residual"].any())) is (rate == 1e-9)


def test_a_budget_in_other_words_is_the_same_run(tiny_model, sft_set, tmp_path, monkeypatch, capsys):
    """The packs that were chosen stay, so a changed budget costs no checkpoint."""
    settings = replace(SETTINGS, method="sft", budget="2 GiB", pack_tokens=SMALL, checkpointing="on")
    calm = train_sft(tiny_model, sft_set, tmp_path / "calm", settings, progress=False)
    monkeypatch.setattr("slmfast.training.run._export", stop)
    with pytest.raises(InterruptedError):
        train_sft(tiny_model, sft_set, tmp_path / "S1", settings, progress=False)
    monkeypatch.undo()
    output = train_sft(tiny_model, sft_set, tmp_path / "S1", replace(settings, budget=2**31), progress=False)
    assert "dropped" not in capsys.readouterr().err
    assert (output / "model.safetensors").read_bytes() == (calm / "model.safetensors").read_bytes()
    before = (output / "training.json").stat().st_mtime_ns
    train_sft(tiny_model, sft_set, output, replace(settings, budget="24GiB"), progress=False)
    assert (output / "training.json").stat().st_mtime_ns == before  # done already


def test_checkpoints_of_another_run_are_not_resumed(tiny_model, sft_set, tmp_path, monkeypatch, capsys):
    settings = replace(SETTINGS, method="sft")
    calm = train_sft(tiny_model, sft_set, tmp_path / "calm", settings, progress=False)

    monkeypatch.setattr("slmfast.training.run._export", stop)
    with pytest.raises(InterruptedError):
        train_sft(tiny_model, sft_set, tmp_path / "S1", replace(settings, learning_rate=5e-3), progress=False)
    assert (tmp_path / ".work" / "S1" / "checkpoint-6").exists()
    monkeypatch.undo()
    capsys.readouterr()
    output = train_sft(tiny_model, sft_set, tmp_path / "S1", settings, progress=False)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "dropped" in line]
    assert "S1 holds 6 steps of a run with other settings" in line
    assert (output / "model.safetensors").read_bytes() == (calm / "model.safetensors").read_bytes()


def stop(*args):
    raise InterruptedError


def test_what_a_run_killed_at_its_very_end_left_goes_at_the_next_call(tiny_model, sft_set, tmp_path, monkeypatch):
    settings = replace(SETTINGS, method="sft")
    monkeypatch.setattr("slmfast.training.run.clear_work", stop)
    with pytest.raises(InterruptedError):
        train_sft(tiny_model, sft_set, tmp_path / "S1", settings, progress=False)
    assert (tmp_path / ".work" / "S1" / "checkpoint-6").exists() and (tmp_path / "S1" / "training.json").exists()
    monkeypatch.undo()
    train_sft(tiny_model, sft_set, tmp_path / "S1", settings, progress=False)
    assert not (tmp_path / ".work").exists()


@pytest.mark.parametrize("mark", [None, "{}"])
def test_somebody_elses_checkpoints_are_never_removed(tiny_model, sft_set, tmp_path, mark):
    work = tmp_path / "work"
    (work / "checkpoint-500").mkdir(parents=True)
    (work / "checkpoint-500" / "pytorch_model.bin").write_text("days of work")
    if mark is not None:
        (work / "run.json").write_text(mark)
    with pytest.raises(UserError, match="holds somebody else's checkpoints: choose another work folder"):
        train_sft(tiny_model, sft_set, tmp_path / "S1", replace(SETTINGS, method="sft"), work=work, progress=False)
    assert (work / "checkpoint-500" / "pytorch_model.bin").read_text() == "days of work"
