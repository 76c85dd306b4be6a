"""Diversify keeps the same records in whatever order they come."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slmfast import pipeline
from slmfast.job import Job
from slmfast.recipe import load_recipe
from slmfast.records import RECORD_SCHEMA

SCHEMA = RECORD_SCHEMA.append(pa.field("label", pa.string()))


@pytest.mark.parametrize(("target", "selection"), [(7, "exact"), (11, "exact"), (14, "exact"), (7, "random")])
def test_the_order_of_the_records_decides_nothing(tmp_path, target, selection):
    """Four labels of five records each: whatever does not divide by four goes to some of equal ones."""
    common = {"source": "s", "source_row": 0, "language": "en", "source_category": None, "reply": "x"}
    prompt = [{"role": "user", "content": "x"}]
    rows = [common | {"id": f"{n:032x}", "prompt": prompt, "label": f"{'ADBC'[n % 4]}-x"} for n in range(20)]
    recipe = load_recipe(
        None, [f"diversify.target={target}", "diversify.min_label_count=1", f"diversify.selection={selection}"]
    )
    found = set()
    for seed in range(4):
        random.Random(seed).shuffle(rows)
        folder = tmp_path / str(seed)
        (folder / "in").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "in" / "part-00000.parquet")
        job = Job("diversify", recipe, folder, folder / "out", {"classify": folder / "in"})
        pipeline.run_stage(job)
        kept = pq.read_table(folder / "out" / "records", columns=["id"]).column(0).to_pylist()
        assert selection == "random" or len(kept) == target
        found.add(frozenset(kept))
    assert len(found) == 1
