"""LoRA through peft and Liger Kernel's layers: what training makes of them, beside peft's own model."""

import importlib.util
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slmfast.errors import UserError
from slmfast.training import extras
from slmfast.training.extras import add_extras, check_extras, merge_adapters
from slmfast.training.kto import train_kto
from slmfast.training.loading import load_model
from slmfast.training.memory import plan_memory
from slmfast.training.settings import TrainSettings
from slmfast.training.sft import train_sft

SFT = TrainSettings(method="sft", learning_rate=1e-2, epochs=2, accumulation=2, schedule="constant", lora_rank=4)
KTO = replace(SFT, method="kto")
TOKENS = torch.arange(20)[None] % 7


def names_of(folder):
    return set(load_file(folder / "model.safetensors"))


def test_new_adapters_change_no_output_and_train_alone(tiny_model):
    plain, model = load_model(tiny_model).eval(), load_model(tiny_model).eval()
    add_extras(model, SFT, seed=3)
    assert torch.equal(plain(TOKENS).logits, model(TOKENS).logits)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * 2 and all("lora_" in name for name in trained)  # 7 linear layers in each of 2


def test_merged_adapters_are_pefts_own_merge(tiny_model):
    ours = load_model(tiny_model).eval()
    add_extras(ours, SFT, seed=3)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(load_model(tiny_model), config).eval()
    drawn = dict(theirs.base_model.model.named_parameters())
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_" in name:
                drawn[name].copy_(parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random)))
    expected = theirs(TOKENS).logits.detach()
    assert torch.equal(ours(TOKENS).logits, expected)
    merge_adapters(ours)
    merged = dict(theirs.merge_and_unload().named_parameters())
    assert {name for name, _ in ours.named_parameters()} == set(merged)
    assert all(torch.equal(parameter, merged[name]) for name, parameter in ours.named_parameters())
    torch.testing.assert_close(ours(TOKENS).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_run_saves_a_whole_model_that_differs_by_low_ranks(optimizer, tiny_model, sft_set, tmp_path):
    output = train_sft(tiny_model, sft_set, tmp_path / "out", replace(SFT, optimizer=optimizer), progress=False)
    before, after = load_file(tiny_model / "model.safetensors"), load_file(output / "model.safetensors")
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith("_proj.weight") for name in changed)
    for name in changed:
        ranks = torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4)
        assert 1 <= int(ranks) <= 4
    losses = [row["loss"] for row in json.loads((output / "training_log.json").read_text())]
    assert losses[-1] < losses[0]
    AutoModelForCausalLM.from_pretrained(output)


def test_kto_begins_at_its_reference(tiny_model, other_tiny_model, kto_set, tmp_path):
    output = train_kto(tiny_model, kto_set, tmp_path / "own", KTO, progress=False)
    first = json.loads((output / "training_log.json").read_text())[0]
    assert first["z0"] == 0 and first["margin"] == 0  # to the bit: new adapters give zero
    held = train_kto(other_tiny_model, kto_set, tmp_path / "held", KTO, reference=tiny_model, progress=False)
    assert json.loads((held / "training_log.json").read_text())[0]["margin"] != 0
    assert names_of(held) == names_of(tiny_model)


def test_a_stopped_run_goes_on_to_the_same_bytes(tiny_model, sft_set, tmp_path, monkeypatch):
    settings = replace(SFT, save_steps=1)
    whole = train_sft(tiny_model, sft_set, tmp_path / "whole", settings, progress=False)
    from slmfast.training import checkpoint

    save, saved = checkpoint.save, []

    def stop_after_two(folder, *args):
        save(folder, *args)
        saved.append({file.name: file.stat().st_size for file in folder.iterdir()})
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        train_sft(tiny_model, sft_set, tmp_path / "stopped", settings, progress=False)
    monkeypatch.setattr(checkpoint, "save", save)
    again = train_sft(tiny_model, sft_set, tmp_path / "stopped", settings, progress=False)
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    # A checkpoint holds the adapters, and not the model that they stand beside.
    assert saved[0]["weights.safetensors"] < (tiny_model / "model.safetensors").stat().st_size


def test_a_plan_counts_gradients_and_states_of_adapters_alone(tiny_model):
    whole, low = (dict(plan_memory(tiny_model, "sft", "2GiB", lora_rank=rank).rows) for rank in (0, 4))
    model = load_model(tiny_model)
    add_extras(model, SFT)
    trained = 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert low["gradients"] == trained < whole["gradients"]
    assert low["weights"] == whole["weights"] + trained


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"lora_rank": -1}, "lora_rank"),
        ({"lora_rank": 2.5}, "lora_rank"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"liger": "yes"}, "liger"),
        ({"optimizer": "adamw8bit-split"}, "adamw8bit-split"),
    ],
)
def test_wrong_settings_are_named(changes, names):
    with pytest.raises(UserError, match=names):
        replace(SFT, **changes)


def test_what_is_missing_is_named(monkeypatch):
    liger = replace(SFT, lora_rank=0, liger=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for settings, package in ((SFT, "peft"), (liger, "liger-kernel")):
        with pytest.raises(UserError, match=f"{package} is not installed"):
            check_extras(settings)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(extras.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="CUDA"):
        check_extras(liger)


def test_ligers_layers_are_asked_for_without_its_heads(tiny_model, monkeypatch):
    import transformers.integrations.liger as integration

    asked = {}
    fake = SimpleNamespace(_apply_liger_kernel_to_instance=lambda **arguments: asked.update(arguments))
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=fake))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", fake)
    monkeypatch.setattr(integration, "is_liger_kernel_available", lambda: True)
    model = load_model(tiny_model)
    add_extras(model, replace(SFT, lora_rank=0, liger=True))
    assert asked == {"model": model, "cross_entropy": False, "fused_linear_cross_entropy": False}
