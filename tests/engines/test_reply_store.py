"""The stored replies: whole or not at all, once each, and every fault of the file in one line."""

import pytest

from slmfast import UserError
from slmfast.engines.reply_store import ReplyStore, StoredReply


def stored(n):
    return StoredReply(f"text {n}", "stop", n, 2, 7)


def test_a_torn_end_of_the_store_is_dropped(tmp_path):
    """The log is cut at many places, as a crash of the machine may leave it: replies are there whole or not at all."""
    store = ReplyStore(tmp_path / "whole.sqlite")
    for n in range(40):
        store.add(b"%d" % n, stored(n))
    log = (tmp_path / "whole.sqlite-wal").read_bytes()
    file = (tmp_path / "whole.sqlite").read_bytes()
    store.close()
    lengths = set()
    for cut in range(0, len(log), 3001):
        (tmp_path / "torn.sqlite").write_bytes(file)
        (tmp_path / "torn.sqlite-wal").write_bytes(log[: len(log) - cut])
        torn = ReplyStore(tmp_path / "torn.sqlite")
        kept = torn.totals()[0]
        assert [torn.get(b"%d" % n) for n in range(40)] == [stored(n) if n < kept else None for n in range(40)]
        for n in range(kept, 40):
            torn.add(b"%d" % n, stored(n))
        assert torn.totals() == (40, 0, sum(range(40)), 80)
        torn.close()
        lengths.add(kept)
    assert max(lengths) == 40 and min(lengths) == 0 and len(lengths) > 10


def test_a_damaged_or_used_store_is_one_line(tmp_path):
    path = tmp_path / "replies.sqlite"
    path.write_bytes(b"no database at all, but long enough to be looked at as one" * 20)
    with pytest.raises(UserError, match=r"replies\.sqlite is damaged .* delete it"):
        ReplyStore(path)
    path.unlink()
    store = ReplyStore(path)
    with pytest.raises(UserError, match="another run uses it"):
        ReplyStore(path)
    store.close()


def test_a_reply_is_never_stored_twice(tmp_path):
    store = ReplyStore(tmp_path / "replies.sqlite")
    store.add(b"1", stored(1))
    with pytest.raises(RuntimeError, match="one request was answered twice; the first reply stays"):
        store.add(b"1", stored(2))
    assert store.get(b"1") == stored(1) and store.totals()[0] == 1
    store.close()


def test_a_full_disk_is_one_line(tmp_path):
    store = ReplyStore(tmp_path / "replies.sqlite")
    store._database.execute("pragma max_page_count = 10")
    with pytest.raises(UserError, match=r"can't be used \(database or disk is full\)"):
        for n in range(2000):
            store.add(b"%d" % n, stored(n))
    store.close()
