"""What a training run will take of a CUDA device's memory, and the packs that fit a budget. Nothing is computed.

A plan is the peak of one full-size step on fake tensors (`fake_step`): the larger of the passes over full packs and
the optimizer's step, with all gradients and states there. What comes before takes less: the reference pass has no
gradients in memory, of which a second model's weights take the place.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from slmfast.errors import UserError
from slmfast.model_folder import INDEX, SINGLE, ModelWeights
from slmfast.scoring.budget import CUDA_TOKENS, LEAST_TOKENS, key_width
from slmfast.scoring.packing import KEYS_A_TOKEN
from slmfast.sizes import GIB, parse_bytes
from slmfast.training.fake_step import (
    ACTIVATIONS,
    FakeRun,
    coarse_weights,
    fake_model,
    one_line,
    split_names,
    values_refused,
)
from slmfast.training.settings import TrainSettings

RESERVE = 3 * GIB // 2  # the device's context, cuBLAS, and what fragments
RATES = {"sft": 5e-8, "kto": 1e-8}  # the paper's, which decide what is compensated
SHORTEST = 256  # tokens: a window below which none is proposed


Rows = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class MemoryPlan:
    """What a run takes of a device, and whether a budget holds it."""

    settings: TrainSettings
    """As they were given, with `pack_tokens` and `checkpointing` as chosen."""

    budget: int
    """Bytes of the device that the run may take."""

    rows: Rows
    """What the memory holds at the peak, and the bytes of each: weights, gradients, optimizer states, activations,
    temporaries."""

    longest: int
    """The tokens of the longest sequence."""

    remedy: Mapping[str, Any] | None = None
    """Settings with which the run would fit, where it doesn't and there are any."""

    weights_known: bool = True
    """Whether weights were there to tell which are too large for small steps and compensated; else none is counted."""

    @property
    def peak_bytes(self) -> int:
        """All rows together."""
        return _total(self.rows)

    @property
    def usable_bytes(self) -> int:
        """The budget less what a device takes for itself."""
        return max(0, self.budget - RESERVE)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the usable part of the budget."""
        return self.peak_bytes <= self.usable_bytes


def plan_memory(
    model: nn.Module | str | Path,
    method: str = "kto",
    budget: str | int = "24GiB",
    *,
    settings: TrainSettings | None = None,
    longest: int | None = None,
    warmup_steps: int = 1,
    seek_remedy: bool = True,
    **changes: Any,
) -> MemoryPlan:
    """Plans the memory of training on a CUDA device, on any machine.

    Chosen are `pack_tokens`, the largest power of two that fits, and `checkpointing`, off where that fits; what the
    settings fix stays. A plan that doesn't fit is a plan as well: its `.fits` is False.

    Args:
        model: a model, or a folder with a config.json. Where it has weights they are read, to see which of them are
            compensated.
        method: "sft" or "kto".
        budget: bytes, or a text such as "24GiB".
        settings: of the run; by default those of `method` with the paper's rate.
        longest: tokens of the longest sequence; by default the settings' max_length, within the model's positions.
        warmup_steps: of the run, on which depends what is compensated.
        seek_remedy: whether to look for settings that fit where these don't.
        changes: settings by their names, laid over the others.

    Raises:
        UserError: the budget or a setting is none, the folder holds no configuration of a causal language model, or
            its code can't run without values.
    """
    told = settings or TrainSettings(method=method, learning_rate=RATES.get(method, 1e-8))
    told = replace(told, **changes)
    size = parse_bytes(budget)
    source = _Source(model)
    positions = getattr(source.config.get_text_config(), "max_position_embeddings", None) or told.max_length
    window = min(longest or told.max_length, positions)
    chosen, rows = _chosen(source.run(told, warmup_steps), told, window, size)
    plan = MemoryPlan(chosen, size, rows, window, weights_known=source.has_weights)
    if plan.fits or not seek_remedy:
        return plan
    limits = (size, window, warmup_steps, longest is None)
    return replace(plan, remedy=_remedy(source, told, *limits))


class _Source:
    """A model to be planned: its configuration, and its weights if it has any."""

    def __init__(self, model: nn.Module | str | Path):
        self._model = model if isinstance(model, nn.Module) else None
        self._folder = None if self._model is not None else Path(model)
        self.config = self._model.config if self._model is not None else load_config(self._folder)
        self.has_weights = self._model is not None or any((self._folder / name).is_file() for name in (SINGLE, INDEX))

    def run(self, settings: TrainSettings, warmup_steps: int) -> FakeRun:
        frozen = set() if self._model is None else {n for n, p in self._model.named_parameters() if not p.requires_grad}
        return FakeRun(self.config, settings, self._coarse(settings, warmup_steps), frozen)

    def _coarse(self, settings: TrainSettings, warmup_steps: int) -> dict[str, int]:
        if not self.has_weights:
            return {}
        with values_refused(), FakeTensorMode():
            split = split_names(fake_model(self.config), settings)
        return coarse_weights(self._weights(), split, settings, warmup_steps)

    @torch.no_grad()
    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        if self._model is not None:
            yield from self._model.named_parameters()
            return
        with ModelWeights(self._folder) as weights:
            for name in weights.names:
                yield name, weights[name]


def load_config(folder: Path) -> Any:
    """The configuration of a model's folder."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json: give a model's folder, or one with its configuration alone")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each model's configuration has its own ways to fail over a bad value
        raise UserError(
            f"{folder / 'config.json'} names no model that transformers knows ({one_line(error)}): check it"
        ) from error


def _chosen(run: FakeRun, settings: TrainSettings, longest: int, budget: int) -> tuple[TrainSettings, Rows]:
    """The settings with packs and checkpointing that fit, else with the least; and the peak with them."""
    sizes = [settings.pack_tokens] if settings.pack_tokens else pack_sizes(longest)
    ways = {"off": (False,), "on": (True,)}.get(settings.checkpointing, (False, True))
    for checkpointing in ways:
        peak = functools.cache(functools.partial(_peak, run, checkpointing, longest))
        tokens = largest_fitting(sizes, lambda tokens: _total(peak(tokens)), budget - RESERVE)  # noqa: B023
        if tokens is not None:
            break
    tokens = tokens or sizes[0]
    return replace(settings, pack_tokens=tokens, checkpointing="on" if checkpointing else "off"), peak(tokens)


def _peak(run: FakeRun, checkpointing: bool, longest: int, pack_tokens: int) -> Rows:
    """What a run holds when it holds most: in its passes, or in the optimizer's step."""
    passes = run.pass_peak(pack_tokens, checkpointing, longest)
    if not checkpointing:
        passes[ACTIVATIONS] += shared_keys(run, pack_tokens, longest)
    peaks = passes, run.step_peak
    return max((tuple(kinds.items()) for kinds in peaks), key=_total)


def shared_keys(run: FakeRun, pack_tokens: int, longest: int) -> int:
    """Bytes of keys and values that full packs of short replies to long prompts keep beyond those of long sequences.

    Attention copies those of each reply's whole path, up to KEYS_A_TOKEN a token, and keeps them in every layer that is
    not checkpointed. Which data share prompts is not known to a plan: it leaves the room.
    """
    size = 2 if run.forward == "bf16" else 4
    config = run.model.config.get_text_config()
    beyond = min(KEYS_A_TOKEN, longest) - 1
    return size * pack_tokens * beyond * key_width(config) * getattr(config, "num_hidden_layers", 0)


def _total(rows: Rows) -> int:
    return sum(size for _, size in rows)


def pack_sizes(longest: int) -> list[int]:
    """The sizes of packs worth trying: powers of two, from the one that holds at most one longest sequence."""
    least = max(LEAST_TOKENS, min(CUDA_TOKENS, 1 << (longest.bit_length() - 1)))
    return [1 << power for power in range(least.bit_length() - 1, CUDA_TOKENS.bit_length())]


def largest_fitting(sizes: Sequence[int], peak: Callable[[int], int], usable: int) -> int | None:
    """The largest of rising sizes whose peak, which rises with them, fits; None where the first does not.

    A peak takes a while to count, and is nearly a line: each guess is where the line of the last two leaves the room.
    """
    if peak(sizes[0]) > usable:
        return None
    best, over, guess = 0, len(sizes), 1
    while best + 1 < over:
        guess = min(max(guess, best + 1), over - 1)
        found = peak(sizes[guess])
        slope = (found - peak(sizes[best])) / (sizes[guess] - sizes[best])
        if found > usable:
            over = guess
        else:
            best = guess
        room = sizes[best] + (usable - peak(sizes[best])) / slope if slope > 0 else sizes[-1]
        guess = max((number for number, size in enumerate(sizes) if size <= room), default=best + 1)
    return sizes[best]


def _remedy(
    source: _Source, told: TrainSettings, budget: int, longest: int, warmup_steps: int, shorten: bool
) -> dict[str, Any] | None:
    """The first few changes of the settings with which they fit, from what costs least to what costs most."""
    runs: dict[tuple[str, str], FakeRun] = {}
    for changes in _changes(told, longest if shorten else 0):
        changed = replace(told, **changes)
        kind = changed.optimizer, changed.forward
        if kind not in runs:
            runs = {kind: source.run(changed, warmup_steps)}  # one at a time
        window = min(longest, changed.max_length)
        least = changed.pack_tokens or pack_sizes(window)[0]
        # The optimizer's step alone is known at once, and tells of most that can't fit.
        if sum(runs[kind].step_peak.values()) > budget - RESERVE:
            continue
        if _total(_peak(runs[kind], changed.checkpointing != "off", window, least)) <= budget - RESERVE:
            return changes
    return None


def _changes(told: TrainSettings, longest: int) -> Iterable[dict[str, Any]]:
    free: dict[str, Any] = {"checkpointing": "auto"} if told.checkpointing == "off" else {}
    if free:
        yield free
    if told.pack_tokens:
        yield {"pack_tokens": None}
        free |= {"pack_tokens": None}
        if len(free) > 1:
            yield dict(free)
    best = dict(free)
    optimizers = [{"optimizer": "adamw8bit"}]
    if not told.lora_rank:
        optimizers += [{"optimizer": "adamw8bit-split"}, {"optimizer": "adamw8bit-split", "forward": "bf16"}]
    for lighter in optimizers:
        lighter = {key: value for key, value in lighter.items() if getattr(told, key) != value}
        possible = not (told.forward == "split" and lighter.get("optimizer") == "adamw8bit")
        if lighter and possible:
            best = free | lighter
            yield best
    while (longest := longest // 2) >= SHORTEST:
        yield best | {"max_length": longest}
