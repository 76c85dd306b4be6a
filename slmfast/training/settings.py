"""What a training run is told, validated where it enters. Imports no torch, so that a recipe can embed it."""

import math
from dataclasses import dataclass
from typing import Any

from slmfast.errors import UserError
from slmfast.sizes import parse_bytes

METHODS = ("sft", "kto")
SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "adamw8bit", "adamw8bit-split")
FORWARDS = ("fp32", "bf16", "split")
LOSS_TYPES = ("kto", "apo_zero_unpaired")
REPORTS = ("none", "tensorboard", "wandb")
TOO_LONG = ("refuse", "skip")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The settings of one run of SFT or KTO; the defaults are the paper's where it names them.

    Every value is checked on construction; a bad one is a UserError that names its key.
    """

    method: str
    """"sft" or "kto"."""

    learning_rate: float
    """The peak rate: the paper uses 5e-8 for SFT, 1e-8 for KTO and 3e-8 for KTO after SFT."""

    epochs: int = 6
    """Passes over the data."""

    batch_size: int = 4
    """Samples in a group; KTO rotates the replies of a group for its KL estimate."""

    accumulation: int = 250
    """Groups in an optimizer step: a step is batch_size x accumulation samples, in as few packs as memory allows."""

    warmup_ratio: float = 0.005
    """The share of all steps that warm up; the first of them already has a rate above zero."""

    schedule: str = "cosine"
    """What the rate does after the warm-up: "cosine" or "linear" down to zero, or "constant"."""

    optimizer: str = "adamw"
    """"adamw": fp32 states; "adamw8bit": bitsandbytes' 8-bit states; "adamw8bit-split": 8-bit states of our own, the
    embedding's too, and fp32 weights in two halves, of which a bf16 forward reads one without a copy: the least memory.
    All of them compensate weights too large for a step."""

    beta: float = 0.1
    """KTO's beta: how strongly the policy is held to the reference."""

    loss_type: str = "kto"
    """KTO's loss: "kto", or "apo_zero_unpaired", which has no reference point and so no pass over mismatched pairs."""

    desirable_weight: float = 1.0
    """KTO's weight of a desirable reply's loss."""

    undesirable_weight: float = 1.0
    """KTO's weight of an undesirable reply's loss."""

    max_length: int = 2048
    """The most tokens of prompt and reply together; nothing is ever cut to fit."""

    too_long: str = "refuse"
    """What a longer row means: "refuse" stops with an error, "skip" leaves the row out and counts it."""

    clip: float = 1.0
    """The gradient's norm is clipped to this; 0 clips nothing."""

    save_steps: int = 50
    """Optimizer steps between two checkpoints."""

    forward: str = "fp32"
    """The precision of the forward and backward pass: "fp32"; "bf16" by autocast; or "split", bf16
    products of both halves of the weights, which needs the optimizer adamw8bit-split. The masters carry fp32's
    precision in all three; what share of the update the forward saw is printed at the end of a run."""

    pack_tokens: int | None = None
    """The most tokens of a pack; by default what suits the machine, chosen at a run's first start and then kept. The
    result depends on it by no more than rounding. Where the memory does not hold a pack, it is halved."""

    checkpointing: bool | str = "auto"
    """Whether decoder layers run again in the backward pass, which takes a third more time and much less memory: "on",
    "off", or "auto": off where a plan of the memory says that this fits, and else on; on a CPU without a budget off.
    The result is the same to the bit."""

    budget: str | int | None = None
    """The memory of the device that the run may take, such as "24GiB", or bytes. Packs and checkpointing are planned
    for it where they are left open, and a run that can't fit is refused before it starts."""

    lora_rank: int = 0
    """The rank of LoRA adapters, through peft, on every linear layer but the LM head; they alone are trained, at rates
    far above the paper's, and merged into the model that is saved. 0: all weights are trained."""

    lora_alpha: float | None = None
    """LoRA's scale: an update counts lora_alpha / lora_rank times; by default twice the rank."""

    liger: bool = False
    """Whether norms, rotations and gated MLPs are Liger Kernel's, on CUDA, where it is installed."""

    report_to: str = "none"
    """Where transformers' Trainer also reports to: "tensorboard" (below `runs/` in the work folder, or where the
    environment variable TENSORBOARD_LOGGING_DIR says), "wandb" or "none"."""

    def __post_init__(self) -> None:
        if isinstance(self.checkpointing, bool):  # YAML reads on and off as such
            object.__setattr__(self, "checkpointing", "on" if self.checkpointing else "off")
        for key, choices in (
            ("method", METHODS),
            ("schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS),
            ("forward", FORWARDS),
            ("loss_type", LOSS_TYPES),
            ("checkpointing", ("auto", "on", "off")),
            ("report_to", REPORTS),
            ("too_long", TOO_LONG),
        ):
            _check(key, getattr(self, key), getattr(self, key) in choices, f"set it to one of {', '.join(choices)}")
        for key in ("epochs", "batch_size", "accumulation", "max_length", "save_steps"):
            value = getattr(self, key)
            _check(key, value, _is_integer(value) and value >= 1, "set it to a whole number of at least 1")
        if self.pack_tokens is not None:
            whole = _is_integer(self.pack_tokens) and self.pack_tokens >= 1
            _check("pack_tokens", self.pack_tokens, whole, "set it to a whole number of at least 1, or leave it out")
        if self.budget is not None:
            parse_bytes(self.budget)
        rank = self.lora_rank
        _check("lora_rank", rank, _is_integer(rank) and rank >= 0, "set it to a whole number, 0 for no LoRA")
        if self.lora_alpha is not None:
            above = _is_number(self.lora_alpha, above=0.0)
            _check("lora_alpha", self.lora_alpha, above, "set it to a number above 0, or leave it out")
        _check("liger", self.liger, isinstance(self.liger, bool), "set it to on or off")
        if self.lora_rank and self.splits_weights:
            raise UserError(
                f"lora_rank is {rank}, but adamw8bit-split keeps the weights it trains in two halves, and LoRA trains "
                "none of them: set optimizer to adamw or adamw8bit"
            )
        for key in ("learning_rate", "beta"):
            _check(key, getattr(self, key), _is_number(getattr(self, key), above=0.0), "set it to a number above 0")
        for key in ("desirable_weight", "undesirable_weight", "clip"):
            _check(key, getattr(self, key), _is_number(getattr(self, key)), "set it to a number of at least 0")
        ratio = self.warmup_ratio
        _check("warmup_ratio", ratio, _is_number(ratio) and ratio <= 1, "set it to a share between 0 and 1")
        if self.forward == "split" and not self.splits_weights:
            raise UserError(
                f"forward is 'split', but the optimizer {self.optimizer} keeps whole weights: set forward to fp32 or "
                "bf16, or optimizer to adamw8bit-split"
            )
        if self.takes_pairs and self.batch_size < 2:
            raise UserError("batch_size is 1, which leaves KTO no other reply to pair: set it to at least 2")

    @property
    def takes_pairs(self) -> bool:
        """Whether the loss asks for mismatched pairs of a prompt and another prompt's reply."""
        return self.method == "kto" and self.loss_type == "kto"

    @property
    def splits_weights(self) -> bool:
        """Whether the weights are kept in two halves of 16 bits."""
        return self.optimizer == "adamw8bit-split"

    @property
    def effective_batch(self) -> int:
        """Samples in one optimizer step."""
        return self.batch_size * self.accumulation

    def warmup_steps(self, total: int) -> int:
        """How many of `total` steps warm up."""
        return min(total, math.ceil(self.warmup_ratio * total))


def _check(key: str, value: Any, right: bool, remedy: str) -> None:
    if not right:
        raise UserError(f"{key} is {value!r}: {remedy}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any, above: float | None = None) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return value > above if above is not None else value >= 0
