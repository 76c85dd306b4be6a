"""Every sub-format by a small example, paths, and real files."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from slmfast.errors import UserError
from slmfast.miniature.raw_files import FILES
from slmfast.miniature.world import write_world
from slmfast.readers import FORMATS, Record, Rejection, expand_paths, read_source
from slmfast.readers.json_stream import read_array
from slmfast.records import prompt_text

DATA = os.environ.get("SLMFAST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="SLMFAST_DATA is not set: no real files")

GOOD = {"instruction": "Add 1 and 2.", "input": "", "output": "3"}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def lines(*items: Any) -> bytes:
    """JSON lines of values; bytes stand as they are."""
    rows = [item if isinstance(item, bytes) else json.dumps(item, ensure_ascii=False).encode() for item in items]
    return b"".join(row + b"\n" for row in rows)


def read(path: Path, format: str = "alpaca", **options: Any) -> list[Record | Rejection]:
    return list(read_source("test", format, path, **options))


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# --- schemas

TURNS = [{"from": "human", "value": "1+1?"}, {"from": "assistant", "value": "2"}]
ROUNDS = {f"round_{i}": {"response": json.dumps({"Q": f"q{i}", "A": f"a{i}"})} for i in (0, 1, 10, 2)}


@pytest.mark.parametrize(
    ("format", "item", "prompt", "reply", "category"),
    [
        ("belle", {"id": "1", "conversations": TURNS}, [user("1+1?")], "2", None),
        (
            "belle",
            {"conversations": [*TURNS, {"from": "human", "value": "+1?"}, {"from": "assistant", "value": "3"}]},
            [user("1+1?"), assistant("2"), user("+1?")],
            "3",
            None,
        ),
        # A question that nobody answered is after the last reply.
        ("belle", {"conversations": [*TURNS, {"from": "human", "value": "and?"}]}, [user("1+1?")], "2", None),
        (
            "belle",
            {"conversations": [{"from": "system", "value": "Be brief."}, *TURNS]},
            [{"role": "system", "content": "Be brief."}, user("1+1?")],
            "2",
            None,
        ),
        ("school_math", {"instruction": "题目：1+1", "input": "", "output": "\n2"}, [user("题目：1+1")], "2", None),
        ("school_math", {"conversation": [{"human": "1+1", "assistant": "\n2"}]}, [user("1+1")], "2", None),
        (
            "coig",
            {
                "textbox_q_instruction": "选择题",
                "textbox_q_context": "",
                "textbox_question": "1+1=?",
                "textbox_answer": "A",
                "textbox_answer_analysis": "因为1+1=2，选A",
                "subject": "数学",
            },
            [user("选择题\n1+1=?")],
            "因为1+1=2，选A",
            "数学",
        ),
        (
            "coig",
            {
                "textbox_q_context": "文章",
                "textbox_question": "问",
                "textbox_answer": "答",
                "textbox_answer_analysis": "",
            },
            [user("文章\n问")],
            "答",
            None,
        ),
        ("coig", {"instruction": "a", "input": "b", "output": "c"}, [user("a\nb")], "c", None),
        (
            "coig",
            {"trans_instruction": "a", "trans_input": "b", "trans_output": "c"},
            [user("a\nb")],
            "c",
            None,
        ),
        (
            "coig",
            ROUNDS,
            [user("q0"), assistant("a0"), user("q1"), assistant("a1"), user("q2"), assistant("a2"), user("q10")],
            "a10",
            None,
        ),
        (
            "camel",
            {"role_1": "Physicist", "topic;": "Optics", "sub_topic": "x", "message_1": "Why?", "message_2": "So."},
            [user("Why?")],
            "So.",
            "Optics",
        ),
        ("camel", {"topic": "Optics", "message_1": "Why?", "message_2": "So."}, [user("Why?")], "So.", "Optics"),
        ("camel", {"instruction": "a", "input": "None given", "output": "c"}, [user("a\nNone given")], "c", None),
        (
            "dolly",
            {"instruction": "Who?", "context": "Ann came.", "response": "Ann", "category": "closed_qa"},
            [user("Ann came.\nWho?")],
            "Ann",
            "closed_qa",
        ),
        (
            "dolly",
            {"instruction": "Who?", "input": "", "output": "Ann", "category": "open_qa"},
            [user("Who?")],
            "Ann",
            "open_qa",
        ),
        ("alpaca", {"instruction": "a", "input": "b", "output": "c"}, [user("a\nb")], "c", None),
        ("alpaca", {"instruction": "a", "output": "c"}, [user("a")], "c", None),
        ("alpaca", {"instruction": "a", "input": None, "output": "  c"}, [user("a")], "  c", None),
        ("alpaca_bilingual_en", {"en_instruction": "a", "en_input": "b", "en_output": "c"}, [user("a\nb")], "c", None),
        ("alpaca_bilingual_zh", {"zh_instruction": "甲", "zh_input": "", "zh_output": "乙"}, [user("甲")], "乙", None),
    ],
)
def test_schema(
    tmp_path: Path, format: str, item: dict[str, Any], prompt: list[dict[str, str]], reply: str, category: str | None
) -> None:
    path = write(tmp_path, "a.jsonl", lines(item))
    assert read(path, format) == [Record(0, "a.jsonl", 1, prompt, reply, category)]


# --- limits


def test_limit_is_a_setting(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", lines({"instruction": "abc", "output": "汉字"}))
    assert isinstance(read(path, max_text_bytes=6)[0], Record)
    assert "reply of 6 bytes, over the limit of 5 (max_text_bytes)" in read(path, max_text_bytes=5)[0].reason


# --- paths


def test_paths(tmp_path: Path) -> None:
    for name in ("x/b.jsonl", "x/a.jsonl", "y/c.jsonl", "y/deep/d.jsonl", "y/[e].jsonl"):
        write(tmp_path, name, lines(GOOD))
    found = expand_paths([f"{tmp_path}/y/**/*.jsonl", f"{tmp_path}/x/*.jsonl", tmp_path / "x" / "a.jsonl"])
    assert found == sorted(tmp_path.rglob("*.jsonl"), key=str) and len(found) == 5
    assert expand_paths(tmp_path / "y" / "[e].jsonl") == [tmp_path / "y" / "[e].jsonl"]
    records = read_source("test", "alpaca", found)
    assert list(Counter(record.file for record in records)) == [str(path.relative_to(tmp_path)) for path in found]


def test_rows_go_on_from_file_to_file(tmp_path: Path) -> None:
    paths = [write(tmp_path, name, lines(GOOD, b"bad", GOOD)) for name in ("b.jsonl", "a.jsonl")]
    read_back = list(read_source("test", "alpaca", paths))
    assert [item[:3] for item in read_back] == [
        (3 * f + i, name, i + 1) for f, name in enumerate(("a.jsonl", "b.jsonl")) for i in range(3)
    ]


def test_path_that_names_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing-\*\.json"):
        read_source("test", "alpaca", tmp_path / "nothing-*.json")
    with pytest.raises(UserError, match=r"folder.*\*\.jsonl"):
        read_source("test", "alpaca", tmp_path)
    with pytest.raises(UserError, match="no path is given"):
        read_source("test", "alpaca", [])


def test_unknown_format_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean alpaca"):
        read_source("test", "alpacca", tmp_path)
    with pytest.raises(UserError, match=", ".join(FORMATS)):
        read_source("test", "xyz", tmp_path)


# --- the miniature knows what it wrote


def test_every_raw_record_of_the_miniature_is_read_as_it_was_meant(tmp_path: Path) -> None:
    write_world(tmp_path / "raw", size=600, seed=1)
    truth = {
        (row["source"], row["source_row"]): row for row in pq.read_table(tmp_path / "raw/truth.parquet").to_pylist()
    }
    for source, files in FILES.items():
        format = "alpaca" if source.startswith("alpaca") else source
        for item in read_source(source, format, [tmp_path / "raw" / file for file in files]):
            row = truth.pop((source, item.source_row))
            assert (row["kind"] == "malformed") == isinstance(item, Rejection)
            assert item.line == row["line"] and row["file"].endswith(item.file)
            if isinstance(item, Record):
                assert prompt_text(item.prompt) == row["prompt"]
    assert not truth


# --- real files


@needs_data
@pytest.mark.parametrize(
    ("format", "pattern", "records", "rejected"),
    [
        ("alpaca_bilingual_en", "alpaca-bilingual-52k/*.json", 51_953, {"empty reply": 49}),
        ("alpaca_bilingual_zh", "alpaca-bilingual-52k/*.json", 51_952, {"empty reply": 50}),
        ("alpaca", "belle/dev1K.jsonl", 1000, {}),
        ("dolly", "dolly-3k-alpagasus/dolly_3k.json", 2996, {}),
    ],
)
def test_real_files(format: str, pattern: str, records: int, rejected: dict[str, int]) -> None:
    items = list(read_source("real", format, f"{DATA}/{pattern}"))
    assert Counter(item.reason for item in items if isinstance(item, Rejection)) == rejected
    assert sum(isinstance(item, Record) for item in items) == records
    assert [item.source_row for item in items] == list(range(records + sum(rejected.values())))


@needs_data
def test_real_array_equals_json_load() -> None:
    path = Path(DATA) / "alpaca-bilingual-52k" / "alpaca_chinese_part_7.json"
    with path.open("rb") as file:
        assert [value for _, value in read_array(file, 10_000)] == json.loads(path.read_text(encoding="utf-8"))
