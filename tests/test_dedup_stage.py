"""The dedup stage: the text that it compares, and the rows that it writes."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slmfast.job import Job
from slmfast.near_duplicates import dedup
from slmfast.recipe import Recipe
from slmfast.records import MESSAGE, RECORD_SCHEMA, prompt_text, prompt_texts
from slmfast.stages import dedup as stage
from slmfast.store import ShardWriter


def random_prompt(rng: random.Random) -> list[dict[str, str]]:
    words = ["", "好", "hi: there", "a\nb", "½", "x" * 40]
    turns = rng.choice([0, 1, 1, 1, 2, 3, 7])
    return [{"role": rng.choice(["user", "assistant"]), "content": rng.choice(words)} for _ in range(turns)]


def test_prompt_texts_are_those_of_the_records():
    rng = random.Random(5)
    prompts = [random_prompt(rng) for _ in range(3000)]
    column = pa.array(prompts, pa.list_(MESSAGE))
    assert prompt_texts(column).to_pylist() == [prompt_text(prompt) for prompt in prompts]
    for start, length in ((7, 900), (2999, 1), (40, 0)):  # a slice keeps the buffers of the whole
        expected = [prompt_text(prompt) for prompt in prompts[start : start + length]]
        assert prompt_texts(column.slice(start, length)).to_pylist() == expected
        padded = pa.RecordBatch.from_arrays([column], ["p"]).slice(start, length).column("p")
        assert prompt_texts(padded).to_pylist() == expected


def run_stage(tmp_path, texts: list[str], rows_per_shard: int = 50, threads: int | None = None) -> Job:
    rows = [
        {
            "id": f"{row:032x}",
            "source": "s",
            "source_row": row,
            "language": "en",
            "source_category": None,
            "prompt": [{"role": "user", "content": text}],
            "reply": f"reply {row}",
        }
        for row, text in enumerate(texts)
    ]
    with ShardWriter(tmp_path / "in" / "records", RECORD_SCHEMA, rows_per_shard) as writer:
        writer.write(rows)
    job = Job(
        stage="dedup",
        recipe=Recipe(threads=threads),
        run_dir=tmp_path,
        folder=tmp_path / f"out{threads}",
        inputs={"categorize": tmp_path / "in"},
    )
    counts = stage.run(job)
    assert counts.rows_in == len(texts) == counts.out + counts.dropped
    return job


def test_every_record_is_kept_or_dropped_for_the_one_that_stands_for_it(tmp_path):
    rng = random.Random(8)
    bases = [" ".join(rng.choices("red green blue cyan pink teal grey gold".split(), k=12)) for _ in range(60)]
    texts = [rng.choice(bases) + rng.choice(["", ".", "!"]) for _ in range(400)]
    job = run_stage(tmp_path, texts, threads=1)
    kept, dropped = (pq.read_table(job.table(name)).to_pylist() for name in ("records", "dropped"))
    result = dedup(texts)
    assert [row["source_row"] for row in kept] == result.keep.nonzero()[0].tolist()
    gone = (~result.keep).nonzero()[0]
    assert [row["source_row"] for row in dropped] == gone.tolist()
    assert [int(row["duplicate_of"], 16) for row in dropped] == result.duplicate_of[gone].tolist()
    assert [row["distance"] for row in dropped] == result.distance[gone].tolist()
    assert {(row["stage"], row["reason"]) for row in dropped} == {("dedup", "near-duplicate")}


@pytest.mark.filterwarnings("error")  # the stage's line replaces the warning of slmfast.dedup
def test_a_large_cluster_is_told_once(tmp_path, capsys):
    texts = [f"{i * 7919} number {i * i} and {i**3}" for i in range(100)] + ["one template for everything"] * 12
    job = run_stage(tmp_path, texts)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"dedup: record {100:032x} stands for 12 of 112 rows (10.7%)")
    assert job.notes == {"largest_cluster": 12, "stand_in_row": 100}


def test_an_empty_table_and_one_without_duplicates_are_quiet(tmp_path, capsys):
    assert run_stage(tmp_path / "none", []).notes == {"largest_cluster": 0, "stand_in_row": -1}
    assert run_stage(tmp_path / "some", ["first of all", "second to none"]).notes["largest_cluster"] == 1
    assert capsys.readouterr().out == ""
