"""Every bad setting is named with its remedy, and the schedule keeps its laws."""

import subprocess
import sys

import pytest
import yaml

from slmfast.errors import UserError
from slmfast.recipe import build
from slmfast.sizes import parse_bytes
from slmfast.training.optimizer import rate_factor
from slmfast.training.settings import TrainSettings


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method", "dpo"),
        ("learning_rate", 0),
        ("learning_rate", float("nan")),
        ("learning_rate", "1e-8"),
        ("epochs", 0),
        ("epochs", 1.5),
        ("batch_size", True),
        ("accumulation", -1),
        ("warmup_ratio", 1.2),
        ("schedule", "step"),
        ("optimizer", "sgd"),
        ("beta", -0.1),
        ("desirable_weight", -1),
        ("undesirable_weight", None),
        ("max_length", 0),
        ("too_long", "cut"),
        ("clip", float("inf")),
        ("save_steps", 0),
        ("forward", "fp16"),
        ("loss_type", "dpo"),
        ("pack_tokens", 0),
        ("pack_tokens", 2048.0),
        ("checkpointing", "yes"),
        ("checkpointing", 1),
        ("report_to", "mail"),
    ],
)
def test_a_bad_setting_is_named(key, value):
    with pytest.raises(UserError, match=rf"^{key} is .*: set it to "):
        TrainSettings(**{"method": "sft", "learning_rate": 1e-8, key: value})


def test_kto_needs_a_second_reply_in_a_group():
    with pytest.raises(UserError, match="batch_size is 1"):
        TrainSettings(method="kto", learning_rate=1e-8, batch_size=1)
    assert TrainSettings(method="sft", learning_rate=1e-8, batch_size=1).effective_batch == 250


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_split_forward_needs_split_weights(optimizer):
    told = {"method": "sft", "learning_rate": 1e-8, "forward": "split"}
    with pytest.raises(
        UserError, match=f"the optimizer {optimizer} keeps whole weights: set forward to fp32 or bf16, or"
    ):
        TrainSettings(**told, optimizer=optimizer)
    assert TrainSettings(**told, optimizer="adamw8bit-split").splits_weights


def test_apo_zero_needs_no_second_reply():
    settings = {"method": "kto", "learning_rate": 1e-8, "loss_type": "apo_zero_unpaired"}
    assert TrainSettings(batch_size=1, **settings).effective_batch == 250


@pytest.mark.parametrize(("text", "value"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("'on'", "on")])
def test_yamls_on_and_off_are_these_words(text, value):
    told = yaml.safe_load(f"{{method: sft, learning_rate: 1.0e-8, checkpointing: {text}}}")
    assert build(TrainSettings, told, "").checkpointing == value


def test_the_defaults_are_the_papers():
    settings = TrainSettings(method="kto", learning_rate=1e-8)
    assert (settings.effective_batch, settings.warmup_steps(600), settings.epochs) == (1000, 3, 6)


def test_settings_import_without_torch():
    code = "import sys, slmfast.training.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total", [1, 2, 7, 600])
@pytest.mark.parametrize("ratio", [0.0, 0.005, 0.3, 1.0])
def test_the_rate_is_never_zero_rises_to_its_peak_and_falls(schedule, total, ratio):
    settings = TrainSettings(method="sft", learning_rate=1.0, schedule=schedule, warmup_ratio=ratio)
    rates = [rate_factor(settings, total)(step) for step in range(total)]
    peak = rates.index(1.0)
    assert peak == max(0, settings.warmup_steps(total) - 1)
    assert min(rates) > 0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_three_warm_up_steps_rise_by_thirds():
    settings = TrainSettings(method="sft", learning_rate=1.0)
    factor = rate_factor(settings, 600)
    assert [factor(step) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factor(301) == pytest.approx(0.5, abs=1e-3)  # half-way from the peak to the end


def test_a_budget_is_a_text_or_bytes():
    told = {"method": "sft", "learning_rate": 1e-5}
    for budget in ("3 GB", 3_000_000_000, "3000000000"):
        assert parse_bytes(build(TrainSettings, told | {"budget": budget}, "").budget) == 3_000_000_000
    with pytest.raises(UserError, match="budget"):
        build(TrainSettings, told | {"budget": True}, "")
