"""TRL's side of a training: its own trainers, with the arguments that make their answer ours.

Same rows in the same order, micro-batches of the KL groups' size, constant rate, no clipping, no weight decay, nothing
cut. Gradient checkpointing, TRL's default, is on where it is on for us: on CUDA.
"""

import copy
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from training_sides import GROUP, RATE, SIDES
from trl import KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from slmfast.training.loading import load_tokenizer
from slmfast.training.optimizer import BETAS, EPS


class TimedKTOTrainer(KTOTrainer):
    """TRL's trainer, with a clock around what it precomputes."""

    precompute_seconds: float | None = None

    def _precompute_ref_logps(self, *arguments: Any, **more: Any) -> Dataset:
        start = time.perf_counter()
        found = super()._precompute_ref_logps(*arguments, **more)
        self.precompute_seconds = time.perf_counter() - start
        return found


def build(model: nn.Module, request: dict[str, Any]) -> tuple[Any, float | None]:
    """(a trainer of the request's steps, the seconds that the reference's log-probabilities took, or None)."""
    side, scratch = SIDES[request["side"]], Path(request["scratch"])
    common = {
        "model": model,
        "train_dataset": Dataset.from_parquet(request["data"], cache_dir=str(scratch / "cache")),
        "processing_class": load_tokenizer(Path(request["tokenizer"])),
        "optimizers": (None, None) if request["optimizer"] == "adamw" else _eight_bit(model),
    }
    told = _arguments(request) | side.options
    if request["method"] == "sft":
        return SFTTrainer(args=SFTConfig(completion_only_loss=True, **told), **common), None
    reference = copy.deepcopy(model) if side.copies == 2 else None
    trainer = TimedKTOTrainer(args=KTOConfig(**told), ref_model=reference, **common)
    return trainer, trainer.precompute_seconds


def _arguments(request: dict[str, Any]) -> dict[str, Any]:
    on_gpu, low = request["device"] == "cuda", request["dtype"] == "bfloat16"
    return {
        "output_dir": str(Path(request["scratch"]) / "trl"),
        "per_device_train_batch_size": GROUP,
        "gradient_accumulation_steps": request["samples"] // GROUP,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "max_grad_norm": 0.0,
        "max_length": None,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": on_gpu,
        "bf16": low,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "seed": request["seed"],
    }


def _eight_bit(model: nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """bitsandbytes' optimizer, which stands beside our 8-bit ones, with all of its states in 8 bits.

    By its name alone (`optim`), transformers would leave embeddings' states in 32.
    """
    from bitsandbytes.optim import AdamW8bit

    optimizer = AdamW8bit(model.parameters(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=0.0)
    return optimizer, LambdaLR(optimizer, lambda step: 1.0)
