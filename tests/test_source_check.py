"""The dry run counts what collect would reject, and writes nothing."""

import gzip
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slmfast.cli import main
from slmfast.miniature.world import write_world
from slmfast.readers import without_places

GOOD = {"instruction": "Add 1 and 2.", "input": "", "output": "3"}


def lines(*items):
    return b"".join((item if isinstance(item, bytes) else json.dumps(item).encode()) + b"\n" for item in items)


def check(capsys, *arguments):
    code = main(["collect", "--check", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def test_good_files_give_code_0_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD, GOOD))
    code, out, _ = check(capsys, tmp_path / "a.jsonl", "--format", "alpaca")
    assert code == 0
    assert out == [f"source: {tmp_path / 'a.jsonl'}: 2 records, no problems", "1 file: 2 records, no problems"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_problems_are_told_by_file_and_line_and_all_counted(tmp_path, capsys):
    bad = [b'{"instruction": "a"', b"hello", {"instruction": "a"}, {"instruction": 3, "output": "b"}]
    (tmp_path / "a.jsonl").write_bytes(lines(GOOD, b"", *bad, *[{"instruction": "a"}] * 7))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(GOOD, {"output": "b"})))
    code, out, _ = check(capsys, tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", "--format", "alpaca", "--show", 3)
    assert code == 1
    assert out == [
        f"source: {tmp_path / 'a.jsonl'}: 1 record, 11 problems",
        "  line 3: broken JSON at column 20: Expecting ',' delimiter",
        "  line 4: broken JSON at column 1: Expecting value",
        "  line 5: field output is missing",
        "  and 8 more",
        f"source: {tmp_path / 'b.jsonl.gz'}: 1 record, 1 problem",
        "  line 2: field instruction is missing",
        "",
        "         8  field output is missing",
        "         1  broken JSON at column …: Expecting ',' delimiter",
        "         1  broken JSON at column …: Expecting value",
        "         1  field instruction is a number, not text",
        "         1  field instruction is missing",
        "2 files: 2 records, 12 problems",
    ]


def test_an_unreadable_file_does_not_end_the_check(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b"prose\n")
    (tmp_path / "b.jsonl").write_bytes(lines(GOOD))
    code, out, _ = check(capsys, tmp_path / "*.jsonl", "--format", "alpaca")
    assert code == 1
    assert "nothing of" in " ".join(out) and out[-1] == "2 files: 1 record, 1 problem"


def test_elements_rows_and_empty_files_are_called_so(tmp_path, capsys):
    array = json.dumps([GOOD, "words", None, GOOD])
    (tmp_path / "a.json").write_text(array[:-40])
    pq.write_table(pa.table({"instruction": ["a", "b"], "output": ["c", None]}), tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text("")
    _, out, _ = check(capsys, tmp_path / "*", "--format", "alpaca")
    assert out[1:4] == [
        "  element 2: the JSON value is text, not an object",
        "  element 3: the JSON value is null, not an object",
        "  element 4: the rest of the file can't be read: broken JSON on line 1: Unterminated string",
    ]
    assert out[5] == "  row 2: field output is null, not text"
    assert out[7] == f"  {tmp_path / 'c.jsonl'} is empty: give a file with records, or leave it out"


def test_an_interrupted_check_does_not_promise_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    (tmp_path / "a.jsonl").write_bytes(lines(GOOD))
    monkeypatch.setattr("slmfast.source_check.check_sources", interrupt)
    code, _, error = check(capsys, tmp_path / "a.jsonl", "--format", "alpaca")
    assert code == 130 and "nothing is written" in error and "goes on" not in error


def test_a_recipes_sources_are_checked_as_collect_would_read_them(tmp_path, capsys):
    write_world(tmp_path / "raw", size=400, seed=2)
    recipe = tmp_path / "r.yaml"
    sources = "\n".join(
        f"    - {{name: {name}, format: {format}, path: '{tmp_path}/raw/{path}'}}"
        for name, format, path in (
            ("dolly", "dolly", "dolly/*.jsonl"),
            ("coig", "coig", "coig/*"),
            ("belle", "belle", "belle/train_3.5M_CN*"),
        )
    )
    recipe.write_text(f"collect:\n  sources:\n{sources}\n")
    code, out, _ = check(capsys, "--recipe", recipe, "--show", "0")
    assert main(["collect", "--recipe", str(recipe), "-o", str(tmp_path / "out")]) == 0
    rejected = pq.read_table(tmp_path / "out" / "rejected").to_pylist()
    records = pq.read_metadata(tmp_path / "out" / "records" / "part-00000.parquet").num_rows
    assert rejected and code == 1
    assert out[-1].endswith(f"files: {records:,} records, {len(rejected):,} problems")
    told = {line[12:]: int(line[:10]) for line in out if line[:10].strip().isdigit()}
    assert told == Counter(without_places(row["reason"]) for row in rejected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--check"], "nothing to collect"),
        (["--check", "x.json"], "--format is missing"),
        (["--check", "x.json", "--format", "alpacca"], "did you mean alpaca"),
        (["--check", "x.json", "--format", "alpaca"], "no file matches x.json"),
        (["x.json", "--format", "alpaca"], "-o is missing"),
    ],
)
def test_user_errors(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["collect", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error and len(error.splitlines()) == 1
