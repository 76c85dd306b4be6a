"""Collect runs again when its raw files are others."""

import json

import pytest

from slmfast import pipeline
from slmfast.job import Job
from slmfast.recipe import load_recipe


@pytest.mark.parametrize("other", ["a.csv", "b.jsonl"])
def test_a_renamed_file_is_read_again(tmp_path, other):
    """Its ending says how it is read, and `rejected` tells its name."""
    sources = [{"name": "s", "format": "alpaca", "path": f"{tmp_path}/raw/*"}]
    job = Job("collect", load_recipe(None, [f"collect.sources={json.dumps(sources)}"]), tmp_path, tmp_path / "out", {})
    path = tmp_path / "raw" / "a.jsonl"
    path.parent.mkdir()
    path.write_text('{"instruction": "a", "output": "b"}\n')
    pipeline.run_stage(job)
    assert pipeline.is_up_to_date(job)
    path.rename(path.with_name(other))
    assert not pipeline.is_up_to_date(job)
