"""JSON streams and every container: what is inside comes out, and damage costs no more than it must."""

import csv
import gzip
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from slmfast.errors import UserError
from slmfast.readers import Record, Rejection, containers, read_source
from slmfast.readers.json_stream import Broken, read_array, read_lines, read_values

GOOD = {"instruction": "Add 1 and 2.", "input": "", "output": "3"}
TURNS = [{"from": "human", "value": "1+1?"}, {"from": "assistant", "value": "2"}]
ROUNDS = {f"round_{i}": {"response": json.dumps({"Q": f"q{i}", "A": f"a{i}"})} for i in range(3)}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def lines(*items: Any) -> bytes:
    return b"".join(json.dumps(item, ensure_ascii=False).encode() + b"\n" for item in items)


def read(path: Path, format: str = "alpaca") -> list[Record | Rejection]:
    return list(read_source("test", format, path))


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


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


def test_endless_line_costs_only_itself() -> None:
    stream = io.BytesIO(b'{"a": 1}\n"' + b"x" * 1000 + b'"\n{"b": 2}\n')
    values = list(read_lines(stream, max_bytes=64))
    assert [number for number, _ in values] == [1, 2, 3]
    assert values[0][1] == {"a": 1} and values[2][1] == {"b": 2} and "more than 64 bytes" in values[1][1].reason


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


def tar_gz(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet(items: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(items), buffer, row_group_size=3)
    return buffer.getvalue()


def parquet_of(names: list[str], columns: list[list[str]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(list(map(pa.array, columns)), names=names), buffer)
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
    "plain.tar": tar_gz({"a.jsonl": JSON_LINES}, "w:"),
    "one.tar.zst": zstandard.compress(tar_gz({"a.jsonl": JSON_LINES}, "w:")),
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


def test_an_endless_csv_line_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.csv", b"instruction,output\na,b\nc," + b"x" * 1000 + b"\nd,e\n")
    monkeypatch.setattr(containers, "MAX_VALUE_BYTES", 64)
    before, rejection = read(path)
    assert isinstance(before, Record) and rejection.line == 3
    assert rejection.reason == "the rest of the file can't be read: line of more than 64 characters"


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
    "tar_within.jsonl.gz": tar_gz({"a.jsonl": JSON_LINES}),
    "two_columns.parquet": parquet_of(["instruction", "output", "output"], [["a"], ["b"], ["c"]]),
    "bzip.json.bz2": b"BZh91AY&SY" + bytes(40),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_file(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, UNREADABLE[name])
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    remedy = "leave it out" if name.startswith(("empty", "blank")) else "give UTF-8 JSON"
    assert name in message and remedy in message and "\n" not in message


def test_file_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.jsonl", JSON_LINES)

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a\.jsonl.*Permission denied.*permissions"):
        read(path)


def test_empty_array_is_no_error(tmp_path: Path) -> None:
    assert read(write(tmp_path, "a.json", b" [ ] ")) == []
