"""The cases that train: KTO and SFT beside TRL's trainers, and the memory that a step of KTO takes at its peak."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from result_table import Result
from training_context import Context, Meeting
from training_gate import furthest
from training_sides import KTO_PEERS, SFT_PEERS, SIDES

MEGABYTE = 1e6
OPTIMIZER = "adamw"  # fp32 states: ours, and torch's fused one, which is TRL's default
EIGHT_BIT = ("adamw8bit-split", "adamw8bit")  # ours; beside both the peer has bitsandbytes' AdamW8bit
AT_PEAK = 2  # steps after which the peak was reached: gradients and activations beside the states of the first step


def kto_case(context: Context) -> Iterator[Result]:
    """A step of KTO, and apart from it what both sides pay once for the reference's log-probabilities."""
    meetings = context.train("kto", list(KTO_PEERS), OPTIMIZER, "kto")
    yield from steps_beside(context, "kto", meetings)
    rows = context.sizes.samples * (context.sizes.steps + 1)
    case = f"kto, {shape(context)}, reference log-probabilities of {rows} rows, computed once (1 run each)"
    for met in meetings:
        if met.theirs.precompute_seconds is not None:
            common = _common(context, "kto", OPTIMIZER, met)
            yield _faster(common, case, met.ours.precompute_seconds, met.theirs.precompute_seconds)


def sft_case(context: Context) -> Iterator[Result]:
    """A step of SFT, beside TRL's padded batches and its batches without padding."""
    yield from steps_beside(context, "sft", context.train("sft", list(SFT_PEERS), OPTIMIZER, "sft"))


def memory_case(context: Context) -> Iterator[Result]:
    """The peak of the KTO trainings: beyond the loaded model, and the whole process or all that CUDA allocated."""
    yield from peaks_beside(context, OPTIMIZER, context.train("kto", list(KTO_PEERS), OPTIMIZER, "memory"))
    for optimizer in EIGHT_BIT:
        met = context.train("kto", ["precomputed"], optimizer, "memory", steps=AT_PEAK)
        yield from peaks_beside(context, optimizer, met)


def steps_beside(context: Context, method: str, meetings: Sequence[Meeting]) -> Iterator[Result]:
    """The median time of a step on both sides, once all losses are the same."""
    what = f"{method} step, {shape(context)}, {context.sizes.samples} samples, {context.rows[method].described()}"
    for met in meetings:
        ours, theirs = met.ours, met.theirs
        spread = f"p20 to p80 {_spread(ours.seconds)} and {_spread(theirs.seconds)} s"
        apart = f"losses within {furthest(ours.curve, theirs.curve):.1e}"
        case = f"{what} (p50 of {len(ours.seconds)} steps; {spread}; {apart})"
        yield _faster(_common(context, method, OPTIMIZER, met), case, _median(ours.seconds), _median(theirs.seconds))


def peaks_beside(context: Context, optimizer: str, meetings: Sequence[Meeting]) -> Iterator[Result]:
    """Bytes at the peak; the ratio is ours over theirs."""
    beside = "" if optimizer == OPTIMIZER else " beside bitsandbytes AdamW8bit"
    what = f"kto peak memory, {optimizer}{beside}, {shape(context)}, {context.sizes.samples} samples"
    counted = "allocated on the device" if context.device.type == "cuda" else "resident"
    for met in meetings:
        common = _common(context, "kto", optimizer, met)
        yield _smaller(common, f"{what}, in all, {counted}", met.ours.peak, met.theirs.peak)
        beyond = met.ours.peak - met.ours.baseline, met.theirs.peak - met.theirs.baseline
        yield _smaller(common, f"{what}, beyond the loaded model, {counted}", *beyond)


def shape(context: Context) -> str:
    """The model in words."""
    inner = context.config.get_text_config()
    dtype = str(context.dtype).removeprefix("torch.")
    return f"{context.sizes.layers} layers, H={inner.hidden_size:,}, V={inner.vocab_size:,}, {dtype}"


def _common(context: Context, method: str, optimizer: str, met: Meeting) -> dict[str, Any]:
    side = SIDES[met.peer]
    same = context.same(method, optimizer, met)
    return {"group": method, "peer": side.title, "version": side.version, "same_answer": same}


def _faster(common: Mapping[str, Any], case: str, ours: float, theirs: float) -> Result:
    ratio = theirs / ours if common["same_answer"] else None
    return Result(**common, case=case, ours=ours, theirs=theirs, unit="s", ratio=ratio)


def _smaller(common: Mapping[str, Any], case: str, ours: int, theirs: int) -> Result:
    ratio = ours / theirs if common["same_answer"] and theirs > 0 else None
    case = f"{case} (ratio = ours / theirs)"
    mine, others = ours / MEGABYTE, theirs / MEGABYTE
    return Result(**common, case=case, ours=mine, theirs=others, unit="MB", ratio=ratio, ratio_says="their memory")


def _median(seconds: Sequence[float]) -> float:
    return float(np.median(seconds))


def _spread(seconds: Sequence[float]) -> str:
    return "-".join(f"{value:.3g}" for value in np.quantile(seconds, [0.2, 0.8]))
