"""What a run refuses or survives, in one line: a full disk, a missing package, a forward that its optimizer lacks."""

import errno
import gc
import importlib.util
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback
from transformers.integrations import integration_utils

from slmfast.cli import main
from slmfast.errors import UserError
from slmfast.training import checkpoint, kto, run
from slmfast.training.kto import train_kto
from slmfast.training.settings import TrainSettings
from slmfast.training.sft import train_sft
from slmfast.training.trainer import StepTrainer

SFT = TrainSettings(method="sft", learning_rate=1e-3, epochs=2, accumulation=2, save_steps=2)


def fill_disk_at(monkeypatch, module, name: str, number: int) -> None:
    """Makes the `number`-th call of a function that writes a file leave half of one and find no more room."""
    original, calls = getattr(module, name), []

    def counted(path: Path, *args):
        calls.append(path)
        if len(calls) == number:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return original(path, *args)

    monkeypatch.setattr(module, name, counted)


@pytest.mark.parametrize(
    ("module", "name", "number", "left"),
    [
        (checkpoint, "write_typed_tensors", 3, ["checkpoint-2", "run.json"]),  # the second checkpoint's weights
        (run, "write_tensors", 1, ["checkpoint-4", "checkpoint-6", "run.json"]),  # the finished model's
    ],
    ids=["checkpoint", "model"],
)
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(
    tiny_model, sft_set, tmp_path, monkeypatch, module, name, number, left
):
    calm = train_sft(tiny_model, sft_set, tmp_path / "calm", SFT, progress=False)
    fill_disk_at(monkeypatch, module, name, number)
    with pytest.raises(
        UserError, match=r"no room is left on the disk for .*: free some and start the same run"
    ) as caught:
        train_sft(tiny_model, sft_set, tmp_path / "S1", SFT, progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "S1").exists()
    assert sorted(path.name for path in (tmp_path / ".work" / "S1").iterdir()) == left
    monkeypatch.undo()
    output = train_sft(tiny_model, sft_set, tmp_path / "S1", SFT, progress=False)
    assert (output / "model.safetensors").read_bytes() == (calm / "model.safetensors").read_bytes()


def test_the_command_ends_with_the_line_and_code_2(tiny_model, sft_set, tmp_path, monkeypatch, capsys):
    fill_disk_at(monkeypatch, checkpoint, "write_typed_tensors", 1)
    told = ["--set", "learning_rate=1e-3", "--set", "epochs=1", "--set", "accumulation=2", "--set", "checkpointing=on"]
    assert main(["train", "sft", str(sft_set), "--model", str(tiny_model), "-o", str(tmp_path / "S1"), *told]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("slmfast: no room is left") and "Traceback" not in error
    assert "layers checkpointed" in error


@pytest.mark.parametrize(("report", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_report_to_what_is_not_installed_is_refused(tiny_model, sft_set, tmp_path, monkeypatch, report, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"report_to is '{report}', which is not installed: pip install {package}"):
        train_sft(tiny_model, sft_set, tmp_path / "S1", replace(SFT, report_to=report), progress=False)


def test_a_report_gets_every_step_and_changes_nothing(tiny_model, sft_set, tmp_path, monkeypatch):
    seen = []

    class Recorder(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                seen.append((state.global_step, logs["loss"], logs["tokens"]))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Recorder)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: find_spec("json" if name == "wandb" else name))
    reported = train_sft(tiny_model, sft_set, tmp_path / "a", replace(SFT, report_to="wandb"), progress=False)
    assert [step for step, _, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert all(tokens > 0 for _, _, tokens in seen)
    monkeypatch.undo()
    silent = train_sft(tiny_model, sft_set, tmp_path / "b", SFT, progress=False)
    assert (reported / "model.safetensors").read_bytes() == (silent / "model.safetensors").read_bytes()


def test_a_split_forward_needs_split_masters(tiny_model, sft_set, tmp_path):
    with pytest.raises(UserError, match="forward is 'split', but the optimizer adamw keeps whole weights: set"):
        train_sft(tiny_model, sft_set, tmp_path / "S1", replace(SFT, forward="split"), progress=False)
    assert not (tmp_path / "S1").exists()


def test_a_run_starts_anew_with_checkpointing_where_it_stopped_without(tiny_model, sft_set, tmp_path, monkeypatch):
    """How a run goes on that the memory stopped: the result is the same, so the checkpoints serve."""
    calm = train_sft(tiny_model, sft_set, tmp_path / "calm", SFT, progress=False)
    fill_disk_at(monkeypatch, checkpoint, "write_typed_tensors", 3)
    with pytest.raises(UserError):
        train_sft(tiny_model, sft_set, tmp_path / "S1", SFT, progress=False)
    monkeypatch.undo()
    seen = []
    latest = checkpoint.latest
    monkeypatch.setattr(checkpoint, "latest", lambda work: seen.append(latest(work)) or seen[-1])
    output = train_sft(tiny_model, sft_set, tmp_path / "S1", replace(SFT, checkpointing="on"), progress=False)
    assert seen[0].name == "checkpoint-2"
    assert (output / "model.safetensors").read_bytes() == (calm / "model.safetensors").read_bytes()


def test_a_finished_model_is_never_replaced_by_another_run(tiny_model, sft_set, tmp_path):
    output = train_sft(tiny_model, sft_set, tmp_path / "S1", SFT, progress=False)
    before = (output / "model.safetensors").stat()
    with pytest.raises(UserError, match=r"S1 holds a finished model of other settings.*choose another output folder"):
        train_sft(tiny_model, sft_set, output, replace(SFT, learning_rate=2e-3), progress=False)
    train_sft(tiny_model, sft_set, output, SFT, progress=False)  # the same run: left as it is
    assert (output / "model.safetensors").stat() == before
    assert not (tmp_path / ".work").exists()


def test_a_kto_set_is_not_imitated(tiny_model, kto_set, tmp_path):
    with pytest.raises(UserError, match="has a column of true and false labels, as a KTO set has: train kto, or"):
        train_sft(tiny_model, kto_set, tmp_path / "S1", SFT, progress=False)
    assert list(tmp_path.iterdir()) == [kto_set]  # nor does the refused run leave a work folder


def test_an_output_is_never_the_reference(tiny_model, sft_set, kto_set, tmp_path):
    told = replace(SFT, method="kto")
    reference = train_sft(tiny_model, sft_set, tmp_path / "S1", SFT, progress=False)
    before = (reference / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="S1 is also an input: choose another output folder"):
        train_kto(tiny_model, kto_set, reference, told, reference=reference, progress=False)
    assert (reference / "model.safetensors").read_bytes() == before


def test_positions_under_another_name_are_the_models_too(tiny_model, make_set, tmp_path):
    """GPT-2 calls them n_positions."""
    model = tmp_path / "gpt2"
    told = {"vocab_size": 320, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**told)).save_pretrained(model)
    for file in tiny_model.glob("*token*"):
        shutil.copy(file, model)
    shutil.copy(tiny_model / "chat_template.jinja", model)
    replies = [[{"role": "assistant", "content": "x" * count}] for count in (5, 80, 6, 7)]
    with pytest.raises(UserError, match="over the window of 64"):
        train_sft(model, make_set(4, completion=replies), tmp_path / "S1", SFT, progress=False)


def test_a_run_that_cannot_fit_never_touches_the_device(tiny_model, sft_set, tmp_path, monkeypatch):
    def refused(*_):
        raise UserError("does not fit")

    monkeypatch.setattr(run, "fitted", refused)
    monkeypatch.setattr(nn.Module, "to", lambda *_: pytest.fail("the model was moved"))
    with pytest.raises(UserError, match="does not fit"):
        train_sft(tiny_model, sft_set, tmp_path / "S1", SFT, progress=False)


def test_a_second_model_is_gone_after_the_reference_pass(wide_model, make_model, kto_set, tmp_path, monkeypatch):
    held, alive = [], []
    load = kto._load_reference

    def loaded(*args):
        model = load(*args)
        held.extend(weakref.ref(parameter) for parameter in model.parameters())
        return model

    monkeypatch.setattr(kto, "_load_reference", loaded)
    monkeypatch.setattr(StepTrainer, "__init__", lambda *_: alive.extend(p() for p in held) or stop())
    gc.collect()
    gc.disable()
    try:
        told = replace(SFT, method="kto", optimizer="adamw8bit-split")
        reference = make_model(tmp_path / "R", 2, hidden=64)
        with pytest.raises(InterruptedError):
            train_kto(wide_model, kto_set, tmp_path / "S1", told, reference=reference, progress=False)
    finally:
        gc.enable()
    assert len(alive) > 20 and not any(parameter is not None for parameter in alive)


def stop():
    raise InterruptedError
