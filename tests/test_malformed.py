"""Every malformed raw object is accounted for with file, line and reason, and costs no more than itself."""

import gzip
import io
import json
import random
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from slmfast import pipeline
from slmfast.job import Job
from slmfast.readers import Record, Rejection, read_source
from slmfast.recipe import load_recipe
from slmfast.store import read_manifest

GOOD = {"instruction": "Add 1 and 2.", "input": "", "output": "3"}
TURNS = [{"from": "human", "value": "1+1?"}, {"from": "assistant", "value": "2"}]


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


# What stands in a line, and what the reason must name

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
    ("round of Thai digits", "coig", {"round_๓": {"response": '{"Q": "a", "A": "b"}'}}, "instruction is missing"),
    ("round of 5000 digits", "coig", {f"round_{'9' * 5000}": {"response": "{}"}}, "instruction is missing"),
    ("round of a list", "coig", {"round_0": {"response": "[]"}}, "round_0.response is a list"),
    ("camel, half", "camel", {"topic;": "x", "message_1": "a"}, "field message_2 is missing"),
    ("dolly, no response", "dolly", {"instruction": "a", "context": "b"}, "field response is missing"),
    ("other side only", "alpaca_bilingual_zh", {"en_instruction": "a", "en_output": "b"}, "zh_instruction is missing"),
    ("byte order mark within", "alpaca", b"\xef\xbb\xbf" + lines(GOOD).strip(), "broken JSON at column 1"),
    ("raw NUL byte", "alpaca", b'{"instruction": "a\x00b", "output": "c"}', "control character"),
    ("NUL between values", "alpaca", b'{"instruction": "a",\x00"output": "c"}', "broken JSON at column"),
    ("overlong UTF-8", "alpaca", b'{"instruction": "\xc0\xaf", "output": "c"}', "not UTF-8"),
    ("Latin-1", "alpaca", '{"instruction": "déjà", "output": "vu"}'.encode("latin-1"), "not UTF-8"),
    ("UTF-16", "alpaca", '{"instruction": "a"}'.encode("utf-16-le"), "broken JSON at column"),
    ("single quotes", "alpaca", b"{'instruction': 'a', 'output': 'c'}", "double quotes"),
    ("trailing comma", "alpaca", b'{"instruction": "a", "output": "c",}', "broken JSON at column"),
    ("a comment", "alpaca", b'{"instruction": "a", /* why */ "output": "c"}', "broken JSON at column 22"),
    ("Python's None", "alpaca", b'{"instruction": "a", "output": None}', "broken JSON at column 32"),
    ("unquoted text", "alpaca", b'{"instruction": a, "output": "c"}', "broken JSON at column 17"),
    ("unclosed text", "alpaca", b'{"instruction": "a, "output": "c"}', "broken JSON at column"),
    ("bad escape", "alpaca", b'{"instruction": "a\\x41", "output": "c"}', "escape"),
    ("old Mac line ends", "alpaca", lines(GOOD).strip() + b"\r" + lines(GOOD).strip(), "broken JSON"),
    ("text after the value", "alpaca", lines(GOOD).strip() + b"\x1a", "broken JSON"),
    ("NaN for text", "alpaca", b'{"instruction": "a", "output": NaN}', "field output is a number"),
    ("Infinity for text", "alpaca", b'{"instruction": -Infinity, "output": "c"}', "field instruction is a number"),
    ("huge float for text", "alpaca", b'{"instruction": "a", "output": 1e999}', "field output is a number"),
    ("key twice", "alpaca", b'{"instruction": "a", "output": "b", "output": "c"}', "key 'output' stands twice"),
    ("same value twice", "alpaca", b'{"instruction": "a", "instruction": "a", "output": "c"}', "stands twice"),
    ("object for text", "alpaca", {"instruction": {"text": "a"}, "output": "c"}, "field instruction is an object"),
    ("mistyped category", "alpaca", {"instruction": "a", "output": "c", "category": 5}, "field category is a number"),
    ("NUL in the reply", "alpaca", {"instruction": "a", "output": "c\0"}, "NUL character in the reply"),
    ("other case of keys", "alpaca", {"Instruction": "a", "Output": "c"}, "field instruction is missing"),
    ("dialogue an object", "belle", {"conversations": {"human": "a"}}, "field conversations is an object, not a list"),
    ("two assistants", "belle", {"conversations": [*TURNS, TURNS[1]]}, "turn 3 is of the assistant"),
    (
        "system within",
        "belle",
        {"conversations": [TURNS[0], {"from": "system", "value": "x"}, TURNS[1]]},
        "turn 2 is of",
    ),
    ("null turn", "belle", {"conversations": [{"from": "human", "value": None}, TURNS[1]]}, "[0].value is null"),
    ("number for a role", "belle", {"conversations": [{"from": 1, "value": "a"}, TURNS[1]]}, "[0].from is a number"),
    ("turn of no role", "belle", {"conversations": [{"value": "a"}, TURNS[1]]}, "conversations[0].from is missing"),
    ("empty last turn", "belle", {"conversations": [TURNS[0], {"from": "assistant", "value": ""}]}, "empty reply"),
    (
        "key twice in a turn",
        "belle",
        b'{"conversations": [{"from": "human", "value": "a", "value": "b"}, {"from": "assistant", "value": "c"}]}',
        "key 'value' stands twice",
    ),
    ("null dialogue", "school_math", {"conversation": None}, "field conversation is null, not a list"),
    ("exam without question", "coig", {"textbox_answer": "b"}, "empty prompt"),
    ("translated, null", "coig", {"trans_instruction": None, "trans_output": "c"}, "trans_instruction is null"),
    ("round with Q twice", "coig", {"round_0": {"response": '{"Q": "a", "Q": "b", "A": "c"}'}}, "key 'Q' stands twice"),
    ("camel, null", "camel", {"message_1": "a", "message_2": None}, "field message_2 is null"),
    (
        "dolly, mistyped context",
        "dolly",
        {"instruction": "a", "context": 1, "response": "b"},
        "field context is a number",
    ),
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
    assert len({kind for kind, *_ in MALFORMED}) == len(MALFORMED) >= 80


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


# --- damage to what the objects lie in: file, its bytes, its format, and the rejections (file, line, words)


def tar_gz(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet(columns: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def array(*items: Any) -> bytes:
    return b"[\n" + b",\n".join(lines(item).strip() for item in items) + b"\n]"


NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
)
TWO_MEMBERS = tar_gz({"a.jsonl": lines(GOOD), "b.jsonl": lines(GOOD)}, "w:")


def cut_gzip(data: bytes, size: int) -> bytes:
    """The beginning of a gzip file, of which `size` bytes can be unpacked."""
    packer = zlib.compressobj(wbits=31)
    return packer.compress(data[:size]) + packer.flush(zlib.Z_FULL_FLUSH)


DAMAGED: dict[str, tuple[bytes, list[tuple[str, int, str]]]] = {
    "crlf.jsonl": (lines(GOOD, b"{broken").replace(b"\n", b"\r\n"), [("", 2, "broken JSON at column 2")]),
    "bom.jsonl": (b"\xef\xbb\xbf" + lines(GOOD, 5), [("", 2, "not an object")]),
    "no_last_newline.jsonl": (lines(GOOD, {}).rstrip(), [("", 2, "field instruction is missing")]),
    "cut.jsonl": (lines(GOOD, GOOD)[:-20], [("", 2, "broken JSON")]),
    "cut.json": (array(GOOD, GOOD)[:-10], [("", 2, "rest of the file can't be read: broken JSON on line 3")]),
    "comma.json": (array(GOOD) + b",", [("", 2, "text after the end of the JSON array, on line 3")]),
    "two_arrays.json": (array(GOOD) + b"\n" + array(GOOD), [("", 2, "text after the end of the JSON array")]),
    "hole.json": (b"[" + lines(GOOD) + b",,\n" + lines(GOOD) + b"]", [("", 2, "broken JSON on line 2")]),
    "twice.json": (array(GOOD, b'{"output": "a", "output": "b"}', GOOD), [("", 2, "key 'output' stands twice")]),
    "bytes.json": (array(GOOD, b'{"instruction": "\xff", "output": "b"}', GOOD), [("", 2, "not UTF-8")]),
    "cut_pretty.json": (b'{\n"instruction": "a",\n"output": "b"\n}\n{\n"instr', [("", 2, "broken JSON on line 6")]),
    "cut.jsonl.gz": (gzip.compress(lines(*[GOOD] * 3))[:-6], [("", 4, "damaged gzip data")]),
    "junk_after.jsonl.gz": (gzip.compress(lines(GOOD)) + b"junk", [("", 2, "damaged gzip data")]),
    "flipped.jsonl.gz": (gzip.compress(lines(GOOD))[:-8] + bytes(8), [("", 2, "damaged gzip data")]),
    "frame.jsonl.zst": (zstandard.compress(lines(GOOD)) + zstandard.compress(lines(GOOD))[:-5], [("", 2, "cut off")]),
    "junk_after.jsonl.zst": (zstandard.compress(lines(GOOD)) + b"junk", [("", 2, "damaged zstd data")]),
    # A tar archive of two members of one line: headers at 0 and 1024, its end at 2048.
    "cut_at_member.tar": (TWO_MEMBERS[:1024], [("/a.jsonl", 2, "empty header where a member")]),
    "cut_in_header.tar": (TWO_MEMBERS[:1200], [("/a.jsonl", 2, "truncated header where a member")]),
    "header.tar": (TWO_MEMBERS[:1024] + b"x" + TWO_MEMBERS[1025:], [("/a.jsonl", 2, "bad checksum where a member")]),
    "no_end.tar": (TWO_MEMBERS[:2048], [("/b.jsonl", 2, "or the archive's end should be")]),
    "cut_in_header.tar.gz": (cut_gzip(TWO_MEMBERS, 1100), [("/a.jsonl", 2, "damaged tar archive")]),
    "checksum.tar.gz": (gzip.compress(TWO_MEMBERS)[:-8] + bytes(8), [("/b.jsonl", 2, "damaged tar archive: CRC")]),
    "cut_at_member.tar.zst": (
        zstandard.compress(TWO_MEMBERS[:1024]) + b"\x28\xb5\x2f\xfd",
        [("/a.jsonl", 2, "it is cut off")],
    ),
    "tar_within.tar": (
        tar_gz({"a.jsonl": lines(GOOD), "b.tar": TWO_MEMBERS}, "w:"),
        [("/b.tar", 1, "it is a tar archive: unpack it")],
    ),
    "short.csv": (b"instruction,input,output\na,b,c\nd,e\nf,g,h\n", [("", 3, "2 cells under a header of 3 columns")]),
    "long.csv": (b"instruction,output\na,b\nc,d,e\n", [("", 3, "3 cells under a header of 2 columns")]),
    "quote.csv": (b'instruction,output\na,b\n"c,d\n', [("", 3, "broken CSV")]),
    "quote_within.csv": (b'instruction,output\na,b\n"c"x,d\ne,f\n', [("", 3, "broken CSV")]),
    "bytes.csv": (b"instruction,output\na,b\nc,\xff\ne,f\n", [("", 3, "not UTF-8")]),
    "nul.csv": (b"instruction,output\na,b\nc,\0\ne,f\n", [("", 3, "")]),
    "empty_cell.csv": (b"instruction,output\na,b\nc,\n", [("", 3, "empty reply")]),
    "foreign.csv": (b"prompt,answer\na,b\n", [("", 2, "field instruction is missing")]),
    "semicolons.csv": (b"instruction;output\na;b\n", [("", 2, "field instruction is missing")]),
    "foreign.parquet": (parquet({"text": ["a", "b"]}), [("", n, "field instruction is missing") for n in (1, 2)]),
    "null.parquet": (parquet({"instruction": ["a", "b"], "output": ["c", None]}), [("", 2, "field output is null")]),
    "typed.parquet": (parquet({"instruction": ["a"], "output": [1.5]}), [("", 1, "field output is a number")]),
    "bytes.parquet": (parquet({"instruction": NOT_UTF8, "output": ["b", "c"]}), [("", 2, "not UTF-8")]),
    "binary.parquet": (parquet({"instruction": [b"a"], "output": ["b"]}), [("", 1, "field instruction is bytes")]),
    "members.tar.gz": (
        tar_gz(
            {
                "a.jsonl": lines(GOOD, 5),
                "b.jsonl": b"",
                "c.json": b"junk",
                "d.jsonl.gz": b"no gzip",
                "e.json": array(GOOD),
            }
        ),
        [
            ("/a.jsonl", 2, "not an object"),
            ("/b.jsonl", 1, "it is empty"),
            ("/c.json", 1, "broken JSON"),
            ("/d.jsonl.gz", 1, "damaged gzip data"),
        ],
    ),
}


def damaged(name: str) -> list[tuple[str, int, str]]:
    return [(name + member, line, words) for member, line, words in DAMAGED[name][1]]


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_container(tmp_path: Path, name: str) -> None:
    found = [item for item in read(write(tmp_path, name, DAMAGED[name][0])) if isinstance(item, Rejection)]
    assert [(item.file, item.line) for item in found] == [(file, line) for file, line, _ in damaged(name)]
    assert all(words in item.reason for item, (_, _, words) in zip(found, damaged(name), strict=True))


@pytest.mark.parametrize(("name", "least"), [("a.jsonl.zst", 1), ("a.tar.gz", 1)])
def test_cut_archive(tmp_path: Path, name: str, least: int) -> None:
    """Of what a cut block holds nobody knows how many lines are whole; the last rejection is the one after them."""
    many = lines(*[GOOD | {"output": random.Random(i).randbytes(40).hex()} for i in range(9000)])
    packed = zstandard.compress(many) if name.endswith("zst") else tar_gz({"a.jsonl": many})
    found = read(write(tmp_path, name, packed[: len(packed) * 2 // 3]))
    rejected = [item for item in found if isinstance(item, Rejection)]
    assert least <= len(rejected) <= 2 and rejected[-1] == found[-1]
    assert rejected[0].line == sum(isinstance(item, Record) for item in found) + 1


def test_collect_accounts_for_every_kind(tmp_path: Path) -> None:
    """All kinds in one run: the table `rejected` has each once, with its file and line, and the balance holds."""
    wanted, sources = [], []
    for format in GOOD_OF:
        bad = [(item, reason) for _, kind, item, reason in MALFORMED if kind == format]
        data = lines(*[row for item, _ in bad for row in (GOOD_OF[format], item)])
        path = write(tmp_path, f"{format}.jsonl", data)
        wanted += [(format, path.name, 2 * i + 2, reason) for i, (_, reason) in enumerate(bad)]
        sources.append({"name": format, "format": format, "path": str(path)})
    for name, (data, _) in DAMAGED.items():
        path = write(tmp_path, f"damaged/{name}", data)
        wanted += [(name, file, line, words) for file, line, words in damaged(name)]
        sources.append({"name": name, "format": "alpaca", "path": str(path)})
    recipe = load_recipe(None, [f"collect.sources={json.dumps(sources)}"])
    pipeline.run_stage(Job("collect", recipe, tmp_path, tmp_path / "out", {}))
    rejected = pq.read_table(tmp_path / "out" / "rejected").to_pylist()
    assert [(row["source"], row["file"], row["line"]) for row in rejected] == [row[:3] for row in wanted]
    assert all(words in row["reason"] for row, (*_, words) in zip(rejected, wanted, strict=True))
    counts = read_manifest(tmp_path / "out")["counts"]
    assert counts["rejected"] == len(wanted) >= 100
    assert counts["rows_in"] == counts["out"] + counts["rejected"]
