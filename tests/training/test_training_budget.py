"""A run with a budget: planned and refused before it starts, enforced on the device, repeated when it is resumed."""

import json
import re
from dataclasses import replace

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from slmfast import cli
from slmfast.errors import UserError
from slmfast.sizes import GIB
from slmfast.store import read_json, write_json
from slmfast.training import budgeted, memory
from slmfast.training.budgeted import CONTEXT, enforced, fitted
from slmfast.training.kto import train_kto
from slmfast.training.loading import load_model
from slmfast.training.memory import RESERVE, MemoryPlan, plan_memory
from slmfast.training.pack_budget import PackBudget
from slmfast.training.settings import TrainSettings
from slmfast.training.work_folder import MARK

KTO = TrainSettings(method="kto", learning_rate=1e-3, epochs=1, accumulation=2)


@pytest.fixture
def bare_folder(tiny_model, tmp_path):
    """A folder with a configuration and nothing else."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    return folder


def slmfast(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main(list(map(str, arguments)))
    return code, *capsys.readouterr()


def test_a_plan_on_the_command_line(bare_folder, capsys):
    code, out, err = slmfast(capsys, "plan", bare_folder, "--budget", "2GiB", "--max-length", 128)
    assert (code, err) == (0, "")
    plan = plan_memory(bare_folder, budget="2GiB", max_length=128)
    for name, size in (*plan.rows, ("total", plan.peak_bytes), ("usable", plan.usable_bytes)):
        assert re.search(rf"^{name} +{size / GIB:.2f} GiB", out, re.MULTILINE)
    lines = out.splitlines()
    assert "a plan for a CUDA device, nothing is measured" in lines[0] and "fits" in lines
    assert f"packs of at most {plan.settings.pack_tokens:,} tokens, no layer checkpointed" in lines[1]
    assert "no weights are here" in out
    assert len(re.findall(r"^  TRL, .* GiB$", out, re.MULTILINE)) == 2
    assert (
        len(re.findall(r"^  slmfast, packs of (?:512|128) tokens.* GiB +\d\.\d\dx, \d\.\d\dx$", out, re.MULTILINE)) == 2
    )


def test_a_plan_of_sft_has_one_peer_and_says_what_would_fit(bare_folder, capsys):
    lighter = plan_memory(bare_folder, "sft", max_length=64, checkpointing="on", pack_tokens=256, optimizer="adamw8bit")
    budget = lighter.peak_bytes + RESERVE
    told = "--budget", budget, "--max-length", 64, "--method", "sft", "--pack-tokens", 256
    code, out, _ = slmfast(capsys, "plan", bare_folder, *told, "--checkpointing", "off")
    assert code == 0 and "does not fit; it would with" in out
    assert len(re.findall(r"^  TRL, ", out, re.MULTILINE)) == 1 and "SFTTrainer" in out
    flags = re.search(r"it would with (.*)", out).group(1).replace(" and without --pack-tokens", "").split()
    code, out, _ = slmfast(capsys, "plan", bare_folder, *told[:6], *flags)
    assert "\nfits\n" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--budget", "much"], "budget is 'much'"),
        (["--optimizer", "sgd"], "optimizer is 'sgd'"),
        (["--max-length", "0"], "max_length is 0"),
        (["--set", "epoch=1"], "did you mean epochs"),
    ],
)
def test_what_a_plan_is_told_wrongly_is_one_line(bare_folder, capsys, arguments, named):
    code, _, err = slmfast(capsys, "plan", bare_folder, *arguments)
    assert code == 2 and named in err and err.count("\n") == 1


def test_a_folder_that_names_no_model(tmp_path, capsys):
    code, _, err = slmfast(capsys, "plan", tmp_path)
    assert code == 2 and "holds no config.json" in err
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    code, _, err = slmfast(capsys, "plan", tmp_path)
    assert code == 2 and "config.json" in err and err.count("\n") == 1


def mixtral():
    """A configuration whose router asks for values."""
    told = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 300}
    return MixtralConfig(**told, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)


@pytest.mark.parametrize(
    "config",
    [
        "[]",
        "{",
        {"model_type": "t5"},
        {"model_type": "mamba", "num_hidden_layers": 1, "hidden_size": 64},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"hidden_size": "32"},
        {"hidden_act": "loud"},
        mixtral().to_dict(),
    ],
    ids=lambda config: str(config)[:30],
)
def test_what_cannot_be_planned_is_one_line(bare_folder, capsys, config):
    path = bare_folder / "config.json"
    if isinstance(config, dict):
        base = {} if "model_type" in config else json.loads(path.read_text())
        config = json.dumps(base | config)
    path.write_text(config)
    code, out, err = slmfast(capsys, "plan", bare_folder, "--pack-tokens", 256, "--max-length", 64)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("slmfast: "), err


def test_on_cuda_a_model_without_a_plan_is_trained_without(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(budgeted, "_budget", lambda *_: 24 * GIB)
    mark, model = tmp_path / MARK, MixtralForCausalLM(mixtral())
    write_json(mark, {})
    assert fitted(KTO, mark, model, torch.device("cuda"), 64, 1) is KTO and read_json(mark) == {}
    err = capsys.readouterr().err
    assert "train kto: packs are by what is free, for no plan can be made (" in err and err.count("\n") == 1
    with pytest.raises(UserError, match="leave budget out"):
        fitted(replace(KTO, budget="24GiB"), mark, model, torch.device("cuda"), 64, 1)


def test_a_run_takes_the_packs_of_its_plan(tiny_model, make_set, tmp_path):
    data, told = make_set(8, labels=True), {"budget": "1600MiB"}
    out = train_kto(tiny_model, data, tmp_path / "out", TrainSettings(**vars(KTO) | told), progress=False)
    (first,) = json.loads((out / "training.json").read_text())["pack_tokens"]
    longest = max(row["packs"] for row in json.loads((out / "training_log.json").read_text()))
    assert first[0] == 0 and first[1] in {1 << power for power in range(8, 16)} and longest == 1


def test_a_run_that_cannot_fit_is_refused_before_it_starts(tiny_model, make_set, tmp_path, capsys):
    output = tmp_path / "out"
    told = "train", "kto", make_set(8, labels=True), "--model", tiny_model, "-o", output
    code, _, err = slmfast(capsys, *told, "--budget", "1.5GiB", "--set", "learning_rate=1e-5")
    assert code == 2 and "budget of 1.50 GiB leaves it 0.00 GiB: train a smaller model, or raise budget" in err
    assert not output.exists() and err.count("\n") == 1
    code, _, err = slmfast(capsys, *told, "--budget", "24 potatoes", "--set", "learning_rate=1e-5")
    assert code == 2 and "budget is '24 potatoes'" in err


def test_a_refusal_names_the_flags():
    rows = (("weights", 2 * GIB),)
    remedy = {"pack_tokens": None, "optimizer": "adamw8bit-split", "forward": "bf16"}
    line = budgeted.refusal(MemoryPlan(KTO, 3 * GIB, rows, 100, remedy))
    flags = "--set pack_tokens=null --set optimizer=adamw8bit-split --set forward=bf16"
    assert line.endswith(f"a budget of 3.00 GiB leaves it 1.50 GiB: it would fit with {flags}")


def test_a_resumed_run_plans_no_second_time(tiny_model, tmp_path, monkeypatch):
    mark, model = tmp_path / MARK, load_model(tiny_model)
    write_json(mark, {"fingerprint": "x"})
    settings, cpu = TrainSettings(**vars(KTO) | {"budget": "2GiB"}), torch.device("cpu")
    first = fitted(settings, mark, model, cpu, 100, 1)
    packs = [[0, first.pack_tokens]]
    assert read_json(mark) == {"fingerprint": "x", "pack_tokens": packs, "checkpointing": first.checkpointing}
    assert PackBudget(mark, lambda: 1 / 0).at(5) == first.pack_tokens
    monkeypatch.delattr(memory, "plan_memory")
    assert fitted(settings, mark, model, cpu, 100, 1).checkpointing == first.checkpointing
    for told in ("on", "off"):  # by the user's own word, whatever was planned
        assert fitted(replace(settings, checkpointing=told), mark, model, cpu, 100, 1).checkpointing == told
    assert fitted(KTO, tmp_path / "none", model, cpu, 100, 1) is KTO  # no budget on a CPU: nothing is planned


def test_a_budget_is_enforced_on_the_device_and_lifted_after(monkeypatch):
    shares = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (70 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    with pytest.raises(UserError), enforced("24GiB"):
        assert shares == [(24 * GIB - CONTEXT) / (80 * GIB)]
        raise UserError("any")
    with enforced("100GiB"):
        pass
    with enforced(None):
        pass
    assert shares[1:] == [1.0, 1.0, 1.0]


def test_on_cuda_a_plan_takes_no_more_than_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (20 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 2 * GIB)
    device = torch.device("cuda")
    there = 22 * GIB + CONTEXT
    told = [TrainSettings(**vars(KTO) | {"budget": budget}) for budget in (None, "16GiB", "24GiB")]
    assert [budgeted._budget(settings, device) for settings in told] == [there, 16 * GIB, there]
