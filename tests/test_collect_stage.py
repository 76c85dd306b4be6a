"""Collect reads files from here or from the hub, and runs again when they are others."""

import json

import pyarrow.parquet as pq
import pytest

from slmfast import pipeline
from slmfast.errors import UserError
from slmfast.job import Job
from slmfast.recipe import load_recipe
from slmfast.store import read_manifest


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


COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands for the hub's client: what it was asked for, and a folder as its cache is."""
    asked = []

    def snapshot_download(repository, **options):
        asked.append((repository, options))
        if "none" in repository:
            raise OSError("no such\nrepository")
        return str(tmp_path / "cache [1]")

    (tmp_path / "cache [1]" / "data").mkdir(parents=True)
    for n, name in enumerate(("a.jsonl", "b.jsonl", "c.txt")):
        (tmp_path / "blob").with_suffix(f".{n}").write_text(f'{{"instruction": "q{n}", "output": "a"}}\n')
        (tmp_path / "cache [1]" / "data" / name).symlink_to(tmp_path / f"blob.{n}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def job_of(tmp_path, hub):
    sources = [{"name": "s", "format": "alpaca", "path": "data/*.jsonl", "hub": hub}]
    recipe = load_recipe(None, [f"collect.sources={json.dumps(sources)}"])
    return Job("collect", recipe, tmp_path, tmp_path / "out", {})


def test_a_dataset_on_the_hub_is_read_at_its_commit(hub, tmp_path):
    job = job_of(tmp_path, f"owner/name@{COMMIT}")
    pipeline.run_stage(job)
    given = {"repo_type": "dataset", "revision": COMMIT, "allow_patterns": ["data/*.jsonl"]}
    assert hub == [("owner/name", given)], "once, however often its files are asked for"
    records = pq.read_table(tmp_path / "out" / "records")
    assert [prompt[0]["content"] for prompt in records["prompt"].to_pylist()] == ["q0", "q1"]
    assert list(read_manifest(tmp_path / "out")["notes"]["files"]["s"]) == ["a.jsonl", "b.jsonl"]


def test_a_dataset_that_can_not_be_fetched_is_one_line(hub, tmp_path):
    with pytest.raises(UserError, match=r"key collect\.sources\.s\.hub: none/such@.* \(no such repository\): fetch"):
        pipeline.run_stage(job_of(tmp_path, f"none/such@{COMMIT}"))


@pytest.mark.parametrize("name", ["owner/name", "owner/name@main", f"name@{COMMIT}", f"owner/name@{COMMIT[:7]}"])
def test_a_dataset_is_named_with_its_commit(name, tmp_path):
    with pytest.raises(UserError, match=r"section collect\.sources\[0\]: hub '.*': give owner/name@commit"):
        job_of(tmp_path, name)
