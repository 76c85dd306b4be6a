"""transformers.Trainer whose batch is a whole step: its loop, callbacks and logging, with our order, loss and state.

A step is defined by samples, not by what a device holds at once: the objective takes the samples of a step in packs of
as many tokens as the memory holds, and divides by the size of the whole step. Nothing draws random numbers but the
order of the groups, which is a function of the seed and the step; so a resumed run repeats what the killed one would
have done, bit for bit.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from slmfast.errors import UserError
from slmfast.progress import Progress
from slmfast.training import checkpoint
from slmfast.training.data import StepOrder
from slmfast.training.pack_budget import PackBudget

FIRST = ("step", "epoch", "loss", "learning_rate", "grad_norm")  # of a row of the log
CHECKPOINTS_KEPT = 2  # the one before the newest serves if the newest is damaged


class Objective(Protocol):
    """What is minimised."""

    def accumulate(
        self, model: nn.Module, groups: Sequence[int], budget: int, backward: Callable[[Tensor], None]
    ) -> Tensor:
        """Adds the gradient of a step's loss in packs of `budget` tokens; the loss, float64 scalar."""

    def longest(self, groups: Sequence[int]) -> int:
        """The most tokens that a sequence of these groups has."""

    def metrics(self) -> dict[str, float]:
        """What to log of the step just done."""


class StepTrainer(Trainer):
    """A Trainer that takes one step of `order` at a time and computes it in packs of `budget`.

    Its checkpoints are ours (see `checkpoint`): no pickle, written whole, checked before use.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        order: StepOrder,
        arguments: TrainingArguments,
        optimizers: tuple[torch.optim.Optimizer, LambdaLR],
        budget: PackBudget,
    ):
        super().__init__(
            model=model, args=arguments, train_dataset=order, data_collator=_only_item, optimizers=optimizers
        )
        self.remove_callback(PrinterCallback)
        self._objective, self._order, self._budget = objective, order, budget

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """Accumulates the gradient of one whole step, fp32, and returns its loss."""
        self.model.eval()  # no dropout: the reference was scored without, and a resumed run must repeat the step
        groups = inputs["groups"].tolist()
        total = self._budget.run(
            step=self.state.global_step,
            longest=self._objective.longest(groups),
            compute=lambda tokens: self._objective.accumulate(self.model, groups, tokens, self.accelerator.backward),
            undo=lambda: self.model.zero_grad(set_to_none=True),
        )
        if not torch.isfinite(total):
            self._stop("loss")
        return total.float()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(float(norm)):
            self._stop("gradient's norm")
        return norm

    def _stop(self, what: str) -> None:
        step = self.state.global_step + 1
        remedy = (
            "check the starting model's weights, and the data"
            if step == 1
            else ("lower learning_rate, or check the data; the checkpoints before it are kept")
        )
        raise UserError(f"the {what} is not finite at step {step}: {remedy}")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the objective's figures to a step's log, and the epoch as a share of the data seen."""
        if "loss" in logs:
            step = self.state.global_step - 1
            logs.update(self._objective.metrics() | {"pack_tokens": self._budget.at(step)})
        self.state.epoch = self.state.global_step / self._order.steps_per_epoch
        super().log(logs, start_time)

    def history(self) -> list[dict[str, float]]:
        """One row a step: step, epoch, loss, learning_rate, grad_norm and the objective's figures. No times.

        The figures are in the order of their names, whatever a checkpoint made of the rows before it.
        """
        rows = [row for row in self.state.log_history if "loss" in row]
        return [{key: row[key] for key in (*FIRST, *sorted(row.keys() - set(FIRST))) if key in row} for row in rows]

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the inputs are numbers of groups, from which transformers can't tell."""
        return 0

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        checkpoint.save(folder, self.model, self.optimizer, self.lr_scheduler, self.state.save_to_json)
        checkpoint.prune(folder.parent, CHECKPOINTS_KEPT)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint.load_weights(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            checkpoint.load_optimizer(Path(checkpoint_folder), self.optimizer, self.lr_scheduler)


class ShowProgress(TrainerCallback):
    """Shows on stderr how many steps are done."""

    def __init__(self, method: str):
        self._method = method
        self._shown: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._shown = Progress(f"train {self._method}", state.max_steps - state.global_step, "steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._shown.add()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._shown.close()


def _only_item(items: list[Any]) -> dict[str, Tensor]:
    """A Trainer batch is one step, given by the numbers of its groups."""
    return {"groups": torch.as_tensor(items[0])}
