"""Every sub-format by a small example, and every raw object accounted for, however malformed."""

import json
import os
import random
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


# --- malformed input: what stands in a line, and what the reason must name

MALFORMED: list[tuple[str, str, Any, str]] = [
    ("broken JSON", "alpaca", b'{"instruction": "a"', "broken JSON at column"),
    ("no JSON", "alpaca", b"hello", "broken JSON"),
    ("two values on a line", "alpaca", lines(GOOD).strip() * 2, "broken JSON"),
    ("raw control character", "alpaca", b'{"instruction": "a\tb", "output": "c"}', "control character"),
    ("wrong encoding, GBK", "alpaca", '{"instruction": "你好", "output": "好"}'.encode("gbk"), "not UTF-8 at byte"),
    ("cut UTF-8", "alpaca", b'{"instruction": "\xe4\xbd", "output": "c"}', "not UTF-8"),
    ("encoded surrogate", "alpaca", b'{"instruction": "\xed\xa0\x80", "output": "c"}', "not UTF-8"),
    ("nested too deep", "alpaca", b"[" * 100_000, "nested too deep"),
    ("endless number", "alpaca", b'{"instruction": ' + b"9" * 5000 + b"}", "unreadable JSON"),
    ("null", "alpaca", None, "not an object"),
    ("number", "alpaca", 5, "not an object"),
    ("string", "alpaca", "text", "not an object"),
    ("list", "alpaca", [1, 2], "not an object"),
    ("empty object", "alpaca", {}, "field instruction is missing"),
    ("missing reply", "alpaca", {"instruction": "a"}, "field output is missing"),
    ("null reply", "alpaca", {"instruction": "a", "output": None}, "field output is null"),
    ("number for text", "alpaca", {"instruction": 3, "output": "c"}, "field instruction is a number"),
    ("list for text", "alpaca", {"instruction": "a", "output": ["c"]}, "field output is a list"),
    ("mistyped input", "alpaca", {"instruction": "a", "input": True, "output": "c"}, "field input is a boolean"),
    ("empty prompt", "alpaca", {"instruction": "", "output": "c"}, "empty prompt"),
    ("blank prompt", "alpaca", {"instruction": " \n\u3000", "output": "c"}, "empty prompt"),
    ("input alone", "alpaca", {"instruction": "", "input": "b", "output": "c"}, "empty prompt"),
    ("empty reply", "alpaca", {"instruction": "a", "output": ""}, "empty reply"),
    ("blank reply", "alpaca", {"instruction": "a", "output": "\n \n"}, "empty reply"),
    ("huge reply", "alpaca", {"instruction": "a", "output": "c" * (10 << 20)}, "reply of 10485760 bytes"),
    ("huge prompt, in bytes", "alpaca", {"instruction": "长" * 400_000, "output": "c"}, "prompt of 1200000 bytes"),
    (
        "lone surrogate",
        "alpaca",
        b'{"instruction": "a\\ud800b", "output": "c"}',
        "lone surrogate U+D800 at character 2",
    ),
    ("lone surrogate, low", "alpaca", b'{"instruction": "a", "output": "\\udc01"}', "lone surrogate U+DC01"),
    ("NUL", "alpaca", {"instruction": "a\0b", "output": "c"}, "NUL character in the prompt"),
    ("surrogate in category", "alpaca", b'{"instruction":"a","output":"c","category":"\\ud900"}', "of the category"),
    ("no dialogue", "belle", {"id": "1"}, "field instruction is missing"),
    ("dialogue not a list", "belle", {"conversations": "a"}, "field conversations is text, not a list"),
    ("empty dialogue", "belle", {"conversations": []}, "no assistant turn"),
    ("no assistant turn", "belle", {"conversations": TURNS[:1]}, "no assistant turn"),
    ("no user turn", "belle", {"conversations": TURNS[1:]}, "turn 1 is of the assistant"),
    ("two users", "belle", {"conversations": [TURNS[0], *TURNS]}, "turn 2 is of the user"),
    (
        "unknown role",
        "belle",
        {"conversations": [{"from": "cat", "value": "x"}, TURNS[1]]},
        "conversations[0].from is 'cat'",
    ),
    ("turn not an object", "belle", {"conversations": ["hi", TURNS[1]]}, "conversations[0] is text"),
    (
        "turn without text",
        "belle",
        {"conversations": [{"from": "human"}, TURNS[1]]},
        "conversations[0].value is missing",
    ),
    ("empty turn", "belle", {"conversations": [{"from": "human", "value": " "}, TURNS[1]]}, "empty prompt: turn 1"),
    ("only a system turn", "belle", {"conversations": [{"from": "system", "value": "x"}]}, "no assistant turn"),
    ("pair not an object", "school_math", {"conversation": [3]}, "conversation[0].human has no object"),
    ("half a pair", "school_math", {"conversation": [{"human": "a"}]}, "conversation[0].assistant is missing"),
    ("exam without answer", "coig", {"textbox_question": "a"}, "field textbox_answer is missing"),
    ("exam, mistyped", "coig", {"textbox_question": 1, "textbox_answer": "b"}, "field textbox_question is a number"),
    ("translated, no reply", "coig", {"trans_instruction": "a"}, "field trans_output is missing"),
    ("round not an object", "coig", {"round_0": "x"}, "field round_0 is text"),
    ("round not JSON", "coig", {"round_0": {"response": "Q: a"}}, "round_0.response holds broken JSON"),
    ("round without A", "coig", {"round_0": {"response": '{"Q": "a"}'}}, "round_0.response.A is missing"),
    ("round of a list", "coig", {"round_0": {"response": "[]"}}, "round_0.response is a list"),
    ("camel, half", "camel", {"topic;": "x", "message_1": "a"}, "field message_2 is missing"),
    ("dolly, no response", "dolly", {"instruction": "a", "context": "b"}, "field response is missing"),
    ("other side only", "alpaca_bilingual_zh", {"en_instruction": "a", "en_output": "b"}, "zh_instruction is missing"),
]

GOOD_OF = {
    "belle": {"conversations": TURNS},
    "school_math": GOOD,
    "coig": GOOD,
    "camel": {"message_1": "a", "message_2": "b"},
    "dolly": {"instruction": "a", "response": "b"},
    "alpaca": GOOD,
    "alpaca_bilingual_zh": {"zh_instruction": "甲", "zh_output": "乙"},
}


def test_there_are_many_kinds() -> None:
    assert len({kind for kind, *_ in MALFORMED}) == len(MALFORMED) >= 40


@pytest.mark.parametrize(("kind", "format", "item", "reason"), MALFORMED, ids=[m[0] for m in MALFORMED])
def test_malformed_line(tmp_path: Path, kind: str, format: str, item: Any, reason: str) -> None:
    good = GOOD_OF[format]
    path = write(tmp_path, "a.jsonl", lines(good, b"", item, good))
    before, rejection, after = read(path, format)
    assert isinstance(before, Record) and isinstance(after, Record)
    assert rejection[:3] == (1, "a.jsonl", 3)
    assert reason in rejection.reason and "\n" not in rejection.reason
    assert (before.line, after.line, after.source_row) == (1, 4, 2)
    rejection.reason.encode()  # a table can hold it


# What JSON itself can't hold breaks an array as a whole; the rest are bad elements of it.
ELEMENTS = [m for m in MALFORMED if not isinstance(m[2], bytes) or b"\\u" in m[2]]


@pytest.mark.parametrize(("kind", "format", "item", "reason"), ELEMENTS, ids=[m[0] for m in ELEMENTS])
def test_malformed_element(tmp_path: Path, kind: str, format: str, item: Any, reason: str) -> None:
    good = GOOD_OF[format]
    rows = [row.strip() for row in lines(good, item, good).split(b"\n") if row]
    path = write(tmp_path, "a.json", b"[\n" + b",\n".join(rows) + b"\n]")
    before, rejection, after = read(path, format)
    assert isinstance(before, Record) and isinstance(after, Record)
    assert rejection[:3] == (1, "a.json", 2) and reason in rejection.reason


def test_limit_is_a_setting(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", lines({"instruction": "abc", "output": "汉字"}))
    assert isinstance(read(path, max_text_bytes=6)[0], Record)
    assert "reply of 6 bytes, over the limit of 5 (max_text_bytes)" in read(path, max_text_bytes=5)[0].reason


def test_nothing_is_lost_in_a_random_mixture(tmp_path: Path) -> None:
    rng = random.Random(11)
    bad = [item for _, format, item, _ in MALFORMED if format == "alpaca" and len(lines(item)) < 10_000]
    data, expected, line = b"", [], 0
    for _ in range(2000):
        line += 1
        if rng.random() < 0.1:
            data += rng.choice([b"\n", b"   \n", b"\r\n"])
        else:
            is_bad = rng.random() < 0.4
            data += lines(rng.choice(bad) if is_bad else GOOD)
            expected.append((len(expected), "a.json", line, Rejection if is_bad else Record))
    read_back = read(write(tmp_path, "a.json", data))
    assert [(*item[:3], type(item)) for item in read_back] == expected


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
