"""What every case of the scoring benchmark is given, and how several methods are timed beside one another."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import timing
import torch
from case_runner import Notes
from context import available_memory
from result_table import Result
from roofline import matrix_rate
from scoring_gate import same_answer
from scoring_methods import PLAIN, Method, Subject
from scoring_model import in_fp32
from scoring_texts import Drawer, TextSet

FREE = 0.7  # of the available memory that a method's logits may take


@dataclass(frozen=True)
class Sizes:
    """How much each case scores."""

    prompts: int
    """Of the set of long prompts; the short ones are twice as many."""
    trial: int
    """Prompts on which batch sizes are tried."""
    judged: int
    """Pairs of an instruction and a reply that are judged."""
    batches: tuple[int, ...]
    """Sequences a batch that a peer is tried with."""
    positions: int
    """Of the head's case."""


@dataclass(frozen=True, kw_only=True)
class Context(Notes):
    """The options that all cases share, and what is made of them once."""

    model_config: str
    """A folder, or the name of a known shape."""
    tokenizer_folder: str
    tokenizer: Any
    config: Any
    subject: Subject
    dtype: torch.dtype
    threads: int
    seed: int
    sizes: Sizes
    batches: dict[tuple[str, tuple[int, int]], int] = field(default_factory=dict)
    """The best batch size of a method at prompts of certain lengths, once it is known."""

    @property
    def device(self) -> torch.device:
        return self.subject.device

    @cached_property
    def rate(self) -> float:
        """Floating-point operations a second of a plain matrix product in the model's dtype."""
        return matrix_rate(self.dtype, self.device)

    @cached_property
    def texts(self) -> Drawer:
        """Tokenised at the first use."""
        return Drawer(self.tokenizer, self.seed)

    def truth(self, texts: TextSet) -> np.ndarray | None:
        """The sums by a plain fp32 forward, float64 [replies]; None where the model itself is in fp32."""
        if self.dtype == torch.float32:
            return None
        self.say(f"the truth in fp32 of {texts.described()}")
        return PLAIN.run(Subject(in_fp32(self.subject.model), self.tokenizer), texts, 1)


@dataclass(frozen=True, eq=False)
class Timed:
    """The shortest time of one side and its answer."""

    seconds: float
    answer: Any


def relay(sides: Mapping[str, Callable[[], Any]]) -> tuple[int, dict[str, Timed]]:
    """Times sides in turn and equally often, until each has run for long enough: (how often, the best of each)."""
    best: dict[str, Timed] = {}
    totals = dict.fromkeys(sides, 0.0)
    runs = 0
    while runs < timing.REPEATS and (not runs or min(totals.values()) < timing.ENOUGH_SECONDS):
        for name, call in sides.items():
            seconds, answer = timing.stopwatch(call)
            totals[name] += seconds
            if name not in best or seconds < best[name].seconds:
                best[name] = Timed(seconds, answer)
        runs += 1
    return runs, best


def best_batch(context: Context, method: Method, texts: TextSet) -> int:
    """The sequences a batch with which a method is fastest on some prompts, of those that fit into memory."""
    known = method.title, texts.lengths
    if known not in context.batches:
        context.batches[known] = _fastest(context, method, texts)
    return context.batches[known]


def _fastest(context: Context, method: Method, texts: TextSet) -> int:
    if not method.batched:
        method.run(context.subject, texts.shortest(), 1)  # a first call pays for what is set up once
        return 1
    some = texts.sample(min(context.sizes.trial, len(texts.pairs)))
    longest = max(map(len, texts.flat()))
    vocabulary = context.config.get_text_config().vocab_size
    room = free_memory(context.device) * FREE / (longest * vocabulary * 4 * method.most_copies)
    count = len(some.flat())
    able = [batch for batch in worth_trying(context.sizes.batches, count) if batch <= room] or [1]
    method.run(context.subject, texts.shortest(), 1)
    tried = {}
    for batch in able:
        tried[batch], _ = timing.stopwatch(lambda batch=batch: method.run(context.subject, some, batch))
        context.say(f"{method.title}: {batch} a batch, {tried[batch]:.2f} s for {some.described()}")
    return min(tried, key=tried.__getitem__)


def worth_trying(batches: Sequence[int], count: int) -> list[int]:
    """The batch sizes, ascending, up to the first that takes all of so many sequences at once."""
    return [batch for i, batch in enumerate(batches) if i == 0 or batches[i - 1] < count]


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def beside(context: Context, group: str, texts: TextSet, ours: Method, peers: Sequence[Method]) -> list[Result]:
    """Ours and the peers over one set: a row a peer, with its best batch size and how often all ran.

    A peer that fails is noted and left out; where ours fails, the failure goes on to the case.
    """
    what = f"{group}, {texts.source}, {texts.described()}"
    context.say(what)
    batches: dict[str, int] = {ours.title: best_batch(context, ours, texts)}
    for peer in peers:
        try:
            batches[peer.title] = best_batch(context, peer, texts)
        except (RuntimeError, ImportError, TypeError) as error:
            context.fail(f"{peer.title}, {group}", str(error).splitlines()[0], ours=False)
    able = [method for method in (ours, *peers) if method.title in batches]
    sides = {m.title: (lambda m=m: m.run(context.subject, texts, batches[m.title])) for m in able}
    runs, timed = relay(sides)
    for method in able:
        context.say(f"{method.title}: {timed[method.title].seconds:.2f} s")
    truth = context.truth(texts)
    tokens = np.array([len(pair.continuation) for pair in texts.flat()])
    rows = []
    for peer in able[1:]:
        mine, theirs = timed[ours.title], timed[peer.title]
        same = same_answer(mine.answer, theirs.answer, tokens, truth)
        remark = f"{batches[peer.title]} a batch; " if peer.batched else ""
        rows.append(
            Result(
                group=group,
                case=f"{what} ({remark}{timing.described_runs(runs)})",
                peer=peer.title,
                version=peer.version,
                ours=mine.seconds,
                theirs=theirs.seconds,
                unit="s",
                ratio=theirs.seconds / mine.seconds if same else None,
                same_answer=same,
            )
        )
    return rows
