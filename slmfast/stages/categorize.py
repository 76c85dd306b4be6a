"""Categorize: an ordered list of rules gives every record one of 50 categories (the paper, section 3.2)."""

from pathlib import Path

import pyarrow as pa

from slmfast.categories import Categorizer
from slmfast.errors import UserError
from slmfast.job import Counts, Job
from slmfast.progress import Progress
from slmfast.recipe import expand
from slmfast.records import prompt_texts
from slmfast.store import ShardWriter, count_rows, file_digest, read_batches, table_schema

INPUTS = ("collect",)
MODELS: tuple[str, ...] = ()
SEEDED = False

COLUMNS = [pa.field("category", pa.string(), nullable=False), pa.field("rule_id", pa.string(), nullable=False)]


def _rules(job: Job) -> Path | None:
    rules = job.settings.rules
    return None if rules is None else Path(expand(rules, {"RUN": job.run_dir}, "categorize.rules"))


def files(job: Job) -> str | None:
    """The digest of the user's own rules: categorize runs again when they change."""
    rules = _rules(job)
    if rules is not None and not rules.is_file():
        raise UserError(f"recipe key categorize.rules: there is no file {rules}")
    return None if rules is None else file_digest(rules)


def run(job: Job) -> Counts:
    """Adds `category` and the `rule_id` that gave it."""
    source = job.input("collect")
    categorizer = Categorizer(_rules(job))
    schema = pa.schema([*table_schema(source), *COLUMNS])
    progress = Progress("categorize", count_rows(source))
    with ShardWriter(job.table("records"), schema) as writer:
        for batch in read_batches(source):
            names, texts = batch.column("source").to_pylist(), prompt_texts(batch.column("prompt")).to_pylist()
            categories, rule_ids = zip(*categorizer.categorize_all(names, texts), strict=True)
            batch = batch.append_column(COLUMNS[0], pa.array(categories, pa.string()))
            writer.write(batch.append_column(COLUMNS[1], pa.array(rule_ids, pa.string())))
            progress.add(batch.num_rows)
    progress.close()
    return Counts(writer.rows, writer.rows)
