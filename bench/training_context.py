"""What every case of the training benchmark is given, and how it has sides train."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from case_runner import Notes
from context import available_memory
from scoring_plan import weight_bytes
from scoring_texts import Drawer
from training_gate import BF16, FP32, Tolerance, same_answer
from training_race import Played, race
from training_rows import Rows, draw_rows
from training_sides import OURS, SIDES

CHECKED = 2  # steps that are compared in fp32 before others are timed in bf16
# Of a process besides its model: libraries, and what a forward pass keeps of 2,048 tokens a layer for its backward.
ANY_PROCESS, A_LAYER = 1 << 30, 250 << 20


@dataclass(frozen=True)
class Sizes:
    """How much is trained."""

    layers: int
    """Of the model."""
    samples: int
    """Of a step."""
    steps: int
    """That are timed; a warm-up goes before them."""


@dataclass(frozen=True, kw_only=True)
class Context(Notes):
    """The options that all cases share, and what is made of them once."""

    model_config: str
    """A folder, or the name of a known shape."""
    tokenizer_folder: str
    tokenizer: Any
    config: Any
    """With as many layers as the sizes say."""
    device: torch.device
    dtype: torch.dtype
    threads: int
    seed: int
    sizes: Sizes
    known: dict[tuple[str, str, str, str], Played] = field(default_factory=dict)
    """What a side gave, by (method, side, optimizer, dtype): memory is told of trainings that were timed."""
    checked: dict[tuple[str, str, str], bool] = field(default_factory=dict)
    """Whether a peer of a method and an optimizer answers our question, seen in fp32."""

    @cached_property
    def drawer(self) -> Drawer:
        """Tokenised at the first use."""
        return Drawer(self.tokenizer, self.seed)

    @cached_property
    def rows(self) -> dict[str, Rows]:
        """The training set of each method."""
        count = self.sizes.samples * (self.sizes.steps + 1)
        return {method: draw_rows(self.drawer, method, count, self.seed) for method in ("kto", "sft")}

    @property
    def low(self) -> bool:
        """Whether forward passes are in bf16."""
        return self.dtype == torch.bfloat16

    def train(self, method: str, sides: Sequence[str], optimizer: str, title: str) -> dict[str, Played]:
        """What the sides give, ours first, all steps in turn. Who fails is noted and not in it."""
        if self.low:
            self._check(method, sides, optimizer, title)
        return self._train(method, sides, optimizer, self.dtype, self.sizes.steps + 1, title)

    def same(self, method: str, peer: str, optimizer: str, ours: Played, theirs: Played) -> bool:
        """Whether ours and a peer gave the same answer, in the precision that was timed and, before that, in fp32."""
        allowed: Tolerance = BF16 if self.low else FP32
        right = not self.low or self.checked.get((method, peer, optimizer), False)
        return right and same_answer(ours.curve, theirs.curve, allowed)

    def _check(self, method: str, sides: Sequence[str], optimizer: str, title: str) -> None:
        """Compares a few steps in fp32, where two right answers are nearly one."""
        found = self._train(method, sides, optimizer, torch.float32, CHECKED, f"{title}, compared in fp32")
        for peer in sides:
            if peer != OURS and peer in found and OURS in found:
                same = same_answer(found[OURS].curve, found[peer].curve, FP32)
                self.checked[method, peer, optimizer] = same

    def _train(
        self, method: str, sides: Sequence[str], optimizer: str, dtype: torch.dtype, steps: int, title: str
    ) -> dict[str, Played]:
        precision = str(dtype).removeprefix("torch.")
        keys = {side: (method, side, optimizer, precision) for side in sides}
        if all(key in self.known for key in keys.values()):
            return {side: self.known[key] for side, key in keys.items()}
        found: dict[str, Played] = {}
        with tempfile.TemporaryDirectory(prefix="slmfast-bench-") as scratch:
            data = Path(scratch) / "rows.parquet"
            rows = self.rows[method]
            rows.first(self.sizes.samples * steps).write(data)
            for several in self._together(sides):
                names = " and ".join(SIDES[side].title for side in several)
                self.say(f"{title}: {names}, {optimizer}, {precision}, {steps} steps of {self.sizes.samples}")
                requests = {side: self._request(method, side, optimizer, precision, data) for side in several}
                played, failed = race(requests, steps, self.threads)
                for side, failure in failed.items():
                    self.fail(f"{SIDES[side].title}, {title}", failure, ours=side == OURS)
                found = {**played, **found}  # where ours ran again with another peer, the first run is kept
                self._told(played)
        self.known.update({keys[side]: one for side, one in found.items()})
        return found

    def _told(self, played: Mapping[str, Played]) -> None:
        for side, one in played.items():
            taken = ", ".join(f"{seconds:.2f}" for seconds in one.seconds)
            self.say(f"{SIDES[side].title}: steps of {taken} s, losses {one.losses}, gradient {one.norm:.6g}")

    def _request(self, method: str, side: str, optimizer: str, dtype: str, data: Path) -> dict[str, Any]:
        return {
            "method": method,
            "side": side,
            "optimizer": optimizer,
            "dtype": dtype,
            "device": self.device.type,
            "model_config": self.model_config,
            "tokenizer": self.tokenizer_folder,
            "layers": self.sizes.layers,
            "samples": self.sizes.samples,
            "threads": self.threads,
            "seed": self.seed,
            "data": str(data),
        }

    def _together(self, sides: Sequence[str]) -> list[list[str]]:
        """Which sides run beside one another: all where the memory holds them, else ours with one peer at a time."""
        if OURS not in sides or len(sides) <= 2 or self._needed(sides) <= self._free():
            return [list(sides)]
        return [[OURS, peer] for peer in sides if peer != OURS]

    def _needed(self, sides: Sequence[str]) -> int:
        """Bytes: weights and both moments of all sides, and one's gradients and activations, as one steps at a time."""
        weights = weight_bytes(self.config, torch.float32)
        resting = sum((2 + SIDES[side].copies) * weights + ANY_PROCESS for side in sides)
        return resting + weights + A_LAYER * (self.sizes.layers + 4)

    def _free(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else available_memory()
