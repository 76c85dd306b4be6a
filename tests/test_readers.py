"""Every sub-format by a small example, every container, and every raw object accounted for."""

import csv
import gzip
import io
import json
import os
import random
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from slmfast.errors import UserError
from slmfast.miniature.raw_files import FILES
from slmfast.miniature.world import write_world
from slmfast.readers import FORMATS, Record, Rejection, expand_paths, read_source
from slmfast.readers.json_stream import Broken, read_array, read_lines, read_values
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


def test_endless_line_costs_only_itself() -> None:
    stream = io.BytesIO(b'{"a": 1}\n"' + b"x" * 1000 + b'"\n{"b": 2}\n')
    values = list(read_lines(stream, max_bytes=64))
    assert [number for number, _ in values] == [1, 2, 3]
    assert values[0][1] == {"a": 1} and values[2][1] == {"b": 2} and "more than 64 bytes" in values[1][1].reason


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


# --- JSON streams

CHUNKS = (1, 2, 3, 7, 64, 1 << 20)


def random_value(rng: random.Random, depth: int = 0) -> Any:
    kinds = ["text", "int", "float", "word", "list", "dict"] if depth < 3 else ["text", "int", "float", "word"]
    kind = rng.choice(kinds)
    if kind == "text":
        return "".join(rng.choice('ab"\\\n/é汉😀[]{},: 0') for _ in range(rng.randint(0, 12)))
    if kind == "int":
        return rng.randint(-(10 ** rng.randint(0, 20)), 10**6)
    if kind == "float":
        return rng.choice([0.5, -1e-300, 1.5e300, 12345.678])
    if kind == "word":
        return rng.choice([True, False, None])
    if kind == "list":
        return [random_value(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    return {random_value(rng, 9).__repr__(): random_value(rng, depth + 1) for _ in range(rng.randint(0, 4))}


@pytest.mark.parametrize("chunk", CHUNKS)
def test_array_stream_equals_json_load(chunk: int) -> None:
    rng = random.Random(chunk)
    for _ in range(60):
        array = [random_value(rng) for _ in range(rng.randint(0, 12))]
        text = json.dumps(array, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 0, 2]))
        values = list(read_array(io.BytesIO(text.encode()), chunk))
        assert values == list(enumerate(json.loads(text), start=1))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_value_stream_equals_json_load(chunk: int) -> None:
    rng = random.Random(chunk)
    for _ in range(60):
        items = [{"k": random_value(rng)} for _ in range(rng.randint(0, 6))]
        text = "\n".join(json.dumps(item, indent=2) for item in items)
        assert [value for _, value in read_values(io.BytesIO(text.encode()), chunk)] == items


@pytest.mark.parametrize("chunk", CHUNKS)
def test_cut_array_gives_every_whole_element(chunk: int) -> None:
    """Cut at any byte: the elements before the cut, then Broken."""
    rng = random.Random(5)
    array = [{"a": random_value(rng)} for _ in range(5)]
    parts = [json.dumps(item, ensure_ascii=False).encode() for item in array]
    data = b"[" + b", ".join(parts) + b"]"
    ends = [1 + sum(len(part) + 2 for part in parts[: i + 1]) - 2 for i in range(5)]
    for cut in range(1, len(data)):
        values = []
        with pytest.raises(Broken):
            for _, value in read_array(io.BytesIO(data[:cut]), chunk):
                values.append(value)
        assert values == array[: sum(end <= cut for end in ends)]


def test_broken_line_is_named() -> None:
    stream = io.BytesIO(b'[\n{"a": 1},\n{"a": 2},\n{"a" 3},\n{"a": 4}]')
    with pytest.raises(Broken, match="line 4"):
        list(read_array(stream, 5))


def test_array_is_never_held_whole() -> None:
    """A stream of endless length gives its first elements."""

    class Endless(io.RawIOBase):
        given = 0

        def readable(self) -> bool:
            return True

        def read(self, size: int = -1) -> bytes:
            text = b"[" if self.given == 0 else b""
            text += b'{"a": 1},' * (size // 9)
            self.given += len(text)
            return text

    stream = Endless()
    values = read_array(stream, 900)
    for number in range(1, 1001):
        assert next(values) == (number, {"a": 1})
    assert stream.given < 15_000


# --- containers


def as_csv(items: list[dict[str, str]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(items[0]))
    writer.writeheader()
    writer.writerows(items)
    return text.getvalue().encode()


ITEMS = [{"instruction": f'问题 {i}, "quoted"\nline two', "input": "", "output": f"réponse {i}"} for i in range(7)]
JSON_LINES = lines(*ITEMS)
ARRAY = json.dumps(ITEMS, ensure_ascii=False, indent=1).encode()


def tar_gz(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet(items: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(items), buffer, row_group_size=3)
    return buffer.getvalue()


CONTAINERS = {
    "lines.jsonl": JSON_LINES,
    "lines.json": JSON_LINES,
    "no_last_newline.jsonl": JSON_LINES.rstrip(),
    "crlf.jsonl": JSON_LINES.replace(b"\n", b"\r\n"),
    "blank_first.json": b"\n  \n" + JSON_LINES,
    "array.json": ARRAY,
    "array.jsonl": ARRAY,
    "flat_array.json": json.dumps(ITEMS).encode(),
    "bom.json": b"\xef\xbb\xbf" + ARRAY,
    "bom.jsonl": b"\xef\xbb\xbf" + JSON_LINES,
    "pretty.json": "\n".join(json.dumps(item, indent=2) for item in ITEMS).encode(),
    "table.csv": as_csv(ITEMS),
    "bom.csv": b"\xef\xbb\xbf" + as_csv(ITEMS),
    "table.parquet": parquet(ITEMS),
    "lines.jsonl.gz": gzip.compress(JSON_LINES),
    "two_members.jsonl.gz": gzip.compress(lines(*ITEMS[:3])) + gzip.compress(lines(*ITEMS[3:])),
    "array.json.gz": gzip.compress(ARRAY),
    "table.csv.gz": gzip.compress(as_csv(ITEMS)),
    "bom.json.gz": gzip.compress(b"\xef\xbb\xbf" + ARRAY),
    "lines.jsonl.zst": zstandard.compress(JSON_LINES),
    "two_frames.json.zst": zstandard.compress(lines(*ITEMS[:3])) + zstandard.compress(lines(*ITEMS[3:])),
    "one.tar.gz": tar_gz({"a.jsonl": JSON_LINES}),
    "three.tgz": tar_gz({"a.json": lines(*ITEMS[:2]), "._a.json": b"junk", "b/c.json": ARRAY[:-2] + b"]"}),
    "nested.tar.gz": tar_gz({"a.jsonl.gz": gzip.compress(JSON_LINES)}),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_container(tmp_path: Path, name: str) -> None:
    records = read(write(tmp_path, name, CONTAINERS[name]))
    expected = ITEMS[:2] + ITEMS if name == "three.tgz" else ITEMS
    assert [record.reply for record in records] == [item["output"] for item in expected]
    assert [record.prompt for record in records] == [[user(item["instruction"])] for item in expected]
    assert [record.source_row for record in records] == list(range(len(expected)))
    assert len({(record.file, record.line) for record in records}) == len(expected)
    assert all(record.file.startswith(name) for record in records)


def test_parquet_of_dialogues(tmp_path: Path) -> None:
    path = write(tmp_path, "a.parquet", parquet([{"conversations": TURNS}, {"conversations": None}]))
    record, rejection = read(path, "belle")
    assert (record.prompt, record.reply) == ([user("1+1?")], "2")
    assert (rejection.line, rejection.reason) == (2, "field conversations is null, not a list")


def test_archive_of_dialogues(tmp_path: Path) -> None:
    members = {f"chat/{i:02}.json": json.dumps(ROUNDS, indent=i % 2).encode() for i in range(5)}
    members["chat/03.json"] = b"{ broken"
    path = write(tmp_path, "chat.tar.gz", tar_gz(members))
    read_back = read(path, "coig")
    assert [type(item) for item in read_back] == [Record, Record, Record, Rejection, Record]
    assert [item.file for item in read_back] == [f"chat.tar.gz/chat/{i:02}.json" for i in range(5)]


def test_bad_bytes_in_an_array_spoil_one_element(tmp_path: Path) -> None:
    data = json.dumps([GOOD, GOOD | {"output": "XX"}, GOOD]).encode().replace(b"XX", b"\xff\xfe")
    types = [type(item) for item in read(write(tmp_path, "a.json", data))]
    assert types == [Record, Rejection, Record]
    assert "not UTF-8" in read(tmp_path / "a.json")[1].reason


def test_broken_array_keeps_what_came_before(tmp_path: Path) -> None:
    data = b"[\n" + b",\n".join(lines(GOOD).strip() for _ in range(4)) + b',\n{"instruction" "x"},\n{}]'
    read_back = read(write(tmp_path, "a.json", data))
    assert [type(item) for item in read_back] == [Record] * 4 + [Rejection]
    assert read_back[-1][:3] == (4, "a.json", 5)
    assert "the rest of the file" in read_back[-1].reason and "line 6" in read_back[-1].reason


@pytest.mark.parametrize("after", [b"]", b"{}", b"x"])
def test_text_after_an_array(tmp_path: Path, after: bytes) -> None:
    read_back = read(write(tmp_path, "a.json", ARRAY + after))
    assert [type(item) for item in read_back] == [Record] * 7 + [Rejection]


@pytest.mark.parametrize("name", ["lines.jsonl.gz", "array.json.gz", "lines.jsonl.zst", "one.tar.gz"])
def test_cut_compression_keeps_what_came_before(tmp_path: Path, name: str) -> None:
    rng = random.Random(1)
    many = [GOOD | {"output": rng.randbytes(60).hex()} for _ in range(20_000)]
    packed = {
        "lines.jsonl.gz": lambda: gzip.compress(lines(*many)),
        "array.json.gz": lambda: gzip.compress(json.dumps(many).encode()),
        "lines.jsonl.zst": lambda: zstandard.ZstdCompressor().compress(lines(*many)),
        "one.tar.gz": lambda: tar_gz({"a.jsonl": lines(*many)}),
    }[name]()
    read_back = read(write(tmp_path, name, packed[: len(packed) // 2]))
    good = [item for item in read_back if isinstance(item, Record)]
    assert 1000 < len(good) < 15_000
    assert [record.reply for record in good] == [item["output"] for item in many[: len(good)]]
    assert 1 <= len(read_back) - len(good) <= 2 and isinstance(read_back[-1], Rejection)


def test_bad_csv_rows(tmp_path: Path) -> None:
    data = b'instruction,input,output\na,b,c\nd,e\nf,g,h,i\n"x\ny",,z\nj,k,\xff\nm,n,o\n"p,q,r\n'
    read_back = read(write(tmp_path, "a.csv", data))
    assert [(item.line, type(item)) for item in read_back] == [
        (2, Record),
        (3, Rejection),
        (4, Rejection),
        (5, Record),
        (7, Rejection),
        (8, Record),
        (9, Rejection),
    ]
    assert read_back[3].prompt == [user("x\ny")]
    assert "2 cells" in read_back[1].reason and "4 cells" in read_back[2].reason and "not UTF-8" in read_back[4].reason


def test_cut_parquet_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a.parquet", parquet(ITEMS)[:-20])
    with pytest.raises(UserError, match=r"a\.parquet"):
        read(path)


# --- files that can't be read at all

UNREADABLE = {
    "empty.json": b"",
    "blank.jsonl": b"\n \n\n",
    "prose.txt": b"Dear reader,\nthis is prose.\n",
    "utf16.json": ARRAY.decode().encode("utf-16"),
    "gbk.jsonl": lines(*ITEMS).decode().encode("gbk", "replace"),
    "picture.json": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "broken_array.json": b"[ {'instruction': 'a'} ]",
    "not_gzip.jsonl.gz": JSON_LINES,
    "cut_early.jsonl.gz": gzip.compress(JSON_LINES)[:15],
    "not_zstd.jsonl.zst": JSON_LINES,
    "not_tar.tar.gz": JSON_LINES,
    "not_parquet.parquet": JSON_LINES,
    "junk_inside.tar.gz": tar_gz({"a.txt": b"junk"}),
    "empty.csv": b"",
    "bzip.json.bz2": b"BZh91AY&SY" + bytes(40),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_file(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, UNREADABLE[name])
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert name in message and "test" in message and "give UTF-8 JSON" in message and "\n" not in message


def test_file_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.jsonl", JSON_LINES)

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a\.jsonl.*Permission denied.*permissions"):
        read(path)


def test_empty_array_is_no_error(tmp_path: Path) -> None:
    assert read(write(tmp_path, "a.json", b" [ ] ")) == []


# --- paths


def test_paths(tmp_path: Path) -> None:
    for name in ("x/b.jsonl", "x/a.jsonl", "y/c.jsonl", "y/deep/d.jsonl", "y/[e].jsonl"):
        write(tmp_path, name, JSON_LINES)
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
