"""Supervised fine-tuning: cross-entropy of the completion tokens, normalised over the whole step."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from slmfast.training.arguments import Run
from slmfast.training.data import TokenSet
from slmfast.training.passes import Passes
from slmfast.training.run import Setup, train
from slmfast.training.settings import TrainSettings


class SftObjective:
    """The loss of SFT: the mean negative log-probability of all completion tokens of a step."""

    def __init__(self, tokens: TokenSet, groups: Sequence[Sequence[int]], passes: Passes):
        self._tokens, self._groups, self._passes = tokens, groups, passes
        self._noted: dict[str, float] = {}

    def accumulate(
        self, model: nn.Module, groups: Sequence[int], budget: int, backward: Callable[[Tensor], None]
    ) -> Tensor:
        """Adds the gradient of a step's loss, pack by pack; the loss, float64 scalar."""
        rows = [row for group in groups for row in self._groups[group]]
        pairs = [(self._tokens.prompts[row], self._tokens.completions[row]) for row in rows]
        size, packs = sum(len(completion) for _, completion in pairs), 0
        total = torch.zeros((), dtype=torch.float64, device=self._passes.device)
        with self._passes.training(model, pairs, budget) as batches:
            for batch in batches:
                loss = -self._passes.train_logprobs(model, batch).sum() / size
                backward(loss)
                total += loss.detach()
                packs += 1
        self._noted = {"tokens": size, "packs": packs}
        return total

    def longest(self, groups: Sequence[int]) -> int:
        """The most tokens that a sequence of these groups has."""
        return max(self._tokens.length(row, row) for group in groups for row in self._groups[group])

    def metrics(self) -> dict[str, float]:
        """What to log of the step just done: its completion tokens and its packs."""
        return self._noted


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

    def objective(_: nn.Module, setup: Setup) -> SftObjective:
        return SftObjective(setup.tokens, setup.groups, setup.passes)

    return train(run, "sft", objective)
