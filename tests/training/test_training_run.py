"""Whole runs: the folder they leave, what its log says, what stops them, and what a step of 1e-8 leaves behind."""

import json
import shutil
import struct
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GraniteConfig, GraniteForCausalLM

from slmfast.errors import UserError
from slmfast.fusion import update_survival
from slmfast.training.data import load_tokens, make_groups
from slmfast.training.kto import train_kto
from slmfast.training.loading import load_model, load_tokenizer
from slmfast.training.passes import Passes
from slmfast.training.run import _positions
from slmfast.training.settings import TrainSettings
from slmfast.training.sft import SftObjective, train_sft

SFT = TrainSettings(method="sft", learning_rate=1e-3, epochs=2, accumulation=2, warmup_ratio=0.4)
KTO = replace(SFT, method="kto")


def log_of(output):
    return json.loads((output / "training_log.json").read_text())


def test_the_output_is_a_complete_model_folder(tiny_model, sft_set, tmp_path):
    output = train_sft(tiny_model, sft_set, tmp_path / "S1", SFT, progress=False)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template
    assert model.generation_config.eos_token_id == 2
    with (output / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert header["__metadata__"] == {"format": "pt"}
    assert "lm_head.weight" not in header  # tied
    assert not (tmp_path / ".work").exists()


def test_the_log_has_a_row_a_step_and_no_times(tiny_model, sft_set, tmp_path, capsys):
    output = train_sft(tiny_model, sft_set, tmp_path / "S1", SFT, progress=False)
    log = log_of(output)
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert [row["learning_rate"] for row in log][:3] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    assert log[-1]["loss"] < log[0]["loss"]
    assert set(log[0]) == {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "packs", "pack_tokens"}
    tokens = load_tokens(sft_set, load_tokenizer(tiny_model), SFT)
    assert sum(row["tokens"] for row in log) == 2 * sum(len(ids) for ids in tokens.completions)
    line = capsys.readouterr().err
    assert "22 rows; 4 x 2 = 8 samples a step; 3 steps x 2 epochs = 6 steps" in line
    assert "the first at 0.000333333" in line


def test_kto_starts_at_zero_reward_and_learns_the_margin(tiny_model, kto_set, tmp_path):
    settings = replace(KTO, epochs=12, learning_rate=2e-3)
    log = log_of(train_kto(tiny_model, kto_set, tmp_path / "S2", settings, progress=False))
    first = log[0]
    # The policy is its own reference: same code, same batches, so nothing differs by a bit.
    assert (first["reward_desirable"], first["reward_undesirable"], first["z0"]) == (0.0, 0.0, 0.0)
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)
    assert first["samples"] == 8
    assert log[-1]["margin"] > 0.1


def test_kto_is_held_to_the_reference_it_is_given(tiny_model, other_tiny_model, kto_set, tmp_path):
    log = log_of(train_kto(tiny_model, kto_set, tmp_path / "S", KTO, reference=other_tiny_model, progress=False))
    assert log[0]["reward_desirable"] != 0.0


def test_training_an_untied_model(make_model, sft_set, tmp_path):
    model = make_model(tmp_path / "untied", seed=4, tied=False)
    output = train_sft(model, sft_set, tmp_path / "S1", SFT, progress=False)
    before, after = load_file(model / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_step_of_1e_8_reaches_the_saved_model(tiny_model, sft_set, tmp_path, optimizer):
    """Where the gradient is well over Adam's eps a weight differs after one step, unless it is too coarse for fp32."""
    settings = replace(SFT, learning_rate=1e-8, epochs=1, accumulation=6, warmup_ratio=0.0, optimizer=optimizer)
    output = train_sft(tiny_model, sft_set, tmp_path / "S1", settings, progress=False)
    assert len(log_of(output)) == 1
    before, after = load_file(tiny_model / "model.safetensors"), load_file(output / "model.safetensors")

    model = load_model(tiny_model)
    tokens = load_tokens(sft_set, load_tokenizer(tiny_model), settings)
    passes = Passes("fp32", False, torch.device("cpu"))
    objective = SftObjective(tokens, make_groups(len(tokens), 4), passes)
    objective.accumulate(model, range(6), 2048, torch.Tensor.backward)
    driven, moved = 0, 0
    for name, parameter in model.named_parameters():
        strong = (parameter.grad.abs() > 100 * 1e-8) & (parameter.detach().abs() < 0.25)
        driven += int(strong.sum())
        moved += int((strong & (before[name] != after[name])).sum())
    assert driven > 10_000
    assert moved >= 0.99 * driven
    kept = update_survival(tiny_model, output, "bfloat16")
    assert kept.weights < 0.01
    assert update_survival(tiny_model, output, "float32") == (1.0, pytest.approx(1.0))


def test_a_bf16_forward_trains_and_says_what_it_saw(tiny_model, sft_set, tmp_path, capsys):
    settings = replace(SFT, forward="bf16", learning_rate=1e-6)
    output = train_sft(tiny_model, sft_set, tmp_path / "S1", settings, progress=False)
    seen = json.loads((output / "training.json").read_text())["forward_sees"]
    assert 0 < seen["weights"] < 0.5
    assert "the bf16 forward saw" in capsys.readouterr().err
    exact = train_sft(tiny_model, sft_set, tmp_path / "S1x", replace(settings, forward="fp32"), progress=False)
    assert log_of(output)[0]["loss"] == pytest.approx(log_of(exact)[0]["loss"], rel=5e-3)
    assert log_of(output)[0]["loss"] != log_of(exact)[0]["loss"]


def test_accumulation_is_only_a_split_of_the_step(tiny_model, make_set, tmp_path):
    data = make_set(16)
    split = train_sft(tiny_model, data, tmp_path / "a", replace(SFT, batch_size=2, accumulation=4), progress=False)
    whole = train_sft(tiny_model, data, tmp_path / "b", replace(SFT, batch_size=8, accumulation=1), progress=False)
    assert log_of(split)[0]["loss"] == pytest.approx(log_of(whole)[0]["loss"], rel=1e-6)
    assert log_of(split)[0]["grad_norm"] == pytest.approx(log_of(whole)[0]["grad_norm"], rel=1e-5)


def test_a_finished_run_is_not_repeated(tiny_model, sft_set, tmp_path):
    output = train_sft(tiny_model, sft_set, tmp_path / "S1", SFT, progress=False)
    card = output / "training.json"
    made = card.stat().st_mtime_ns
    train_sft(tiny_model, sft_set, output, replace(SFT, save_steps=1), progress=False)
    assert card.stat().st_mtime_ns == made


def test_the_models_own_positions_bound_the_window(tiny_model, make_set, tmp_path):
    long = [[{"role": "user", "content": "a" * 600}], *[[{"role": "user", "content": "b"}]] * 3]
    with pytest.raises(UserError, match=r"row 0 has 6.. tokens, over the window of 512"):
        train_sft(tiny_model, make_set(4, prompt=long), tmp_path / "S1", SFT, progress=False)


def test_a_work_folder_keeps_what_is_not_ours(tiny_model, sft_set, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes.txt").write_text("mine")
    train_sft(tiny_model, sft_set, tmp_path / "S1", SFT, work=tmp_path / "work", progress=False)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["notes.txt"]


def test_nothing_else_is_overwritten(tiny_model, sft_set, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"holds no training\.json of an earlier run: choose another output"):
        train_sft(tiny_model, sft_set, tmp_path / "mine", SFT)
    with pytest.raises(UserError, match="is also an input"):
        train_sft(tiny_model, sft_set, tiny_model, SFT)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_loss_that_is_not_finite_stops_the_run(tiny_model, sft_set, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the loss is not finite at step 1: check the starting model's weights"):
        train_sft(broken, sft_set, tmp_path / "S1", SFT, progress=False)
    assert not (tmp_path / "S1").exists()


def test_missing_or_damaged_models_are_named(tiny_model, sft_set, kto_set, tmp_path):
    with pytest.raises(UserError, match="nowhere is no model folder"):
        train_sft(tmp_path / "nowhere", sft_set, tmp_path / "S1", SFT)
    with pytest.raises(UserError, match="nowhere is no model folder"):
        train_kto(tiny_model, kto_set, tmp_path / "S2", KTO, reference=tmp_path / "nowhere")
    mute = tmp_path / "mute"
    shutil.copytree(tiny_model, mute, ignore=shutil.ignore_patterns("chat_template.jinja"))
    with pytest.raises(UserError, match="has no chat template"):
        train_sft(mute, sft_set, tmp_path / "S1", SFT)
    with pytest.raises(UserError, match="method is 'kto' in the settings of train_sft"):
        train_sft(tiny_model, sft_set, tmp_path / "S1", KTO)


@pytest.fixture
def no_work(monkeypatch):
    """Fails a test in which a single pack is computed."""

    def computed(*args):
        raise AssertionError("work was done before the mistake was found")

    monkeypatch.setattr("slmfast.training.passes.Passes.train_logprobs", computed)
    monkeypatch.setattr("slmfast.training.passes.Passes.score", computed)


def changed(model, folder, tensors=None, **config):
    """A copy of a model folder with more tensors and other keys in its config."""
    shutil.copytree(model, folder)
    if tensors:
        path = folder / "model.safetensors"
        save_file({**load_file(path), **tensors}, path, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def test_a_model_that_transforms_its_logits_is_refused(tiny_model, sft_set, kto_set, tmp_path, no_work):
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        logits_scaling=8.0,
    )
    scaled = shutil.copytree(tiny_model, tmp_path / "scaled")
    GraniteForCausalLM(config).save_pretrained(scaled)
    capped = changed(tiny_model, tmp_path / "capped", final_logit_softcapping=30.0)
    for model, key in ((scaled, "logits_scaling"), (capped, "final_logit_softcapping")):
        with pytest.raises(UserError, match=rf"transforms its logits \({key}\)"):
            train_sft(model, sft_set, tmp_path / "S1", SFT, progress=False)
        with pytest.raises(UserError, match=rf"transforms its logits \({key}\)"):
            train_kto(tiny_model, kto_set, tmp_path / "S2", KTO, reference=model, progress=False)


def test_a_tensor_that_transformers_does_not_know_is_named_before_any_work(tiny_model, sft_set, tmp_path, no_work):
    odd = changed(tiny_model, tmp_path / "odd", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    with pytest.raises(UserError, match=r"odd names its tensors otherwise .*inv_freq"):
        train_sft(odd, sft_set, tmp_path / "S1", SFT, progress=False)


def test_positions_may_be_unknown(tiny_model):
    settings = replace(SFT, max_length=300)
    for config, positions in (
        (AutoConfig.from_pretrained(tiny_model), 512),
        (AutoConfig.for_model("gpt2", n_positions=64), 64),  # another name for the same
        (AutoConfig.for_model("bloom"), 300),
    ):
        assert _positions(SimpleNamespace(config=config), settings) == positions


def test_a_truncated_model_is_one_line(tiny_model, sft_set, kto_set, tmp_path):
    cut = shutil.copytree(tiny_model, tmp_path / "cut")
    path = cut / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    for run in (
        lambda: train_sft(cut, sft_set, tmp_path / "S1", SFT, progress=False),
        lambda: train_kto(tiny_model, kto_set, tmp_path / "S2", KTO, reference=cut, progress=False),
    ):
        with pytest.raises(UserError, match="cut") as caught:
            run()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "1", None, True])
def test_a_bad_seed_is_named(tiny_model, sft_set, tmp_path, seed):
    with pytest.raises(UserError, match=r"seed is .*: set it to a whole number from 0 to 4294967295"):
        train_sft(tiny_model, sft_set, tmp_path / "S1", SFT, seed=seed, progress=False)
