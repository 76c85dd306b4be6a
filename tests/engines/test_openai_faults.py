"""A server with faults, one that is not there, and a client that is killed: every record exactly once."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from slmfast import UserError
from slmfast.engines.http_client import seconds_of
from slmfast.engines.reply_store import ReplyStore
from slmfast.job import BUILTIN_MODELS

sys.path.insert(0, str(Path(__file__).parent))

from numbered import PROMPTS, expected, texts

FAULTS = {"429": 0.10, "500": 0.05, "hang": 0.03, "cut": 0.03, "garbage": 0.02}


def count_faults(stats):
    return sum(stats["faults"].values())


def check_every_record_once(server, engine, prompts):
    assert texts(engine.generate(prompts, max_new_tokens=8)) == expected(prompts)
    stats = server.stats()
    assert len(stats["answered"]) == len(prompts)
    assert set(stats["answered"].values()) == {1}
    assert sum(stats["asked"].values()) == len(prompts) + count_faults(stats)
    assert sum(engine.client.failures.values()) == count_faults(stats)
    assert engine.store.path.exists() and engine.requests.replies == len(prompts)
    return stats


def test_faults_are_asked_again(serve, engine_of):
    server = serve(faults={"429": 0.1, "500": 0.05, "cut": 0.05, "garbage": 0.05, "missing": 0.05, "odd": 0.2}, seed=5)
    engine = engine_of(server, tries=40)
    stats = check_every_record_once(server, engine, PROMPTS)
    assert set(stats["faults"]) == {"429", "500", "cut", "garbage", "missing", "odd"} and stats["faults"]["odd"] > 20
    kinds = set(engine.client.failures)
    assert {"HTTP 429", "HTTP 500", "an answer that can't be read"} < kinds
    assert any(kind.startswith("a cut connection") for kind in kinds)


@pytest.mark.slow
def test_ten_thousand_requests_to_a_faulty_server(serve, engine_of):
    """10 % 429, 5 % 500, 3 % hang, 3 % cut, 2 % garbage: every record exactly once, none lost, none doubled."""
    prompts = [f"record {n}" for n in range(10_000)]
    server = serve(faults=FAULTS, seed=11)
    # A busy machine takes its time: what is answered and not waited for would be asked again.
    engine = engine_of(server, timeout=5.0, concurrency=128, tries=40)
    stats = check_every_record_once(server, engine, prompts)
    for kind, share in FAULTS.items():
        assert abs(stats["faults"][kind] / sum(stats["asked"].values()) - share) < 0.01
    rows = sqlite3.connect(engine.store.path, timeout=0)
    engine.close()
    assert rows.execute("select count(*), count(distinct key), count(distinct text) from replies").fetchone() == (
        10_000,
        10_000,
        10_000,
    )
    rows.close()


CLIENT = """
import sys
from pathlib import Path
from slmfast.engines import open_engine
from slmfast.engines.settings import EngineSettings
url, folder, store, count = sys.argv[1:]
settings = EngineSettings(kind="openai", base_url=url, model="served", backoff=0.01, concurrency=16)
engine = open_engine(settings, folder, store=Path(store), role="large", key="engines.large")
print("ready", flush=True)
replies = engine.generate([f"prompt number {n}" for n in range(int(count))], max_new_tokens=8)
assert [reply.text for reply in replies] == [f"reply to prompt number {n}" for n in range(int(count))]
print("done", flush=True)
"""


@pytest.mark.slow
def test_killed_midway_it_asks_for_no_stored_reply_again(serve, tmp_path):
    server, path = serve(seconds=0.01), tmp_path / "replies.sqlite"
    command = [sys.executable, "-c", CLIENT, server.url, str(BUILTIN_MODELS / "large"), str(path), "1500"]
    before, kept = Counter(), 0
    for target in (100, 600):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        while sum(server.stats()["answered"].values()) < target:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        asked = Counter(server.stats()["asked"])
        store = ReplyStore(path)
        found = store.totals()[0]
        store.close()
        # What was asked is stored, or was in flight when the process died, and nothing stored was asked again.
        assert 0 <= (asked - before).total() - (found - kept) <= 16
        assert all(count == 1 for count in (asked - before).values())
        before, kept = asked, found
    assert 0 < kept < 1500, "else nothing was killed midway"
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "ready\ndone\n"
    asked = Counter(server.stats()["asked"])
    assert (asked - before).total() == 1500 - kept
    store = ReplyStore(path)
    assert store.totals()[0] == 1500
    store.close()


def test_nobody_listens(engine_of):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(UserError, match=r"failed 3 times, .* no connection .*see to the server") as caught:
            engine_of(url, tries=3).generate(["a"], max_new_tokens=1)
    assert "\n" not in str(caught.value)


def test_a_server_that_comes_back_is_asked_by_the_same_engine(serve, engine_of):
    server = serve()
    server.end()
    engine = engine_of(server, tries=2)
    with pytest.raises(UserError, match="failed 2 times"):
        engine.generate(["a"], max_new_tokens=1)
    serve(port=server.port)
    assert texts(engine.generate(["a"], max_new_tokens=1)) == ["reply to a"]


def test_retry_after_is_a_number_or_a_date():
    assert seconds_of(None) == seconds_of("soon") == seconds_of("-3") == seconds_of("nan") == 0
    assert seconds_of("2.5") == 2.5
    assert seconds_of("86400") == 600
    assert seconds_of("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert 90 < seconds_of(later) <= 100
