"""The same seed gives the same rows in the same order, whatever the threads, the shards and the batches.

From raw files to diversify and align through the stages themselves; what a model would say is a function of the row.
"""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slmfast import pipeline, store
from slmfast.job import Job
from slmfast.miniature.world import write_world
from slmfast.recipe import load_recipe
from slmfast.stages import classify, collect, rate, regenerate
from slmfast.store import ShardWriter, read_batches, shards, table_schema

SOURCES = (("dolly", "dolly", "dolly/*.jsonl"), ("coig", "coig", "coig/*"), ("belle", "belle", "belle/train*"))
# threads, rows a shard, rows a group and a batch, records that collect writes together
LAYOUTS = [(1, 65_536, 8_192, 2048), (2, 100, 37, 5), (3, 17, 5, 64), (2, 1000, 1, 1)]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    write_world(folder, size=900, seed=5)
    return folder


def number(row, purpose):
    return int.from_bytes(hashlib.blake2b(f"{purpose} {row['id']}".encode(), digest_size=4).digest(), "big")


def labelled(row):
    return {"label": f"Label-{number(row, 'label') % 97 % 13}", "label_reply": "x"}


def rated(row):
    texts = {"original": row["reply"], "large": f"large {row['id']}", "small": f"small {row['id']}"}
    replies = [{"origin": origin, "text": text, "finish_reason": "stop"} for origin, text in texts.items()]
    ratings = [
        {"tokens": 3, "bits_per_token": bits, "perplexity": 2.0**bits, "safety": 1.0, "quality": quality}
        for origin in texts
        for bits, quality in [(number(row, origin) % 100 / 50, number(row, f"{origin} q") % 3 / 2)]
    ]
    return {"replies": replies, "instruction_safe": True, "ratings": ratings}


def add(source, target, columns, function):
    schema = pa.schema([*table_schema(source), *columns])
    with ShardWriter(target, schema) as writer:
        for batch in read_batches(source):
            writer.write([row | function(row) for row in batch.to_pylist()])


def run(raw, folder, threads):
    sources = [{"name": n, "format": f, "path": f"{raw}/{p}"} for n, f, p in SOURCES]
    settings = [f"collect.sources={json.dumps(sources)}", f"threads={threads}", "seed=3"]
    recipe = load_recipe(None, [*settings, "diversify.target=150", "diversify.min_label_count=4", "align.sft_size=60"])

    def stage(name, **inputs):
        pipeline.run_stage(Job(name, recipe, folder, folder / name, {k: folder / v for k, v in inputs.items()}))

    stage("collect")
    stage("categorize", collect="collect")
    stage("dedup", categorize="categorize")
    add(folder / "dedup" / "records", folder / "classify" / "records", classify.COLUMNS, labelled)
    stage("diversify", classify="classify")
    columns = [*regenerate.COLUMNS, *rate.COLUMNS]
    add(folder / "diversify" / "records", folder / "rate" / "records", columns, rated)
    stage("align", rate="rate")


def rows(folder):
    tables = ("collect/records", "collect/rejected", "dedup/records", "dedup/dropped", "diversify/records")
    tables += ("diversify/dropped", "align/records", "align/dropped", "align/sft", "align/kto")
    found = {name: pq.read_table(folder / name).to_pylist() for name in tables}
    return found | {
        name: (folder / "align" / "llamafactory" / f"{name}.jsonl").read_text().splitlines() for name in ("sft", "kto")
    }


def lay_out(monkeypatch, layout):
    _, shard, group, batch = layout
    monkeypatch.setattr(ShardWriter.__init__, "__defaults__", (shard,))
    monkeypatch.setattr(store, "ROWS_PER_CHECK", 1)
    monkeypatch.setattr(read_batches, "__defaults__", (None, group))
    monkeypatch.setattr(collect, "BATCH", batch)


def test_identical_sets_in_any_layout(raw, tmp_path, monkeypatch):
    wanted, counts = None, set()
    for i, layout in enumerate(LAYOUTS):
        with monkeypatch.context() as patched:
            lay_out(patched, layout)
            run(raw, tmp_path / str(i), layout[0])
        counts.add(len(shards(tmp_path / str(i) / "diversify" / "records")))
        found = rows(tmp_path / str(i))
        wanted = wanted or found
        for name in wanted:
            assert found[name] == wanted[name], (layout, name)
    assert len(counts) > 2, "the shard size was not taken"
    sizes = {name: len(table) for name, table in wanted.items()}
    assert sizes["diversify/records"] == 150 and sizes["align/sft"] == 60 and sizes["align/kto"] == 90
    assert min(sizes.values()) > 0


def test_another_seed_gives_another_sample(raw, tmp_path):
    run(raw, tmp_path / "a", 1)
    recipe = load_recipe(None, ["seed=4", "diversify.target=150", "diversify.min_label_count=4"])
    job = Job("diversify", recipe, tmp_path, tmp_path / "b", {"classify": tmp_path / "a" / "classify"})
    pipeline.run_stage(job)
    ids = [
        pq.read_table(folder / "records").column("id").to_pylist()
        for folder in (tmp_path / "a" / "diversify", tmp_path / "b")
    ]
    assert len(ids[0]) == len(ids[1]) and set(ids[0]) != set(ids[1])
