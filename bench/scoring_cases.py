"""The cases that run in one process: replies to long and short prompts, padding, and the sharing of prompts."""

from collections.abc import Iterator, Sequence
from itertools import takewhile

from result_table import Result
from roofline import needed_flops
from scoring_context import Context, beside
from scoring_methods import CAL_PPL, EVALUATE, HARNESS, OURS, PLAIN, UNSHARED
from scoring_texts import LONG, SHORT, TextSet


def long_case(context: Context) -> Iterator[Result]:
    """Three replies to prompts of 120 tokens and more."""
    texts = context.texts.draw(context.sizes.prompts, 3, LONG)
    rows = beside(context, "long", texts, OURS, [HARNESS, PLAIN])
    yield from rows
    yield from _utilisation(context, "long", texts, rows)


def short_case(context: Context) -> Iterator[Result]:
    """Three replies to prompts of about 35 tokens."""
    texts = context.texts.draw(2 * context.sizes.prompts, 3, SHORT)
    rows = beside(context, "short", texts, OURS, [HARNESS])
    yield from rows
    yield from _utilisation(context, "short", texts, rows)


def padded_case(context: Context) -> Iterator[Result]:
    """Ours against padded, unsorted batches with whole logits."""
    texts = context.texts.draw(context.sizes.prompts, 3, LONG)
    yield from beside(context, "padded", texts, OURS, [EVALUATE, CAL_PPL])


def sharing_case(context: Context) -> Iterator[Result]:
    """Four replies a prompt against ourselves with each reply in a call of its own: what sharing alone gives."""
    texts = context.texts.draw(context.sizes.prompts, 4, LONG)
    yield from beside(context, "sharing", texts, OURS, [UNSHARED])


def _utilisation(context: Context, group: str, texts: TextSet, rows: Sequence[Result]) -> Iterator[Result]:
    """The share of the measured rate of a matrix product at which ours did what had to be done."""
    if not rows:
        return
    groups = [(len(several[0].context), [len(pair.continuation) for pair in several]) for several in texts.pairs]
    places = zip(*(several[0].context for several in texts.pairs), strict=False)
    shared = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, places))
    needed = needed_flops(context.subject.model, groups, shared)
    achieved = needed / rows[0].ours
    yield Result(
        group=group,
        case=f"{group}, model FLOP utilisation {100 * achieved / context.rate:.1f} % ({needed / 1e12:.3g} TFLOP: what "
        "prompts share and each prompt once, the head on replies only)",
        peer="a plain matrix product",
        ours=achieved / 1e12,
        theirs=context.rate / 1e12,
        unit="TFLOP/s",
        ratio=achieved / context.rate,
        ratio_says="of its rate",
    )
