"""Classify: a language model gives every instruction a label "Primary Category-Secondary Category" (the paper, 3.4)."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from slmfast.engines.base import GENERATION_FIELDS, Engine, Generation, by_frequency
from slmfast.job import Counts, Job, check_kept, dropped_row, run_units
from slmfast.labels import parse_label
from slmfast.prompts import label_prompt
from slmfast.records import DROPPED_SCHEMA, prompt_text
from slmfast.sampling import seeded_hashes, smallest
from slmfast.store import (
    ShardWriter,
    atomic_path,
    count_rows,
    read_batches,
    read_json,
    shards,
    table_schema,
    write_json,
)

INPUTS = ("dedup",)
MODELS = ("large",)

COLUMNS = [
    pa.field("label", pa.string(), nullable=False),
    pa.field("label_reply", pa.string(), nullable=False),
    pa.field("label_generation", pa.struct(GENERATION_FIELDS), nullable=False),  # how `label_reply` came about
]
DROPPED_SHARDS = "dropped_shards.json"  # beside a sub-sample: how many shards the rows outside it take
RETRY_TEMPERATURE = 0.7  # asked again greedily, a model would say the same again


def run(job: Job) -> Counts:
    """Adds `label`, and `label_reply`, the words it was read from; what can't be labelled goes to `dropped`."""
    everything = job.input("dedup")
    source, first_dropped = _sample(job, everything)
    with job.engine("large") as engine:
        run_units(
            job,
            source,
            COLUMNS,
            job.settings.unit_rows,
            lambda rows, asked: _label_rows(job, engine, rows, asked),
            first_dropped,
            begin=lambda rows: _ask(job, engine, rows),
            engines=[engine],
        )
    check_kept(job, first_dropped)
    labelled = read_batches(job.table("records"), columns=["label_generation"])
    ends = Counter(how["finish_reason"] for batch in labelled for how in batch.column(0).to_pylist())
    job.notes["label_ends"] = by_frequency(ends)
    return Counts(count_rows(everything), count_rows(job.table("records")), count_rows(job.table("dropped")))


def _sample(job: Job, everything: Path) -> tuple[Path, int]:
    """Narrows the records down to the recipe's seeded sub-sample; gives its table and its number of dropped shards."""
    size = job.settings.sample
    if size is None:
        return everything, 0
    folder = job.work / "sampled"
    if folder.exists():
        return folder, read_json(folder / DROPPED_SHARDS)
    ids = (i for batch in read_batches(everything, columns=["id"]) for i in batch.column("id").to_pylist())
    keep = smallest(seeded_hashes(ids, job.recipe.seed, "classify"), size)
    with atomic_path(folder) as temporary:
        _split(job, everything, keep, temporary)
        write_json(temporary / DROPPED_SHARDS, number := len(shards(job.table("dropped"))))
    return folder, number


def _split(job: Job, everything: Path, keep: np.ndarray, folder: Path) -> None:
    reason = f"outside the seeded sample of {job.settings.sample} records (classify.sample)"
    start = 0
    with (
        ShardWriter(folder, table_schema(everything)) as sampled,
        ShardWriter(job.table("dropped"), DROPPED_SCHEMA) as dropped,
    ):
        for batch in read_batches(everything):
            mask = keep[start : start + batch.num_rows]
            start += batch.num_rows
            sampled.write(batch.filter(pa.array(mask)))
            gone = batch.filter(pa.array(~mask)).select(["id", "source", "source_row"])
            dropped.write([dropped_row(job.stage, row, reason) for row in gone.to_pylist()])


def _ask(job: Job, engine: Engine, rows: list[dict[str, Any]]) -> tuple[list[Any], list[bool]]:
    """Begins to label rows; gives their prompts, and which of them fit in the model's window."""
    prompts = [label_prompt(prompt_text(row["prompt"])) for row in rows]
    room = engine.window - job.settings.max_new_tokens
    fits = [tokens <= room for tokens in engine.count_tokens(prompts)]
    engine.begin([prompt for prompt, fit in zip(prompts, fits, strict=True) if fit], **_options(job, 0.0))
    return prompts, fits


def _options(job: Job, temperature: float) -> dict[str, Any]:
    return {"max_new_tokens": job.settings.max_new_tokens, "temperature": temperature, "seed": job.recipe.seed}


def _failure(reply: Generation) -> str:
    """Why there is no label in a reply."""
    if reply.finish_reason == "refused":
        return f"refused by the labelling model's server: {reply.refusal}"
    if reply.finish_reason in ("content_filter", "refusal"):
        return f"the labelling model's server kept its reply back ({reply.finish_reason})"
    return "unparsed label"


def _label_rows(
    job: Job, engine: Engine, rows: list[dict[str, Any]], begun: tuple[list[Any], list[bool]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    prompts, fits = begun
    asked = [i for i, fit in enumerate(fits) if fit]
    labels: dict[int, dict[str, Any]] = {}
    failed: dict[int, Generation] = {}
    for temperature in (0.0, RETRY_TEMPERATURE):
        replies = engine.generate([prompts[i] for i in asked], **_options(job, temperature))
        for i, reply in zip(asked, replies, strict=True):
            if (label := parse_label(reply.text)) is not None:
                how = reply.fields(job.model_name("large"))
                labels[i] = {"label": label, "label_reply": reply.text, "label_generation": how}
            else:
                failed[i] = reply
        asked = [i for i in asked if i not in labels and failed[i].finish_reason != "refused"]
        if not asked:
            break
    kept, dropped = [], []
    for i, row in enumerate(rows):
        if i in labels:
            kept.append(row | labels[i])
        else:
            window = f"over the labelling model's window of {engine.window} tokens"
            dropped.append(dropped_row(job.stage, row, _failure(failed[i]) if fits[i] else window))
    return kept, dropped
