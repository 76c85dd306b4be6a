"""Supervised fine-tuning: cross-entropy of the completion tokens, normalised over the whole step."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from slmfast.training.data import TokenSet
from slmfast.training.logprobs import forward_precision, make_batch, token_logprobs
from slmfast.training.run import Run, train
from slmfast.training.settings import TrainSettings


class SftObjective:
    """The loss of SFT over groups of rows: its sum over tokens, to be divided by the tokens of the whole step."""

    def __init__(
        self, tokens: TokenSet, groups: Sequence[Sequence[int]], settings: TrainSettings, device: torch.device
    ):
        self._tokens, self._groups = tokens, groups
        self._forward, self._device = settings.forward, device
        self._trained = 0  # tokens since the metrics were last read

    def size(self, groups: Sequence[int]) -> int:
        """How many completion tokens these groups hold."""
        return sum(len(self._tokens.completions[row]) for group in groups for row in self._groups[group])

    def loss_sum(self, model: nn.Module, group: int) -> Tensor:
        """The negative log-probability of all completion tokens of one group, float64 scalar."""
        rows = self._groups[group]
        batch = make_batch([(self._tokens.prompts[row], self._tokens.completions[row]) for row in rows], self._device)
        self._trained += len(batch.targets)
        with forward_precision(self._forward, self._device):
            return -token_logprobs(model, batch).double().sum()

    def metrics(self) -> dict[str, float]:
        """What to log of the step just done."""
        tokens, self._trained = self._trained, 0
        return {"tokens": tokens}


def train_sft(
    model: str | Path,
    dataset: str | Path,
    output: str | Path,
    settings: TrainSettings,
    *,
    seed: int = 0,
    threads: int = 0,
    work: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Fine-tunes a model on prompt and completion pairs and writes a complete fp32 model folder.

    Killed at any instant and called again with the same arguments, it ends with the same bytes.

    Args:
        model: folder of the starting model, which needs a tokenizer with a chat template.
        dataset: Parquet file or folder of them in TRL's conversational format: `prompt` and `completion`, both lists
            of {role, content}.
        output: the new model's folder, which appears whole or not at all; `training_log.json` in it has a row a step.
        settings: with method "sft".
        seed: orders the groups of the second and later epochs.
        threads: torch's threads, 0 for as many as it has; the bits of the result belong to their number.
        work: folder for checkpoints; by default `.work/<name>` beside the output.
        progress: show progress on stderr.

    Raises:
        UserError: anything about the model, the data, the output or the loss that the user can mend.
    """
    run = Run(Path(model), Path(dataset), Path(output), settings, seed, threads, work and Path(work), progress)
    return train(run, "sft", lambda _, tokens, groups, device: SftObjective(tokens, groups, settings, device))
