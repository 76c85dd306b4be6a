"""The report's confusion tables of rule categories and people's."""

import json
from collections import Counter

import pyarrow as pa

from slmfast.human_categories import dataset_of, human_classes
from slmfast.readers import read_source
from slmfast.recipe import Recipe
from slmfast.records import RECORD_SCHEMA
from slmfast.reporting.category_section import categories_section, confusion
from slmfast.reporting.document import Table
from slmfast.reporting.run_folder import RunFolder
from slmfast.stages import categorize
from slmfast.store import ShardWriter


def run_of(folder, rows):
    """A run whose stage categorize has rows of (source, people's category, our category)."""
    schema = pa.schema([*RECORD_SCHEMA, *categorize.COLUMNS])
    common = {"language": "en", "prompt": [{"role": "user", "content": "?"}], "reply": "!", "rule_id": "r"}
    with ShardWriter(folder / "categorize" / "records", schema) as writer:
        names = "source", "source_category", "category"
        writer.write(
            [
                common | {"id": f"{n:032x}", "source_row": n} | dict(zip(names, row, strict=True))
                for n, row in enumerate(rows)
            ]
        )
    return RunFolder(folder, Recipe(), {"categorize": folder / "categorize"})


def test_each_source_with_known_classes_has_a_table(tmp_path):
    rows = [("d", "open_qa", "health"), ("d", "general_qa", "law"), ("d", "closed_qa", "reading comprehension")]
    rows += [("d", "open_qa", "other"), ("d", "brainstorming", "health"), ("d", None, "math word problem")]
    rows += [("b", "open\xa0qa", "health"), ("odd", "Math-Addition", "arithmetic"), ("none", None, "law")]
    belle, dolly = [b for b in categories_section(run_of(tmp_path, rows)).blocks if isinstance(b, Table)]
    assert belle.caption == "b: 1 of 1 records agree, 100.0 %"
    assert dolly.caption == "d: 3 of 5 records agree, 60.0 %"
    assert dolly.header == ["people's class", "records", "agree", "closed_qa", "brainstorming", "open_qa", "none"]
    assert dolly.rows == [
        ["closed_qa", "1", "100.0 %", "1", "–", "–", "–"],
        ["brainstorming", "1", "0.0 %", "–", "–", "1", "–"],
        ["open_qa", "3", "66.7 %", "–", "–", "2", "1"],
    ]
    assert categories_section(run_of(tmp_path / "other", rows[-2:])) is None


def test_datasets_are_told_by_their_classes():
    assert dataset_of(["open qa", "math"]) == "belle"
    assert dataset_of(["open_qa"]) == "dolly"
    assert dataset_of(["summarization", "classification"]) == "belle"  # both have them: they stand for the same there
    assert dataset_of(["open_qa", "math"]) is None and dataset_of([]) is None
    for dataset in ("belle", "dolly"):
        pairs = Counter({(human, ours): 1 for ours, human in human_classes(dataset).items()})
        assert all(human == ours for human, ours in confusion(dataset, pairs))


def test_belles_evaluation_set_is_read_with_its_classes(tmp_path):
    rows = [
        {"question": "2+3=?", "std_answer": "5", "class": "math"},
        {"question": "?", "std_answer": "", "class": "code"},
    ]
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    first, second = read_source("belle_eval", "belle", path)
    assert (first.prompt[0]["content"], first.reply, first.source_category) == ("2+3=?", "5", "math")
    assert "reply" in second.reason
