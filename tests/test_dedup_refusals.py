"""`slmfast dedup` on tables in files: what is refused, each in one line that names the file."""

import gzip
import random
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slmfast import json_tables
from slmfast.cli import main
from slmfast.dedup_files import dedup_files
from slmfast.errors import UserError

D, DECIMAL = Decimal("12345678901234567890.12"), pa.decimal128(22, 2)

BROKEN_FILES = {
    "syntax.jsonl": (b'{"text":"a"}\n\n{"text":"b"\n{"text":"c"}\n', "line 3: not one whole object on this line"),
    "late.jsonl": (b'{"text":"a"}\n' * 200 + b"{]\n", "line 201: "),
    "list.jsonl": (b'{"text":"a"}\n[1]\n', "line 2: not one whole object on this line"),
    "number.jsonl": (b'{"text":"a"}\n{"text":5}\n', "line 2: Column(/text) changed from string to number"),
    "mixed.jsonl": (b'{"text":"a","n":1}\n{"text":"b","n":"x"}\n', "line 2: Column(/n) changed from number to string"),
    "apart.jsonl": (
        b'{"text":"a","n":1}\n' + b"\n" * 1200 + b'{"text":"b","n":"x"}\n',
        "column n: string here, but int64 in another part of the file",
    ),
    "latin.jsonl": (b'{"text":"a"}\n{"text":"\xe9"}\n', "line 2: not UTF-8"),
    "half.jsonl": (b'{"text":"\\ud800"}\n', "line 1: The surrogate pair"),
    "half.json": (b'[{"text":"a"},{"text":"\\ud800"}]', "element 2: The surrogate pair"),
    "latin.json": (b'[{"text":"a"},{"text":"\xe9"}]', "element 2 is not UTF-8"),
    "comma.jsonl": (b'{"text":"a"}\n\n{"text" "b"}\n', "line 3: Missing a colon"),
    "long.jsonl": (
        b'{"text":"a","n":0.5}\n{"text":"b","n":' + b"1" * 400 + b"}",
        "line 2: column n holds floats, none",
    ),
    "longer.jsonl": (b'{"text":"a","n":0.5}\n{"text":"b","n":' + b"1" * 5000 + b"}", "line 2: column n holds floats"),
    "spread.jsonl": (b'{"text":"order 9007199254740993 ",\n"n":0.5}\n', "line 1: not one whole object"),
    "spread2.jsonl": (b'{"text":"b","n":\n9007199254740993\n}', "line 1: not one whole object"),
    "pretty.jsonl": (b'{\n "text": "a"\n}\n', "line 1: not one whole object"),
    "returns.jsonl": (b'{"text":"a"}\r{"text":"b 9007199254740993 ","n":0.5}\r', "2 objects on 1 lines"),
    "two.jsonl": (b'{"text":"a"} {"text":"b 9007199254740993 ","n":0.5}', "2 objects on 1 lines"),
    "cross.jsonl": (b'{"text":"a"}{"text":"b"}\n{"text":"c","n":{}\n}\n', "line 3: not one whole object"),
    "inner.jsonl": (b'{"text":"a","o":{"x":1,"x":2}}\n', "line 1: Column(/o/x) was specified twice"),
    "inf.jsonl": (b'{"text":"a","n":Inf,"i":9007199254740993}\n', "line 1: Expecting value"),
    "bare.jsonl": (b"{}\n{}\n", "has no column text"),
    "deep.jsonl": (
        b'{"text":"a","n":' + b"[" * 2000 + b"]" * 2000 + b"}",
        "line 1: lists and objects nested more than",
    ),
    "deepest.jsonl": (b'{"text":"a","n":' + b"[" * 90_000 + b"]" * 90_000 + b"}", "line 1: lists and objects nested"),
    "deep.json": (b'[{"text":"a","n":' + b"[" * 200 + b"]" * 200 + b"}]", "element 1: lists and objects nested"),
    "infinite.json": (b'[{"text":"a","n":1e999},{"text":"b","n":0.5}]', "element 1: Number too big"),
    "double.json": (b'[{"text":"a","n":1,"n":2}]', "element 1: Column(/n) was specified twice"),
    "cut.json": (b'[{"text":"a"},{"text":"b"', "broken JSON on line 1"),
    "number.json": (b'[{"text":"a"},5]', "element 2 is no object"),
    "huge.jsonl": (b'{"text":"a","id":18446744073709551615}\n', "line 1: column id holds floats, none of which is 184"),
    "odd.jsonl": (
        b'{"text":"a","id":0.5}\n' * 99 + b'{"text":"b","id":[9007199254740993]}\n',
        "Column(/id) changed from number to array",
    ),
    "odd.json": (
        b"[" + b'{"text":"a","id":0.5},' * 99 + b'{"text":"b","id":9007199254740993}]',
        "element 100: column id holds floats, none of which is 9007199254740993",
    ),
    "hollow.jsonl": (b'{"text":"a","meta":{}}\n', "column meta: only empty objects"),
    "lacks.jsonl": (b'{"txt":"a"}\n', "has no column text: --column takes one of txt"),
    "empty.jsonl": (b"", "holds no rows"),
    "cells.csv": (
        b"id,text\n1,a\n2,b,c\n",
        "row 3 (the header is row 1; blank lines do not count): Expected 2 columns, got 3: 2,b,c: mend",
    ),
    "blank.csv": (b"id,text\n1\n", "Expected 2 columns, got 1: 1: mend"),
    "quote.csv": (b'id,text\n1,"a\nb"\n2,"open\n3,c\n', "line 4: broken CSV"),
    "latin.csv": (
        b"id,text\n1,\xe9\n",
        "row 2 (the header is row 1; blank lines do not count): CSV conversion error to string: ",
    ),
    "wide.csv": ("text\na\n".encode("utf-16"), "has a header that is not UTF-8"),
    "wide.jsonl": ('{"text": "a"}'.encode("utf-16"), "line 1: not UTF-8"),
    "twice.csv": (b"text,id,text\na,1,b\n", "has two columns named 'text'"),
    "empty.csv": (b"", "is empty"),
    "lacks.csv": (b"id\n1\n", "has no column text: --column takes one of id"),
    "none.parquet": (b"nope", "is not readable as Parquet"),
    "none.jsonl.gz": (b"nope", "can't be read: zlib"),
    "cut.csv.gz": (
        gzip.compress(b"id,text\n" + random.Random(3).randbytes(99).hex().encode())[:-20],
        "is not readable as CSV",
    ),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_is_one_line_that_names_it(name, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(json_tables, "BLOCK_BYTES", 500)
    data, expected = BROKEN_FILES[name]
    path = tmp_path / name
    path.write_bytes(data)
    assert main(["dedup", str(path), "--column", "text", "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"slmfast: {path}")
    assert expected in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [path]  # nothing half-written is left


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ([{"text": ["a"], "n": [1]}, {"text": ["b"], "n": ["x"]}], "1.parquet, column n: string here, but int64 in"),
        ([{"text": ["a"], "n": [1]}, {"text": ["b"]}], "1.parquet lacks the column n that"),
        ([{"text": ["a"]}, {"text": ["b"], "n": [1]}], "0.parquet lacks the column n that"),
        ([{"text": ["a"], "n": [0.5]}, {"text": ["b"], "n": [2**53 + 1]}], "1.parquet, column n: no double"),
        *(
            ([{"text": ["a"], "n": pa.array([one], a)}, {"text": ["b"], "n": pa.array([other], b)}], "n: " + expected)
            for one, a, other, b, expected in [
                ([D], pa.list_(DECIMAL), [0.5], pa.list_(pa.float64()), "list<item: double> here, but list<item"),
                ([D], pa.large_list(DECIMAL), [0.5], pa.list_(pa.float64()), "list<item: double> here, but large_"),
                ({"p": D}, pa.struct([("p", DECIMAL)]), {"p": 0.5}, pa.struct([("p", pa.float64())]), "struct<p"),
                (
                    [("p", D)],
                    pa.map_("string", DECIMAL),
                    [("p", 0.5)],
                    pa.map_("string", "double"),
                    "map<string, double",
                ),
                (["a"], pa.list_(pa.string()), [b"a"], pa.list_(pa.binary()), "list<item: binary> here, but list<"),
                ([{"p": ["a"]}], None, [{"p": [b"a"]}], None, "list<item: struct<p: list<item: binary>>> here"),
            ]
        ),
        ([{"text": [5], "s": ["a"]}], "0.parquet, column text: holds int64, no texts: --column takes one of s"),
        ([{"text": [5]}], "holds int64, no texts: it has no column of texts, so leave the file out"),
        (
            [{"text": pa.array([b"fine", b"a", b"\xff"], pa.binary()).view(pa.string())}],
            "0.parquet, row 2, column text: not UTF-8",
        ),
    ],
)
def test_tables_that_do_not_agree_are_refused(tables, expected, tmp_path):
    for i, table in enumerate(tables):
        pq.write_table(pa.table(table), tmp_path / f"{i}.parquet")
    with pytest.raises(UserError) as caught:
        dedup_files([tmp_path], "text", tmp_path / "out" / "new")
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
