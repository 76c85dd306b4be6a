"""Diversify keeps the same records in whatever order they come."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slmfast import pipeline
from slmfast.errors import UserError
from slmfast.job import Job
from slmfast.recipe import load_recipe
from slmfast.records import RECORD_SCHEMA

SCHEMA = RECORD_SCHEMA.append(pa.field("label", pa.string()))


def rows_of(sizes):
    common = {"source": "s", "source_row": 0, "language": "en", "source_category": None, "reply": "x"}
    common |= {"prompt": [{"role": "user", "content": "x"}]}
    labels = [label for label, size in sizes.items() for _ in range(size)]
    return [common | {"id": f"{n:032x}", "label": label} for n, label in enumerate(labels)]


def diversify(folder, sizes, *settings):
    (folder / "in").mkdir()
    pq.write_table(pa.Table.from_pylist(rows_of(sizes), schema=SCHEMA), folder / "in" / "part-00000.parquet")
    pipeline.run_stage(
        Job("diversify", load_recipe(None, settings), folder, folder / "out", {"classify": folder / "in"})
    )


def test_too_large_a_target_is_told(tmp_path, capsys):
    diversify(tmp_path, {"A-x": 12, "B-x": 3}, "diversify.target=13")
    assert "diversify.target is 13, but only 12 records have a label that stays" in capsys.readouterr().out


@pytest.mark.parametrize(("sizes", "told"), [({"A-x": 7, "B-x": 3}, "2 of 2 labels"), ({}, "it was given none")])
def test_nothing_left_is_told_with_counts(tmp_path, sizes, told):
    with pytest.raises(UserError, match=told) as error:
        diversify(tmp_path, sizes)
    assert "audit" not in str(error.value)
    assert not sizes or "fewer than 10 records (the most frequent label has 7)" in str(error.value)


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
