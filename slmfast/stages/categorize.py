"""Categorize: an ordered list of rules gives every record one of 50 categories (the paper, section 3.2)."""

import pyarrow as pa

from slmfast.categories import Categorizer
from slmfast.job import Counts, Job
from slmfast.progress import Progress
from slmfast.records import prompt_text
from slmfast.store import ShardWriter, count_rows, read_batches, table_schema

INPUTS = ("collect",)
MODELS: tuple[str, ...] = ()

COLUMNS = [pa.field("category", pa.string(), nullable=False), pa.field("rule_id", pa.string(), nullable=False)]


def run(job: Job) -> Counts:
    """Adds `category` and the `rule_id` that gave it."""
    source = job.input("collect")
    categorizer = Categorizer(job.settings.rules)
    schema = pa.schema([*table_schema(source), *COLUMNS])
    progress = Progress("categorize", count_rows(source))
    with ShardWriter(job.table("records"), schema) as writer:
        for batch in read_batches(source):
            prompts = batch.column("prompt").to_pylist()
            names = batch.column("source").to_pylist()
            found = [categorizer.categorize(name, prompt_text(p)) for name, p in zip(names, prompts, strict=True)]
            categories, rule_ids = zip(*found, strict=True)
            batch = batch.append_column(COLUMNS[0], pa.array(categories, pa.string()))
            writer.write(batch.append_column(COLUMNS[1], pa.array(rule_ids, pa.string())))
            progress.add(batch.num_rows)
    progress.close()
    return Counts(writer.rows, writer.rows)
