"""Our side of a training, built of what `slmfast train` is built of, without writing a model at the end."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from training_sides import GROUP, RATE
from transformers import TrainingArguments

from slmfast.store import write_json
from slmfast.training.data import StepOrder, load_tokens, longest_sequence, make_groups
from slmfast.training.kto import KtoObjective
from slmfast.training.loading import load_tokenizer
from slmfast.training.optimizer import make_optimizer, rate_factor
from slmfast.training.passes import Passes, split_weights
from slmfast.training.run import fit_to_device
from slmfast.training.settings import TrainSettings
from slmfast.training.sft import SftObjective
from slmfast.training.trainer import StepTrainer
from slmfast.training.work_folder import MARK


def settings_of(request: dict[str, Any]) -> TrainSettings:
    """The settings of a request: a constant rate, nothing clipped, one epoch."""
    return TrainSettings(
        method=request["method"],
        learning_rate=RATE,
        epochs=1,
        batch_size=GROUP,
        accumulation=request["samples"] // GROUP,
        warmup_ratio=0.0,
        schedule="constant",
        optimizer=request["optimizer"],
        clip=0.0,
        forward="bf16" if request["dtype"] == "bfloat16" else "fp32",
    )


def build(model: nn.Module, request: dict[str, Any]) -> tuple[StepTrainer, float | None]:
    """(a trainer of the request's steps, the seconds that the reference's log-probabilities took, None for SFT)."""
    settings, scratch = settings_of(request), Path(request["scratch"])
    tokens = load_tokens(Path(request["data"]), load_tokenizer(Path(request["tokenizer"])), settings)
    groups = make_groups(len(tokens), settings.batch_size)
    order = StepOrder(len(groups), settings.accumulation, settings.epochs, request["seed"])
    device = torch.device(request["device"])
    mark, warmup = scratch / MARK, settings.warmup_steps(len(order))
    write_json(mark, {})
    longest = longest_sequence(tokens, groups, settings.takes_pairs)
    passes, budget = fit_to_device(model, settings, mark, device, longest, warmup)
    masters = split_weights(model, settings.forward) if settings.splits_weights else None
    optimizer = make_optimizer(model, settings, warmup, masters)
    objective, seconds = _objective(model, settings, tokens, groups, order, passes, budget)
    arguments = TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=1,
        max_steps=len(order),
        max_grad_norm=settings.clip,
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        seed=request["seed"],
        use_cpu=device.type == "cpu",
    )
    optimizers = optimizer, LambdaLR(optimizer, rate_factor(settings, len(order)))
    return StepTrainer(model, objective, order, arguments, optimizers, budget), seconds


def _objective(
    model: nn.Module, settings: TrainSettings, tokens: Any, groups: Any, order: StepOrder, passes: Passes, budget: Any
) -> tuple[Any, float | None]:
    """(the loss, the seconds of the reference's log-probabilities), as train_kto and train_sft make it."""
    if settings.method == "sft":
        return SftObjective(tokens, groups, passes), None
    objective = KtoObjective(tokens, groups, settings, passes)
    steps = [order[step].tolist() for step in range(order.steps_per_epoch)]
    start = time.perf_counter()
    objective.set_reference(objective.reference_logprobs(model.eval(), steps, budget.at(0), progress=False))
    return objective, time.perf_counter() - start
