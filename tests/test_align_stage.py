"""Align accounts for every instruction, and for those that hold items of the benchmarks."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slmfast import pipeline
from slmfast.errors import UserError
from slmfast.job import Job
from slmfast.recipe import load_recipe
from slmfast.records import RECORD_SCHEMA
from slmfast.stages import categorize, classify, rate, regenerate
from slmfast.store import ShardWriter, read_manifest

ROWS = 40
LONG = "a train leaves the station at noon and goes sixty miles an hour until it comes to number"
SCHEMA = pa.schema(
    [*RECORD_SCHEMA, *categorize.COLUMNS, *classify.COLUMNS, *regenerate.COLUMNS, *rate.COLUMNS], metadata=None
)


def rated(n):
    """A record whose large reply wins and whose small one loses; every tenth has no good reply."""
    good = 1.0 if n % 10 else 0.0
    replies = [("original", "fair"), ("large", f"right answer {n}"), ("small", f"wrong answer {n}")]
    grades = [0.5, good, 0.0]
    return {
        "id": f"{n:032x}",
        "source": "test",
        "source_row": n,
        "language": "en",
        "prompt": [{"role": "user", "content": f"{LONG} {n}; how far?"}],
        "reply": "fair",
        "category": "math",
        "rule_id": "m",
        "label": f"Math-{n % 3}",
        "label_reply": "x",
        "replies": [{"origin": o, "text": t, "finish_reason": "stop"} for o, t in replies],
        "instruction_safe": True,
        "ratings": [
            {"tokens": 3, "bits_per_token": 1.0, "perplexity": 2.0, "safety": 1.0, "quality": quality}
            for quality in grades
        ],
    }


@pytest.fixture
def folder(tmp_path):
    with ShardWriter(tmp_path / "rate" / "records", SCHEMA) as writer:
        writer.write([rated(n) for n in range(ROWS)])
    items = [{"question": f"{LONG} {n}"} for n in (3, 10, 999)]
    items.append({"question": f"Another thing entirely, {' '.join('abcdefghijklmnop')}, right answer 7?"})
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "short.jsonl").write_text(json.dumps({"question": "Right answer 7!"}) + "\n")
    return tmp_path


def align(folder, *overrides, name="align"):
    recipe = load_recipe(None, [f"align.{override}" for override in overrides])
    job = Job("align", recipe, folder, folder / name, {"rate": folder / "rate"})
    pipeline.run_stage(job)
    return read_manifest(job.folder)


def rows(folder, table):
    return pq.read_table(folder / table).to_pylist()


def test_no_benchmark_named_is_said(folder):
    manifest = align(folder)
    assert manifest["notes"]["contamination"] == {"mode": "report", "benchmarks": {}}
    assert rows(folder, "align/contamination") == []


# The 13-gram "... number 3" is in item 1 alone, but 13-grams without the number are in all: every prompt holds one.
BOTH = "benchmarks={gsm8k: '${RUN}/items.jsonl', mmlu: ['${RUN}/short.jsonl']}"


def test_contamination_is_reported(folder):
    plain, notes = align(folder, name="plain"), align(folder, BOTH)["notes"]
    assert notes["sets"] == plain["notes"]["sets"]
    found = rows(folder, "align/contamination")
    good = {f"{n:032x}" for n in range(ROWS) if n % 10}
    assert {row["id"] for row in found if row["part"] == "prompt"} == good
    assert [(row["id"], row["part"], row["how"]) for row in found if row["benchmark"] == "mmlu"] == [
        (f"{7:032x}", "best reply", "the whole item")
    ]
    kept = {row["id"] for row in rows(folder, "align/records")}
    assert all(row["in_sets"] == (row["id"] in kept) for row in found)
    assert notes["contamination"]["benchmarks"] == {
        "gsm8k": {"items": 4, "records": 36, "exact": 0, "in_sets": 36},
        "mmlu": {"items": 1, "records": 1, "exact": 1, "in_sets": 1},
    }


def test_contamination_is_removed_on_request(folder):
    short = "benchmarks={mmlu: '${RUN}/short.jsonl'}"
    manifest = align(folder, short, "contamination=remove")
    counts = manifest["counts"]
    assert counts["rows_in"] == counts["out"] + counts["dropped"] == ROWS
    gone = {row["source_row"]: row["reason"] for row in rows(folder, "align/dropped")}
    assert set(gone) == {0, 7, 10, 20, 30}
    assert gone[7] == (
        "contamination: its best reply holds the whole item of benchmark mmlu, item short.jsonl line 1 "
        "(align.contamination)"
    )
    assert "right answer 7" not in str(rows(folder, "align/sft")) + str(rows(folder, "align/kto"))
    assert [row["in_sets"] for row in rows(folder, "align/contamination")] == [False]
    with pytest.raises(UserError, match="every good record holds an item"):
        align(folder, BOTH, "contamination=remove")


def test_the_check_can_be_skipped(folder):
    notes = align(folder, BOTH, "contamination=skip")["notes"]
    assert notes["contamination"] == {"mode": "skip", "benchmarks": {}}


def test_a_missing_benchmark_is_named(folder):
    with pytest.raises(UserError, match=r"align\.benchmarks\.mmlu: .*nowhere\.jsonl"):
        align(folder, "benchmarks={mmlu: nowhere.jsonl}")


def test_a_changed_benchmark_file_runs_align_again(folder):
    recipe = load_recipe(None, [f"align.{BOTH}"])
    job = Job("align", recipe, folder, folder / "align", {"rate": folder / "rate"})
    pipeline.run_stage(job)
    assert pipeline.is_up_to_date(job)
    (folder / "short.jsonl").write_text(json.dumps({"question": "Other?"}) + "\n")
    assert not pipeline.is_up_to_date(job)
