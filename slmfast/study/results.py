"""What a study's models have answered: every score and every item, by model and seed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from slmfast.store import read_json
from slmfast.study.plan import MODELS, Plan
from slmfast.study.runs import seed_folder

MEAN = "mean"  # over all tasks, each with the same weight
COLUMNS = ["task", "subset", "item", "value"]


@dataclass(frozen=True)
class Results:
    """The scores of all models and seeds."""

    seeds: tuple[int, ...]
    tasks: list[str]
    scores: dict[int, dict[str, dict[str, dict[str, Any]]]]  # [seed][model][task]: value, stderr, n
    items: dict[str, dict[int, pa.Table]]  # [model][seed]: COLUMNS, a row an item

    @property
    def models(self) -> list[str]:
        """The names of the models, in the order of the tables."""
        return list(self.items)

    def values(self, model: str, task: str) -> list[float]:
        """A model's score on a task, or the mean over all, for every seed."""
        if task != MEAN:
            return [self.scores[seed][model][task]["value"] for seed in self.seeds]
        columns = [self.values(model, each) for each in self.tasks]
        return [sum(values) / len(values) for values in zip(*columns, strict=True)]

    def item_means(self, model: str, task: str) -> pa.Table:
        """The items of a task with their values averaged over the seeds: subset, item, value."""
        own = [table.filter(pc.equal(table["task"], task)) for table in self.items[model].values()]
        grouped = pa.concat_tables(own).group_by(["subset", "item"], use_threads=False).aggregate([("value", "mean")])
        return grouped.rename_columns({"value_mean": "value"})


def read_results(plan: Plan, folder: Path) -> Results:
    """Reads what `runs.make_models` has left."""
    scores: dict[int, dict[str, Any]] = {}
    items: dict[str, dict[int, pa.Table]] = {model: {} for model in plan.models}
    for seed in plan.seeds:
        run_dir = seed_folder(folder, seed)
        scores[seed] = read_json(run_dir / "evaluate" / "scores.json")
        for model in plan.models:
            own = run_dir / ("evaluate/items" if model in MODELS else "scores") / f"{model}.parquet"
            items[model][seed] = pq.read_table(own, columns=COLUMNS, partitioning=None)
            if model not in MODELS:
                scores[seed][model] = read_json(own.with_suffix(".json"))["scores"]
    return Results(plan.seeds, plan.recipe.evaluate.names, scores, items)
