"""`slmfast dedup` on tables in files: what stays and what goes, and whose values survive."""

import csv
import fcntl
import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import zstandard

from slmfast import dedup, json_tables, store, table_files
from slmfast.cli import main
from slmfast.dedup_files import dedup_files
from slmfast.errors import UserError

TEXTS = [
    "How are you today, my friend?",
    "how are you today, my friend?",
    "今天天气很好，我们去公园散步吧",
    "other words",
    None,
    "今天天气很好，我们去公园散步吧",
]


def write(path: Path, rows: list[dict], kind: str | None = None) -> Path:
    """Writes rows in the format that the file's name says."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if name.endswith(".csv"):
        sink = pa.BufferOutputStream()
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), sink)
        data = sink.getvalue().to_pybytes()
    elif name.endswith(".json"):
        data = json.dumps(rows, indent=1).encode()
    else:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def kept(output: Path) -> list[dict]:
    return pq.read_table(output / "kept").to_pylist()


def outcome(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.strip()


@pytest.mark.parametrize(
    "name", ["t.parquet", "t.jsonl", "t.JSON", "t.json", "t.csv", "t.jsonl.gz", "t.json.zst", "t.csv.gz", "t.csv.zst"]
)
def test_every_format_gives_the_same_rows(name, capsys, tmp_path):
    rows = [{"n": n, "text": text} for n, text in enumerate(TEXTS)]
    path = write(tmp_path / name, rows)
    code, out, error = outcome(capsys, "dedup", path, "--column", "text", "-o", tmp_path / "out")
    assert (code, error) == (0, "")
    assert out == f"6 rows in = 4 kept + 2 dropped: {tmp_path / 'out'}\n"
    n = str if ".csv" in name else int  # a CSV file's values stay the texts that they are
    assert [row["n"] for row in kept(tmp_path / "out")] == list(map(n, [0, 2, 3, 4]))
    null = "" if ".csv" in name else None
    assert [row["text"] for row in kept(tmp_path / "out")] == [*(TEXTS[i] for i in (0, 2, 3)), null]
    where = {"file": str(path), "duplicate_of_file": str(path)}
    assert pq.read_table(tmp_path / "out" / "dropped.parquet").to_pylist() == [
        {**where, "file_row": i, "row": i, "duplicate_of_file_row": j, "duplicate_of": j, "distance": 0}
        for i, j in ((1, 0), (5, 2))
    ]


def test_a_full_folder_and_a_wrong_column_are_refused(capsys, tmp_path):
    path = write(tmp_path / "t.jsonl", [{"n": 1, "text": "a"}])
    (tmp_path / "out").mkdir()  # an empty one is taken
    assert outcome(capsys, "dedup", path, "--column", "text", "-o", tmp_path / "out")[0] == 0
    code, _, error = outcome(capsys, "dedup", path, "--column", "text", "-o", tmp_path / "out")
    assert code == 2
    assert "give a new folder with -o" in error
    code, _, error = outcome(capsys, "dedup", path, "--column", "txt", "-o", tmp_path / "new")
    assert code == 2
    assert f"{path} has no column txt: --column takes one of n, text" in error


def family(rng: random.Random, count: int) -> list[str]:
    bases = [" ".join(rng.randbytes(2).hex() for _ in range(12)) for _ in range(count // 2)]
    return [rng.choice(bases) + rng.choice(["", ".", " now"]) for _ in range(count)]


def test_files_in_the_order_given_are_one_table(tmp_path, monkeypatch):
    """Against slmfast.dedup of all texts in one list; the order of the inputs is the order of priority."""
    monkeypatch.setattr(json_tables, "BLOCK_BYTES", 700)
    monkeypatch.chdir(tmp_path)
    rng = random.Random(2)
    Path("folder").mkdir()
    names = ["z.jsonl", "folder/10.parquet", "folder/11.csv", "folder/12.jsonl", "b1.json", "b2.json", "a.csv.gz"]
    pool = family(rng, 200)
    texts = {name: rng.sample(pool, rng.randint(10, 40)) for name in names}
    for name in names:
        write(Path(name), [{"id": f"{name}{i}", "text": text} for i, text in enumerate(texts[name])])
    Path("folder/.hidden.csv").write_text("no table")
    Path("folder/README.md").write_text("no table")
    inputs = [Path(name) for name in ("z.jsonl", "folder", "b?.json", "*.gz", "z.jsonl")]  # the last is there already
    settings = {"k": 5, "verify": 0.6, "mode": "components", "ngram": 4}
    counts = dedup_files(inputs, "text", Path("out"), **settings, threads=2)
    places = [(name, i) for name in names for i in range(len(texts[name]))]
    expected = dedup([texts[name][i] for name, i in places], **settings)
    assert (counts.kept, counts.dropped) == (expected.n_kept, len(places) - expected.n_kept)
    assert counts.dropped > 50 < counts.kept
    assert [row["id"] for row in kept(Path("out"))] == [
        f"{name}{i}" for (name, i), keep in zip(places, expected.keep, strict=True) if keep
    ]
    dropped = pq.read_table("out/dropped.parquet").to_pylist()
    assert [row["row"] for row in dropped] == (~expected.keep).nonzero()[0].tolist()
    for row in dropped:
        assert (row["file"], row["file_row"]) == places[row["row"]]
        assert row["duplicate_of"] == expected.duplicate_of[row["row"]]
        assert (row["duplicate_of_file"], row["duplicate_of_file_row"]) == places[row["duplicate_of"]]
        assert row["distance"] == expected.distance[row["row"]]


def test_csv_values_survive(tmp_path):
    (tmp_path / "t.csv").write_bytes(
        b'\xef\xbb\xbfid,text,note\r\n007,"two\r\nlines, ""quoted""",NA\r\n1e5,NA,\r\n,5" pipe,2020-01-01\r\n'
    )
    dedup_files([tmp_path / "t.csv"], "text", tmp_path / "out")
    assert kept(tmp_path / "out") == [
        {"id": "007", "text": 'two\r\nlines, "quoted"', "note": "NA"},
        {"id": "1e5", "text": "NA", "note": ""},
        {"id": "", "text": '5" pipe', "note": "2020-01-01"},
    ]


def test_csv_of_one_column_keeps_empty_lines_as_rows(tmp_path):
    """As its writers mean them: Arrow's own writes a null so."""
    texts = ["one", "", "two", "one", ""]
    for number, end in enumerate(("\n", "\r\n")):
        (tmp_path / f"{number}.csv").write_text(end.join(["text", *texts, ""]), newline="")
        dedup_files([tmp_path / f"{number}.csv"], "text", tmp_path / f"out{number}")
        assert [row["text"] for row in kept(tmp_path / f"out{number}")] == ["one", "", "two", ""]
        assert pq.read_table(tmp_path / f"out{number}" / "dropped.parquet")["file_row"].to_pylist() == [3]


def test_csv_rows_are_those_of_pythons_own_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "_CSV_BLOCKS", (60, 50_000))
    rng = random.Random(12)
    alphabet = ["a", "b", "0", " ", ",", '"', "\n", "\r\n", "好", "NULL", "'", "\t"]
    for number in range(20):
        names = ["id", "te,xt", 'say "hi"']
        rows = [["".join(rng.choices(alphabet, k=rng.randrange(9))) for _ in names] for _ in range(40)]
        rows = [[str(i), text + rng.randbytes(8).hex(), other] for i, (_, text, other) in enumerate(rows)]
        path = tmp_path / f"{number}.csv"
        with path.open("w", newline="") as file:
            csv.writer(file, quoting=rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])).writerows([names, *rows])
        limit = csv.field_size_limit()
        dedup_files([path], "te,xt", tmp_path / f"out{number}", verify=1.0)
        assert csv.field_size_limit() == limit
        assert [list(row.values()) for row in kept(tmp_path / f"out{number}")] == rows


def test_rows_larger_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "_CSV_BLOCKS", (200, 5000, 50_000))
    monkeypatch.setattr(json_tables, "BLOCK_BYTES", 200)
    rng = random.Random(9)
    rows = [{"id": str(i), "text": rng.randbytes(rng.choice([5, 20, 90, 4000])).hex()} for i in range(120)]
    for name in ("t.csv", "t.jsonl", "t.json"):
        write(tmp_path / name, rows)
        dedup_files([tmp_path / name], "text", tmp_path / name.upper())
        assert kept(tmp_path / name.upper()) == rows
    rows[60]["text"] = "x" * 200_000
    write(tmp_path / "t.csv", rows)
    with pytest.raises(UserError, match=r"t.csv is not readable as CSV: a row of more than 0 MiB"):
        dedup_files([tmp_path / "t.csv"], "text", tmp_path / "out")


def random_value(rng: random.Random, depth: int = 0):
    """A JSON value by column: nulls, integers that floats hold too, floats, times, lists and objects."""
    objects = {"a": rng.choice([None, 3, 4.5]), "when": rng.choice(["2020-01-01", "soon", None])}
    return {
        "number": rng.choice([None, rng.randrange(1 << 50), rng.randrange(100) / 8]),
        "late": rng.choice([None] * 40 + [7]),
        "when": rng.choice(["2020-01-01", "2020-01-01T10:00:00Z", "tomorrow"]) if rng.random() < 0.1 else "2021-05-05",
        "flag": rng.random() < 0.5,
        "list": [rng.choice([1, 2.5, None]) for _ in range(rng.randrange(3))],
        "object": {name: value for name, value in objects.items() if rng.random() < 0.5} or None,
        "turns": [dict(objects) for _ in range(rng.randrange(3))],
    }


def whole(value, like):
    """A value as a table shows it: names that an object lacks are null."""
    if isinstance(like, dict) and isinstance(value, dict):
        return {name: whole(value.get(name), part) for name, part in like.items()}
    if isinstance(value, list) and isinstance(like, list):
        return [whole(part, other) for part, other in zip(value, like, strict=True)]
    return value


@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_json_values_survive_whatever_the_blocks_hold(name, tmp_path, monkeypatch):
    monkeypatch.setattr(json_tables, "BLOCK_BYTES", 600)
    rng = random.Random(4)
    rows = []
    for i in range(300):
        row = {name: value for name, value in random_value(rng).items() if rng.random() < 0.7}
        rows.append({"text": f"{i * i} {rng.random()}", **row})
    path = write(tmp_path / name, rows)
    dedup_files([path], "text", tmp_path / "out", verify=1.0)
    result = kept(tmp_path / "out")
    assert len(result) == len(rows)
    assert set(result[0]) == {"text", *random_value(rng)}
    for row, got in zip(rows, result, strict=True):
        assert got == whole(row, got)
        assert all(got[name] is None for name in got.keys() - row.keys())


@pytest.mark.parametrize("data", ['{"text": "好"}\r\n\r\n{"text": "b"}', ' [{"text": "好"},\n{"text": "b"}]\n'])
def test_json_with_a_byte_order_mark_and_without(data, tmp_path):
    for number, encoding in enumerate(("utf-8", "utf-8-sig")):
        (tmp_path / "t.json").write_text(data, encoding=encoding, newline="")
        dedup_files([tmp_path / "t.json"], "text", tmp_path / f"out{number}")
        assert kept(tmp_path / f"out{number}") == [{"text": "好"}, {"text": "b"}]


def test_files_without_rows_count_nothing(tmp_path):
    for name, data in (("a.csv", b"text\n"), ("a2.csv", b"text"), ("a3.csv", b"\xef\xbb\xbftext"), ("c.jsonl", b"\n")):
        (tmp_path / name).write_bytes(data)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "b.parquet")
    dedup_files([tmp_path], "text", tmp_path / "none")
    assert kept(tmp_path / "none") == pq.read_table(tmp_path / "none" / "dropped.parquet").to_pylist() == []
    (tmp_path / "d.jsonl").write_text('{"text": "one"}\n{"text": "one"}\n')
    dedup_files([tmp_path], "text", tmp_path / "one")
    assert kept(tmp_path / "one") == [{"text": "one"}]
    dropped = pq.read_table(tmp_path / "one" / "dropped.parquet").to_pylist()
    assert [(row["file"], row["file_row"], row["row"]) for row in dropped] == [(str(tmp_path / "d.jsonl"), 1, 1)]


def test_parquet_types_are_brought_together_without_loss(tmp_path):
    one = pa.table({"text": pa.array(["a", "b"]), "n": pa.array([1, 2], pa.int32()), "x": pa.nulls(2)})
    two = pa.table(
        {
            "n": pa.array([2**40]),
            "text": pa.array(["c"], pa.large_string()).dictionary_encode(),
            "x": pa.array([[1.5]]),
        }
    )
    for i, table in enumerate((one, two)):
        pq.write_table(table, tmp_path / f"{i}.parquet")
    dedup_files([tmp_path], "text", tmp_path / "out")
    assert kept(tmp_path / "out") == [
        {"text": "a", "n": 1, "x": None},
        {"text": "b", "n": 2, "x": None},
        {"text": "c", "n": 2**40, "x": [1.5]},
    ]


def test_parquet_columns_of_every_kind_are_written_in_small_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BYTES_PER_SHARD", 100_000)
    rng = random.Random(1)
    data = [rng.randbytes(1000) for _ in range(1000)]
    texts = pa.array([blob[:30].hex() for blob in data])
    table = pa.table(
        {
            "a.b": texts,
            "blob": data,
            "view": texts.cast(pa.string_view()),
            "lists": pa.array([[1.5, None], [], None, [2.5]] * 250, pa.large_list(pa.float32())),
            "when": pa.array(range(1000), pa.timestamp("us", "UTC")),
            "price": pa.array([None, 5] * 500, pa.int64()).cast(pa.decimal128(22, 2)),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=300)
    dedup_files([tmp_path / "t.parquet"], "a.b", tmp_path / "out", verify=1.0)
    assert kept(tmp_path / "out") == table.to_pylist()
    assert len(list((tmp_path / "out" / "kept").iterdir())) > 5


def test_json_beside_parquet_takes_its_layouts(tmp_path):
    """Arrow's JSON reader knows none of these types; the values are the same in any of them."""
    view = pa.string_view()
    columns = {
        "tags": pa.array([["x"]], pa.large_list(pa.large_string())),
        "pair": pa.array([[1, 2]], pa.list_(pa.int32(), 2)),
        "views": pa.array([["x"]], pa.list_(view)),
        "object": pa.array([{"a": "x", "b": 1}], pa.struct([("a", view), ("b", pa.int8())])),
        "key": pa.array([b"abc"], pa.binary(3)),
        "map": pa.array([[("k", "v")]], pa.map_(pa.string(), view)),
        "nested": pa.array([["x"]], pa.list_(pa.string())).cast(pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        "uuid": pa.array([bytes(16)], pa.uuid()),
    }
    pq.write_table(pa.table({"text": ["a"], **columns}), tmp_path / "0.parquet")
    like = {"tags": ["y", "z"], "pair": [3, 4], "views": ["y"], "object": {"b": 5, "a": "y"}, "nested": ["y", None]}
    write(tmp_path / "1.jsonl", [{"text": "b", **like}, {"text": "c", "key": None}])
    dedup_files([tmp_path], "text", tmp_path / "out")
    first, second, third = kept(tmp_path / "out")
    assert first == {"text": "a"} | {name: column.to_pylist()[0] for name, column in columns.items()}
    assert second == {"text": "b"} | dict.fromkeys(columns) | like
    assert third == {"text": "c"} | dict.fromkeys(columns)


def test_json_array_values_are_read_like_lines(tmp_path):
    """Numbers keep their digits, and escaped names are names."""
    rows = '{"te\\u0078t": null, "n":\r\n 0.1, "i": 9007199254740993, "s": "a\\nb"}'
    for name, data in (("t.json", f"[{rows}]"), ("t.jsonl", rows.replace("\r\n", ""))):
        (tmp_path / name).write_text(data, newline="")
        dedup_files([tmp_path / name], "text", tmp_path / f"out.{name}")
        assert kept(tmp_path / f"out.{name}") == [{"text": None, "n": 0.1, "i": 9007199254740993, "s": "a\nb"}]


@pytest.mark.parametrize("count", [11, 10])
def test_a_file_that_changes_meanwhile_is_noticed(count, tmp_path, monkeypatch):
    path = write(tmp_path / "t.jsonl", [{"text": str(i) * 9} for i in range(10)])
    original = table_files.JsonTable.rows

    def rows(self, schema):
        write(path, [{"text": f"other {i}"} for i in range(count)])
        return original(self, schema)

    monkeypatch.setattr(table_files.JsonTable, "rows", rows)
    with pytest.raises(UserError, match=r"t.jsonl changed while it was read"):
        dedup_files([path], "text", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_large_cluster_is_told_once(capsys, tmp_path, recwarn):
    rows = [{"text": f"{i * 7919} number {i * i} and {i**3}"} for i in range(100)] + [{"text": "a template"}] * 11
    path = write(tmp_path / "t.jsonl", rows)
    _, out, error = outcome(capsys, "dedup", path, "--column", "text", "-o", tmp_path / "out")
    alarm, counts = out.splitlines()
    assert alarm.startswith(f"dedup: row 100 of {path} stands for 11 of 111 rows (9.9%)")
    assert counts.startswith("111 rows in = 101 kept + 10 dropped")
    assert (error, list(recwarn)) == ("", [])


def test_an_interrupt_says_that_nothing_is_written(capsys, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    path = write(tmp_path / "t.jsonl", [{"text": "a"}])
    monkeypatch.setattr(table_files.JsonTable, "rows", interrupt)
    code, _, error = outcome(capsys, "dedup", path, "--column", "text", "-o", tmp_path / "out")
    assert (code, error) == (130, "slmfast: interrupted; nothing is written")
    assert list(tmp_path.iterdir()) == [path]


def test_two_runs_do_not_share_an_output(tmp_path):
    table = tmp_path / "in.jsonl"
    table.write_text("".join(f'{{"text": "row {i} of many different texts"}}\n' for i in range(50)), encoding="utf-8")
    with (tmp_path / ".out.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being written by another run"):
            dedup_files([table], "text", tmp_path / "out")
    dedup_files([table], "text", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out"]


def test_a_folder_of_folders_says_how_to_name_their_files(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "b.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(UserError, match=r"in/\*\*/\*\.jsonl"):
        dedup_files([tmp_path / "in"], "text", tmp_path / "none")
    dedup_files([tmp_path / "in" / "**" / "*.jsonl"], "text", tmp_path / "out")
    assert kept(tmp_path / "out") == [{"text": "one"}]
