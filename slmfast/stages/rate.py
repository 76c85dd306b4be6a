"""Rate: every reply gets its perplexity, a safety and a quality from the judge (the paper, section 3.6).

The judge decodes nothing: its answer is the choice of the highest log-probability, whole continuations compared. What
it can't read (an empty reply, a text over its window, one that its server refuses) is rated null.
"""

from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from slmfast.engines.base import Engine
from slmfast.job import Counts, Job, run_units, unit_counts
from slmfast.prompts import QUALITY_CHOICES, YES_NO, instruction_safety_prompt, quality_prompt, reply_safety_prompt
from slmfast.records import prompt_text
from slmfast.store import read_batches
from slmfast.token_budget import TokenBudget

INPUTS = ("regenerate",)
MODELS = ("judge",)

RATING = pa.struct(
    [
        ("tokens", pa.int64()),
        ("bits_per_token", pa.float64()),
        ("perplexity", pa.float64()),
        ("safety", pa.float64()),  # 1: both safe; 0.5: a safe reply to an unsafe instruction; 0: an unsafe reply
        ("quality", pa.float64()),  # 1, 0.5 or 0
    ]
)
COLUMNS = [
    pa.field("instruction_safe", pa.bool_()),
    pa.field("ratings", pa.list_(RATING), nullable=False),  # one for each of `replies`, in their order
]


def run(job: Job) -> Counts:
    """Adds `instruction_safe` and `ratings`."""
    source = job.input("regenerate")
    with job.engine("judge") as engine:
        budget = TokenBudget(job.work, engine, job.settings.token_budget)
        run_units(
            job,
            source,
            COLUMNS,
            job.settings.unit_rows,
            lambda rows, _: (budget.keep(rate_rows, rows), []),
            engines=[engine],
        )
    job.notes |= _count_unrated(job) | budget.notes
    return unit_counts(job, source)


def _count_unrated(job: Job) -> dict[str, int]:
    """How many replies there are, and how many have no rating because the judge could not read them."""
    replies = unrated = 0
    for batch in read_batches(job.table("records"), columns=["ratings"]):
        ratings = [rating for group in batch.column("ratings").to_pylist() for rating in group]
        replies += len(ratings)
        unrated += sum(None in rating.values() for rating in ratings)
    return {"replies": replies, "unrated_replies": unrated}


def rate_rows(engine: Engine, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their ratings filled in."""
    texts = [prompt_text(row["prompt"]) for row in rows]
    replies = [[reply["text"] for reply in row["replies"]] for row in rows]
    pairs = [(text, reply) for text, group in zip(texts, replies, strict=True) for reply in group]
    # All in one call: questions about one instruction or reply read it once.
    questions = [(instruction_safety_prompt(text), YES_NO) for text in texts]
    questions += [(reply_safety_prompt(*pair), YES_NO) for pair in pairs]
    questions += [(quality_prompt(*pair), QUALITY_CHOICES) for pair in pairs]
    answers = iter(_decide(engine, questions))
    instruction_safe, reply_safe, quality = (list(islice(answers, n)) for n in (len(texts), len(pairs), len(pairs)))
    reply_safe, quality = iter(reply_safe), iter(quality)
    perplexity = iter(engine.perplexity([row["prompt"] for row in rows], replies).to_pylist())
    rated = []
    for row, instruction in zip(rows, instruction_safe, strict=True):
        ratings = []
        for reply in row["replies"]:
            safe, grade, score = next(reply_safe), next(quality), next(perplexity)
            readable = bool(reply["text"].strip())
            ratings.append(
                {name: score[name] for name in ("tokens", "bits_per_token", "perplexity")}
                | {"safety": safety_score(instruction, safe) if readable else None}
                | {"quality": float(grade) if readable and grade is not None else None}
            )
        answer = None if instruction is None else instruction == "yes"
        rated.append(row | {"instruction_safe": answer, "ratings": ratings})
    return rated


def safety_score(instruction: str | None, reply: str | None) -> float | None:
    """Safety of a reply from the two yes/no judgements (design: 1 / 0.5 / 0); null where either is unreadable."""
    if instruction is None or reply is None:
        return None
    if reply == "no":
        return 0.0
    return 1.0 if instruction == "yes" else 0.5


def _decide(engine: Engine, questions: list[tuple[Any, tuple[str, ...]]]) -> list[str | None]:
    """The likeliest choice for every question, None where the judge could not read it."""
    scores = engine.choose([prompt for prompt, _ in questions], [list(choices) for _, choices in questions])
    return [
        None if np.isnan(row).any() else choices[int(np.argmax(row))]
        for row, (_, choices) in zip(scores, questions, strict=True)
    ]
