"""Files appear whole or not at all, and the bytes of a table depend on its rows alone."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slmfast import store
from slmfast.errors import UserError
from slmfast.store import (
    ShardWriter,
    atomic_path,
    count_rows,
    digest,
    file_digest,
    model_digest,
    output_digests,
    read_batches,
    read_json,
    read_table,
    remove,
    remove_temporaries,
    shard_path,
    shards,
    table_schema,
    text_bytes,
    write_json,
    write_table,
)

SCHEMA = pa.schema([("n", pa.int64()), ("text", pa.string())])


def rows(count):
    return [{"n": i, "text": None if i % 7 == 3 else "字" * (i % 5)} for i in range(count)]


def test_a_failed_write_leaves_nothing(tmp_path):
    target = tmp_path / "file.txt"
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_a_write_replaces_the_old_file_or_folder(tmp_path):
    for _ in range(2):
        with atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / "a").write_text("1")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 37])
def test_shards_hold_the_rows_in_order(tmp_path, count):
    with ShardWriter(tmp_path / "t", SCHEMA, rows_per_shard=10) as writer:
        writer.write(rows(count))
    assert count_rows(tmp_path / "t") == writer.rows == count
    assert len(shards(tmp_path / "t")) == max(1, -(-count // 10))
    assert read_table(tmp_path / "t").to_pylist() == rows(count)
    assert [r for batch in read_batches(tmp_path / "t", rows=4) for r in batch.to_pylist()] == rows(count)


def test_the_bytes_do_not_depend_on_how_rows_come_in(tmp_path):
    everything = rows(1000)
    for name, seed in (("a", 1), ("b", 2)):
        cut = random.Random(seed)
        with ShardWriter(tmp_path / name, SCHEMA, rows_per_shard=300) as writer:
            start = 0
            while start < len(everything):
                step = cut.randint(1, 90)
                writer.write(pa.RecordBatch.from_pylist(everything[start : start + step], schema=SCHEMA))
                start += step
    assert output_digests(tmp_path / "a") == output_digests(tmp_path / "b")


def test_a_failed_stream_writes_no_last_shard(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "t", SCHEMA, rows_per_shard=10) as writer:
        writer.write(rows(15))
        raise RuntimeError
    assert count_rows(tmp_path / "t") == 10


def test_digests_follow_content(tmp_path):
    assert digest({"a": 1, "b": 5e-8}) == digest({"b": 5e-8, "a": 1}) != digest({"a": 1, "b": 5.1e-8})
    (tmp_path / "x").write_bytes(b"1" * 5_000_000)
    (tmp_path / "y").write_bytes(b"1" * 4_999_999 + b"2")
    assert file_digest(tmp_path / "x") != file_digest(tmp_path / "y")
    before = model_digest(tmp_path)
    (tmp_path / "y").write_bytes(b"1" * 2_500_000 + b"3" + b"1" * 2_499_998 + b"2")
    assert model_digest(tmp_path) != before


def test_long_texts_make_small_shards(tmp_path):
    rows_in = [{"n": i, "text": "字" * 200_000} for i in range(300)]
    for name, step in (("a", 300), ("b", 7)):
        with ShardWriter(tmp_path / name, SCHEMA) as writer:
            for start in range(0, 300, step):
                writer.write(rows_in[start : start + step])
    parts = [pq.read_metadata(path).num_rows for path in shards(tmp_path / "a")]
    assert parts == [128, 128, 44]
    assert output_digests(tmp_path / "a") == output_digests(tmp_path / "b")


def test_text_bytes_counts_nested_text():
    column = pa.array([[{"role": "user", "content": "字a"}], [], None])
    assert text_bytes(column) == len("user") + 4
    assert text_bytes(pa.array([1, 2])) == 0


def test_shards_are_read_in_order_of_their_numbers(tmp_path):
    for number in (100_000, 99_999, 2):
        write_table(shard_path(tmp_path, number), pa.table({"n": [number]}))
    assert read_table(tmp_path).column("n").to_pylist() == [2, 99_999, 100_000]


def test_a_damaged_shard_is_named(tmp_path):
    with ShardWriter(tmp_path / "t", SCHEMA) as writer:
        writer.write(rows(10))
    (path,) = shards(tmp_path / "t")
    path.write_bytes(path.read_bytes()[:50])
    for read in (count_rows, table_schema, lambda folder: list(read_batches(folder))):
        with pytest.raises(UserError, match=r"part-00000\.parquet can't be read"):
            read(tmp_path / "t")


def test_a_changed_byte_of_a_page_is_noticed(tmp_path):
    with ShardWriter(tmp_path / "t", SCHEMA) as writer:
        writer.write(rows(1000))
    (path,) = shards(tmp_path / "t")
    whole = path.read_bytes()
    column = pq.read_metadata(path).row_group(0).column(0)
    place = column.data_page_offset + column.total_compressed_size // 2
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(UserError, match=r"part-00000\.parquet can't be read"):
        list(read_batches(tmp_path / "t"))


def test_a_folder_is_gone_before_it_is_deleted(tmp_path, monkeypatch):
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "a").write_text("1")

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("slmfast.store.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(tmp_path / "stage")
    assert not (tmp_path / "stage").exists()
    monkeypatch.undo()
    remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_json_round_trips_and_damage_is_named(tmp_path):
    write_json(tmp_path / "a.json", {"标签": [1, None]})
    assert read_json(tmp_path / "a.json") == {"标签": [1, None]}
    assert json.loads((tmp_path / "a.json").read_text()) == {"标签": [1, None]}
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json is damaged"):
        read_json(tmp_path / "a.json")


def test_a_shard_that_cannot_be_written_stops_the_writer(tmp_path, monkeypatch):
    """Shards are written by a thread; what fails there is the caller's to hear, and no later shard hides it."""
    written = store.write_table

    def full(path, table):
        if path.name == "part-00001.parquet":
            raise OSError(28, "No space left on device")
        written(path, table)

    monkeypatch.setattr(store, "write_table", full)
    schema = pa.schema([("x", pa.int64())])
    for rows in (200, 120):  # told by a later shard, and at the end
        folder = tmp_path / str(rows)
        with pytest.raises(OSError, match="No space left"), ShardWriter(folder, schema, rows_per_shard=60) as writer:
            for x in range(rows):
                writer.write([{"x": x}])
        assert [path.name for path in folder.iterdir()] == ["part-00000.parquet"]
