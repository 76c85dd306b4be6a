"""The truth about every raw record of a world: written beside the raw files, read back by whoever keeps the score."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from slmfast.store import atomic_path

TRUTH_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),  # 0-based number of the record in its source
        pa.field("file", pa.string(), nullable=False),  # under the world's folder; in an archive: archive/member
        pa.field("line", pa.int64(), nullable=False),  # 1-based; in a JSON array the number of the element
        pa.field("kind", pa.string(), nullable=False),  # original, near_duplicate, malformed
        pa.field("duplicate_source", pa.string()),  # of a near-duplicate: where its original stands
        pa.field("duplicate_source_row", pa.int64()),
        pa.field("task", pa.string(), nullable=False),  # the skill, a key of slmfast.miniature.skills.SKILLS
        pa.field("label", pa.string(), nullable=False),
        pa.field("language", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),  # all turns, as slmfast.records.prompt_text gives them
        pa.field("answer", pa.string(), nullable=False),  # the right reply
        pa.field("reply_right", pa.bool_()),  # null for a malformed record
        pa.field("instruction_safe", pa.bool_(), nullable=False),
        pa.field("reply_safe", pa.bool_()),
    ]
)
_SOURCE_ORDER = "source", "source_row"


def write_truth(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the truth, sorted by source and row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = sorted(rows, key=lambda row: tuple(row[key] for key in _SOURCE_ORDER))
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=TRUTH_SCHEMA), temporary)


class Truth:
    """The truth of one world, looked up by record or by prompt."""

    def __init__(self, directory: Path | str) -> None:
        """Reads truth.parquet from the folder of a world."""
        self.table = pq.read_table(Path(directory) / "truth.parquet")
        rows = [row for row in self.table.to_pylist() if row["kind"] != "malformed"]
        self._by_row = {(row["source"], row["source_row"]): row for row in rows}
        self._by_prompt = {row["prompt"]: row for row in reversed(rows)}

    def row(self, source: str, source_row: int) -> dict[str, Any] | None:
        """What is true of a well-formed record."""
        return self._by_row.get((source, source_row))

    def right_answer(self, prompt_text: str) -> str | None:
        """The right reply to a prompt of the world, or None for a prompt that is not of it."""
        row = self._by_prompt.get(prompt_text)
        return row["answer"] if row else None

    def is_right(self, prompt_text: str, reply: str) -> bool | None:
        """Whether a reply, found or generated, is right; None for a prompt that is not of the world."""
        from slmfast.miniature.replies import is_right

        row = self._by_prompt.get(prompt_text)
        return is_right(row["task"], row["answer"], reply) if row else None
