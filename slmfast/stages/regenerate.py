"""Regenerate: a large and a small model answer every instruction anew (the paper, section 3.5).

With the original each instruction then has three replies of different quality, from which the later stages choose. A
reply that a server refuses is empty, and marked with the server's words: it is not rated, and neither wins nor loses.
"""

from collections import Counter
from contextlib import ExitStack
from typing import Any

import pyarrow as pa

from slmfast.engines.base import GENERATION_FIELDS, Engine, by_frequency
from slmfast.errors import UserError
from slmfast.job import Counts, Job, check_kept, dropped_row, run_units, unit_counts
from slmfast.store import read_batches

INPUTS = ("diversify",)
MODELS = ("large", "small")

REPLY = pa.struct(
    [
        ("origin", pa.string()),  # original, large or small
        ("text", pa.string()),
        *GENERATION_FIELDS,  # of the original there is a finish reason alone, "stop"
    ]
)
COLUMNS = [pa.field("replies", pa.list_(REPLY), nullable=False)]


def run(job: Job) -> Counts:
    """Adds `replies`: the original, the large model's and the small model's, in this order."""
    source = job.input("diversify")
    with ExitStack() as stack:
        engines = {role: stack.enter_context(job.engine(role)) for role in MODELS}
        run_units(
            job,
            source,
            COLUMNS,
            job.settings.unit_rows,
            lambda rows, fits: _answer_rows(job, engines, rows, fits),
            begin=lambda rows: _ask(job, engines, rows),
            engines=list(engines.values()),
        )
    check_kept(job)
    job.notes["reply_ends"] = _count_ends(job)
    return unit_counts(job, source)


def _count_ends(job: Job) -> dict[str, dict[str, int]]:
    """How many replies of each model ended in which way."""
    counts: dict[str, Counter[str]] = {role: Counter() for role in MODELS}
    for batch in read_batches(job.table("records"), columns=["replies"]):
        for replies in batch.column("replies").to_pylist():
            for reply in replies[1:]:
                counts[reply["origin"]][reply["finish_reason"]] += 1
    return {role: by_frequency(found) for role, found in counts.items()}


def _window(engines: dict[str, Engine]) -> int:
    return min(engine.window for engine in engines.values())


def _room(job: Job, engines: dict[str, Engine]) -> int:
    """The most tokens that a prompt may have: what the longest reply leaves of the smaller window."""
    window, longest = _window(engines), job.settings.max_new_tokens
    if longest >= window:
        raise UserError(
            f"recipe key regenerate.max_new_tokens: {longest:,} leave no room for a prompt in the reply models' window "
            f"of {window:,} tokens: give a smaller number"
        )
    return window - longest


def _ask(job: Job, engines: dict[str, Engine], rows: list[dict[str, Any]]) -> list[bool]:
    """Begins to answer rows with both models; says which of them fit in the windows."""
    prompts = [row["prompt"] for row in rows]
    lengths = [engine.count_tokens(prompts) for engine in engines.values()]
    room = _room(job, engines)
    fits = [max(tokens) <= room for tokens in zip(*lengths, strict=True)]
    for engine in engines.values():
        engine.begin([prompt for prompt, fit in zip(prompts, fits, strict=True) if fit], **_options(job))
    return fits


def _options(job: Job) -> dict[str, Any]:
    settings = job.settings
    drawn = {"temperature": settings.temperature, "top_p": settings.top_p, "seed": job.recipe.seed}
    return {"max_new_tokens": settings.max_new_tokens} | drawn


def _answer_rows(
    job: Job, engines: dict[str, Engine], rows: list[dict[str, Any]], fits: list[bool]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    asked = [row["prompt"] for row, fit in zip(rows, fits, strict=True) if fit]
    replies = {role: iter(engine.generate(asked, **_options(job))) for role, engine in engines.items()}
    kept, dropped, room = [], [], _room(job, engines)
    for row, fit in zip(rows, fits, strict=True):
        if fit:
            answers = [{"origin": "original", "text": row["reply"], "finish_reason": "stop"}]
            for role in MODELS:
                reply = next(replies[role])
                answers.append({"origin": role, "text": reply.text} | reply.fields(job.model_name(role)))
            kept.append(row | {"replies": answers})
        else:
            reason = f"over the {room:,} tokens that regenerate.max_new_tokens leaves of the reply models' window"
            dropped.append(dropped_row(job.stage, row, reason))
    return kept, dropped
