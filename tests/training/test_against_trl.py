"""One step and twenty steps of SFT and KTO against TRL's own trainers on the same rows, fp32."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM

from slmfast.training.data import load_tokens, make_groups
from slmfast.training.kto import KtoObjective, train_kto
from slmfast.training.loading import load_model, load_tokenizer
from slmfast.training.passes import Passes
from slmfast.training.settings import TrainSettings
from slmfast.training.sft import SftObjective, train_sft

CPU = torch.device("cpu")
PASSES = Passes("fp32", False, CPU)
STEPS = 20


def trl_arguments(folder: Path, **changes) -> dict:
    """Arguments both TRL trainers take: fp32, no cutting, no checkpointing, nothing written or reported."""
    common = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "max_length": None,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
    }
    return {**common, **changes}


def kto_trainer(model: Path, reference: Path, data: Path, folder: Path, optimizers=(None, None), **changes):
    """TRL's KTOTrainer on one set."""
    from trl import KTOConfig, KTOTrainer

    return KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32),
        args=KTOConfig(**trl_arguments(folder, **changes)),
        train_dataset=Dataset.from_parquet(str(data), cache_dir=str(folder / "cache")),
        processing_class=load_tokenizer(model),
        optimizers=optimizers,
    )


def sft_trainer(model: Path, data: Path, folder: Path, **changes):
    """TRL's SFTTrainer on one set, with the loss on completions alone."""
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=SFTConfig(**trl_arguments(folder, completion_only_loss=True, **changes)),
        train_dataset=Dataset.from_parquet(str(data), cache_dir=str(folder / "cache")),
        processing_class=load_tokenizer(model),
    )


def first_step(trainer, batches: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradient of a Trainer's first step, accumulated over `batches`."""
    trainer.model.eval()
    trainer.current_gradient_accumulation_steps = batches
    samples, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), batches, CPU)
    assert len(samples) == batches
    loss = sum(float(trainer.training_step(trainer.model, sample, items)) for sample in samples)
    return loss, gradients(trainer.model)


def our_step(objective, model, groups: list[int], budget: int = 2048) -> tuple[float, dict[str, torch.Tensor]]:
    """The same of our objective."""
    loss = objective.accumulate(model.eval(), groups, budget, torch.Tensor.backward)
    return float(loss), gradients(model)


def kto_objective(model: Path, reference: Path, data: Path, settings: TrainSettings, steps: list, budget: int = 2048):
    """Ours on one set, with the reference's log-probabilities computed step by step."""
    tokens = load_tokens(data, load_tokenizer(model), settings)
    objective = KtoObjective(tokens, make_groups(len(tokens), settings.batch_size), settings, PASSES)
    held = load_model(reference).eval()
    objective.set_reference(objective.reference_logprobs(held, steps, budget, progress=False))
    return objective


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    difference = sum((found[name] - expected[name]).double().square().sum() for name in expected)
    size = sum(gradient.double().square().sum() for gradient in expected.values())
    assert size > 0
    return float((difference / size).sqrt())


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_step_equals_trl(tiny_model, other_tiny_model, make_set, tmp_path, loss_type):
    data = make_set(12, labels=True)
    told = {"beta": 0.3, "desirable_weight": 0.7, "undesirable_weight": 1.5, "loss_type": loss_type}
    trainer = kto_trainer(tiny_model, other_tiny_model, data, tmp_path, gradient_accumulation_steps=3, **told)
    expected_loss, expected = first_step(trainer, 3)

    settings = TrainSettings(method="kto", learning_rate=1e-3, **told)
    objective = kto_objective(tiny_model, other_tiny_model, data, settings, [[0, 1, 2]])
    loss, found = our_step(objective, load_model(tiny_model), [0, 1, 2])

    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert relative_error(found, expected) < 1e-5
    metrics = objective.metrics()
    kl = trainer._metrics["train"]["kl"]
    assert max(kl) > 0.1 or loss_type != "kto"  # else the reference point is not tested
    assert metrics["z0"] == pytest.approx(sum(kl) / 3, abs=1e-4)


def test_sft_step_equals_trl(tiny_model, make_set, tmp_path):
    data = make_set(12)
    trainer = sft_trainer(tiny_model, data, tmp_path, gradient_accumulation_steps=3)
    expected_loss, expected = first_step(trainer, 3)

    settings = TrainSettings(method="sft", learning_rate=1e-3)
    tokens = load_tokens(data, load_tokenizer(tiny_model), settings)
    loss, found = our_step(SftObjective(tokens, make_groups(12, 4), PASSES), load_model(tiny_model), [0, 1, 2])

    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert relative_error(found, expected) < 1e-5


def constant_adamw(model) -> tuple[torch.optim.Optimizer, LambdaLR]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    return optimizer, LambdaLR(optimizer, lambda step: 1.0)


def run_trl(trainer) -> list[float]:
    """The losses of a whole run at a constant rate, with the plain AdamW of torch."""
    trainer.optimizer, trainer.lr_scheduler = constant_adamw(trainer.model)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def plain(method: str) -> TrainSettings:
    return TrainSettings(
        method=method, learning_rate=1e-4, epochs=1, accumulation=2, schedule="constant", warmup_ratio=0.0, clip=0.0
    )


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in json.loads((output / "training_log.json").read_text())]


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_twenty_kto_steps_equal_trl(tiny_model, make_set, tmp_path, loss_type):
    data = make_set(8 * STEPS, labels=True)
    changes = {"gradient_accumulation_steps": 2, "num_train_epochs": 1, "loss_type": loss_type}
    expected = run_trl(kto_trainer(tiny_model, tiny_model, data, tmp_path, **changes))
    settings = replace(plain("kto"), loss_type=loss_type)
    output = train_kto(tiny_model, data, tmp_path / "out", settings, progress=False)
    found = losses(output)
    assert len(found) == STEPS
    assert abs(found[-1] - found[0]) > 1e-4  # else twenty steps show nothing
    assert found == pytest.approx(expected, abs=1e-6)


def test_twenty_sft_steps_equal_trl(tiny_model, make_set, tmp_path):
    data = make_set(8 * STEPS)
    changes = {"gradient_accumulation_steps": 2, "num_train_epochs": 1}
    expected = run_trl(sft_trainer(tiny_model, data, tmp_path, **changes))
    output = train_sft(tiny_model, data, tmp_path / "out", plain("sft"), progress=False)
    found = losses(output)
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=1e-6)
