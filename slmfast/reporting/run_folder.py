"""What the finished stages of a run left behind. What a run hasn't got reads as empty, so that any run has a report."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from slmfast.errors import UserError
from slmfast.job import Job
from slmfast.readers import without_places
from slmfast.recipe import Recipe
from slmfast.store import MANIFEST, count_rows, read_batches, read_json, read_manifest, shards, table_schema


@dataclass(frozen=True)
class RunFolder:
    """A run's recipe and the folders of its stages."""

    root: Path
    recipe: Recipe
    stages: dict[str, Path]  # the folder of each stage that the report reads, in the order of the pipeline
    apart: bool = False  # whether each stage was run by itself: the recipe's settings are then the last one's alone

    def judge_name(self) -> str:
        """What the judge is called, and whether it is the large model for want of one of its own."""
        name = self.recipe.model_name("judge")
        return name if self.recipe.engine_role("judge") == "judge" else f"{name} (the large model)"

    def manifest(self, stage: str) -> dict[str, Any]:
        """The manifest of a stage; empty where the stage hasn't run."""
        path = self.stages[stage] / MANIFEST
        return read_json(path) if path.exists() else {}

    def notes(self, stage: str) -> dict[str, Any]:
        """The plain figures that a stage noted in its manifest."""
        return self.manifest(stage).get("notes", {})

    def rows(self, stage: str, table: str = "records") -> int:
        """How many rows a table of a stage holds; 0 where there is none."""
        return count_rows(self.stages[stage] / table)

    def table(self, stage: str, columns: Sequence[str], table: str = "records") -> Path | None:
        """The folder of a stage's table if it is there and has all of these columns, else None."""
        folder = self.stages[stage] / table
        if not shards(folder) or not set(columns) <= set(table_schema(folder).names):
            return None
        return folder

    def count_by(self, stage: str, column: str, table: str = "records", where: str | None = None) -> Counter[str]:
        """How many rows of a table have each value of a column, streamed; only rows whose `where` column is true."""
        counts: Counter[str] = Counter()
        columns = [column] if where is None else [column, where]
        folder = self.table(stage, columns, table)
        if folder is None:
            return counts
        for batch in read_batches(folder, columns=columns, rows=1 << 16):
            if where is not None:
                batch = batch.filter(batch.column(where))
            groups = pa.Table.from_batches([batch]).group_by(column).aggregate([([], "count_all")])
            counts.update(dict(zip(*(groups.column(name).to_pylist() for name in (column, "count_all")), strict=True)))
        return counts

    def reasons(self, stage: str, table: str) -> list[tuple[str, int]]:
        """Why rows of a stage went to a table, the most frequent first; where in a file a fault stands is left out."""
        merged: Counter[str] = Counter()
        for reason, count in self.count_by(stage, "reason", table).items():
            merged[without_places(reason)] += count
        return sorted(merged.items(), key=lambda item: (-item[1], item[0]))

    def count_together(
        self, stage: str, columns: tuple[str, ...], where: str | None = None
    ) -> Counter[tuple[Any, ...]]:
        """How many records of a stage have the same values of several columns; as count_by."""
        counts: Counter[tuple[Any, ...]] = Counter()
        needed = list(columns) if where is None else [*columns, where]
        folder = self.table(stage, needed)
        if folder is None:
            return counts
        for batch in read_batches(folder, columns=needed, rows=1 << 16):
            if where is not None:
                batch = batch.filter(batch.column(where))
            groups = pa.Table.from_batches([batch]).group_by(list(columns)).aggregate([([], "count_all")])
            values = zip(*(groups.column(name).to_pylist() for name in columns), strict=True)
            counts.update(dict(zip(values, groups.column("count_all").to_pylist(), strict=True)))
        return counts

    def json(self, stage: str, *names: str) -> Any:
        """A JSON file below a stage's folder, or None."""
        path = self.stages[stage].joinpath(*names)
        return read_json(path) if path.exists() else None


def stages_behind(job: Job, names: Sequence[str]) -> dict[str, Path]:
    """The folders of a stage that was run by itself and of those before it, of `names`, as far as manifests lead.

    A manifest tells its inputs by the digests of what they wrote. These are looked for in the input itself and in the
    folders beside it and beside the stage's own. A stage that isn't found gets a folder that isn't there.
    """
    beside = {folder.parent for folder in (job.folder, *job.inputs.values())}
    paths = [folder / MANIFEST for folder in job.inputs.values()]
    paths += sorted(path for folder in beside for path in folder.glob(f"*/{MANIFEST}"))
    written: dict[tuple[str, str], Path] = {}
    for path in filter(Path.is_file, paths):
        found = _ours(path)
        if found is not None:
            written.setdefault((found["stage"], found["digest"]), path.parent)
    folders = {stage: job.folder / stage for stage in names} | {job.stage: job.folder}
    ahead = [job.folder]
    while ahead:
        for stage, digest in read_manifest(ahead.pop()).get("inputs", {}).items():
            if (stage, digest) in written and stage in folders:
                folders[stage] = written[stage, digest]
                ahead.append(folders[stage])
    return folders


def _ours(path: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(path.parent)
    except (UserError, OSError):  # a neighbour's file of the same name is none of this stage's business
        return None
