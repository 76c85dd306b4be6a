"""What every case of the training benchmark is given, and how it has sides train."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from case_runner import Notes
from context import available_memory
from scoring_plan import weight_bytes
from scoring_texts import Drawer
from training_gate import BF16, FP32, same_answer
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


@dataclass(frozen=True, eq=False)
class Meeting:
    """Ours and a peer, whose steps were taken in turn."""

    peer: str
    ours: Played
    theirs: Played


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
    known: dict[tuple[str, tuple[str, ...], str, str], list[Meeting]] = field(default_factory=dict)
    """What was trained, by (method, peers, optimizer, dtype): memory is told of trainings that were timed."""
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

    def train(self, method: str, peers: Sequence[str], optimizer: str, title: str, steps: int = 0) -> list[Meeting]:
        """Ours beside the peers, all steps in turn: a meeting with each. Who fails is noted and is in none.

        A training that was done before is not done again.

        Args:
            steps: the first among them; 0 takes those of the sizes, and one more before them.
        """
        steps = steps or self.sizes.steps + 1
        if self.low:
            for met in self._train(method, peers, optimizer, torch.float32, CHECKED, f"{title}, compared in fp32"):
                self.checked[method, met.peer, optimizer] = same_answer(met.ours.curve, met.theirs.curve, FP32)
        return self._train(method, peers, optimizer, self.dtype, steps, title)

    def same(self, method: str, optimizer: str, met: Meeting) -> bool:
        """Whether ours and a peer gave the same answer, in the precision that was timed and, before that, in fp32."""
        right = not self.low or self.checked.get((method, met.peer, optimizer), False)
        return right and same_answer(met.ours.curve, met.theirs.curve, BF16 if self.low else FP32)

    def _train(
        self, method: str, peers: Sequence[str], optimizer: str, dtype: torch.dtype, steps: int, title: str
    ) -> list[Meeting]:
        precision = str(dtype).removeprefix("torch.")
        key = method, tuple(peers), optimizer, precision
        if key not in self.known:
            self.known[key] = []
            with tempfile.TemporaryDirectory(prefix="slmfast-bench-") as scratch:
                data = Path(scratch) / "rows.parquet"
                self.rows[method].first(self.sizes.samples * steps).write(data)
                for several in self._together(peers):
                    sides = [OURS, *several]
                    names = " and ".join(SIDES[side].title for side in sides)
                    self.say(f"{title}: {names}, {optimizer}, {precision}, {steps} steps of {self.sizes.samples}")
                    requests = {side: self._request(method, side, optimizer, precision, data) for side in sides}
                    played, failed = race(
                        requests, steps, self.threads, lambda side, did: self.say(f"{SIDES[side].title} {did}")
                    )
                    for side, failure in failed.items():
                        self.fail(f"{SIDES[side].title}, {title}", failure, ours=side == OURS)
                    if OURS in played:
                        met = [Meeting(peer, played[OURS], played[peer]) for peer in several if peer in played]
                        self.known[key] += met
        return self.known[key]

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

    def _together(self, peers: Sequence[str]) -> list[list[str]]:
        """Which peers run beside ours: all at once where the memory holds them, else one at a time."""
        return [list(peers)] if self._needed([OURS, *peers]) <= self._free() else [[peer] for peer in peers]

    def _needed(self, sides: Sequence[str]) -> int:
        """Bytes: weights and both moments of all sides, and one's gradients and activations, as one steps at a time."""
        weights = weight_bytes(self.config, torch.float32)
        resting = sum((2 + SIDES[side].copies) * weights + ANY_PROCESS for side in sides)
        return resting + weights + A_LAYER * (self.sizes.layers + 4)

    def _free(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else available_memory()
