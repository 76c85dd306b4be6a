"""Regenerate: a large and a small model answer every instruction anew (the paper, section 3.5).

With the original each instruction then has three replies of different quality, from which the later stages choose.
"""

from typing import Any

import pyarrow as pa

from slmfast.engines import open_engine
from slmfast.engines.base import Engine, Generation
from slmfast.job import Counts, Job, dropped_row, run_units, unit_counts

INPUTS = ("diversify",)
MODELS = ("large", "small")

REPLY = pa.struct(
    [
        ("origin", pa.string()),  # original, large or small
        ("text", pa.string()),
        ("finish_reason", pa.string()),  # stop, or length where the reply was cut by max_new_tokens
    ]
)
COLUMNS = [pa.field("replies", pa.list_(REPLY), nullable=False)]


def run(job: Job) -> Counts:
    """Adds `replies`: the original, the large model's and the small model's, in this order."""
    source = job.input("diversify")
    engines = {role: open_engine(job.recipe.models.engine, job.model(role)) for role in MODELS}
    run_units(job, source, COLUMNS, job.settings.unit_rows, lambda rows: _answer_rows(job, engines, rows))
    return unit_counts(job, source)


def _answer_rows(
    job: Job, engines: dict[str, Engine], rows: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    prompts = [row["prompt"] for row in rows]
    window = min(engine.window for engine in engines.values())
    lengths = [engine.count_tokens(prompts) for engine in engines.values()]
    fits = [max(tokens) + job.settings.max_new_tokens <= window for tokens in zip(*lengths, strict=True)]
    asked = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
    replies = {role: iter(_generate(job, engine, asked)) for role, engine in engines.items()}
    kept, dropped = [], []
    for row, fit in zip(rows, fits, strict=True):
        if fit:
            original = {"origin": "original", "text": row["reply"], "finish_reason": "stop"}
            kept.append(row | {"replies": [original, *(_reply(role, next(replies[role])) for role in MODELS)]})
        else:
            dropped.append(dropped_row(job.stage, row, f"over the reply models' window of {window} tokens"))
    return kept, dropped


def _generate(job: Job, engine: Engine, prompts: list[Any]) -> list[Generation]:
    settings = job.settings
    return engine.generate(
        prompts,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=job.recipe.seed,
    )


def _reply(origin: str, generation: Generation) -> dict[str, str]:
    return {"origin": origin, "text": generation.text, "finish_reason": generation.finish_reason}
