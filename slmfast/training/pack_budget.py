"""How many tokens a pack of training may have, and what happens where the memory does not hold it.

The budget is chosen once and kept with the run's checkpoints; a run that is resumed takes the packs that it had, step
by step, whatever memory is free by then.
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from slmfast.errors import UserError
from slmfast.scoring.budget import budget_for
from slmfast.scoring.forward import is_out_of_memory
from slmfast.store import read_json, write_json

CPU_TOKENS = 2048  # more gains nothing, and takes 2 MB a token at Qwen2-0.5B's shape
KEY = "pack_tokens"  # in the work folder's mark

Result = TypeVar("Result")


class PackBudget:
    """The most tokens of a pack at each step: a list of (first step, tokens), kept in the work folder's mark."""

    def __init__(self, mark: Path, first: Callable[[], int]):
        """Reads the budgets of an earlier start from `mark`, or asks `first` for one and writes it there."""
        self._mark = mark
        content = read_json(mark)
        self.history: list[tuple[int, int]] = [tuple(entry) for entry in content.get(KEY, [])]
        if not self.history:
            self._append(0, first())

    def at(self, step: int) -> int:
        """The budget of a step, counted from 0."""
        return [tokens for first, tokens in self.history if first <= step][-1]

    def run(self, step: int, longest: int, compute: Callable[[int], Result], undo: Callable[[], Any]) -> Result:
        """Computes with the step's budget; whenever the memory does not hold it, undoes all of it and takes half.

        Args:
            longest: the tokens of the longest sequence that is computed: no pack can be smaller.

        Raises:
            UserError: packs of single sequences don't fit either.
        """
        while True:
            tokens = self.at(step)
            try:
                return compute(tokens)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            # Out of the block above the error has gone, and with it the tensors of the failed pack.
            undo()
            gc.collect()  # what a failed pack left in cycles of references
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if tokens <= longest:
                raise UserError(
                    f"the memory does not hold a sequence of {longest} tokens in packs of {tokens}: set checkpointing "
                    "to on or max_length lower, or take a device with more memory"
                )
            self._append(step, tokens // 2)

    def _append(self, step: int, tokens: int) -> None:
        self.history.append((step, tokens))
        write_json(self._mark, read_json(self._mark) | {KEY: self.history})


def usual_budget(model: nn.Module, checkpointing: bool, state_bytes: int) -> int:
    """Tokens of a pack for a model on its device.

    On CUDA the largest power of two for which what is free now, less gradients and the optimizer's states, has room.

    Args:
        state_bytes: what the optimizer keeps for one weight.
    """
    weight = model.get_output_embeddings().weight
    if not weight.is_cuda:
        return CPU_TOKENS
    free, _ = torch.cuda.mem_get_info(weight.device)
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return budget_for(
        free - weights * (4 + state_bytes), bytes_per_token(model.config.get_text_config(), checkpointing)
    )


def bytes_per_token(config: Any, checkpointing: bool) -> int:
    """About what a forward pass keeps of a token for the backward pass, in fp32."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    layer = 4 * (16 * hidden + 4 * inner)
    return 4 * hidden * layers + 2 * layer if checkpointing else layer * (layers + 1)
