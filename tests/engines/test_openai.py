"""The engine on a server: what it asks, what it keeps, what it makes of faults and refusals."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from slmfast import UserError
from slmfast.engines import open_engine
from slmfast.engines.http_client import seconds_of
from slmfast.engines.reply_store import ReplyStore, StoredReply
from slmfast.job import BUILTIN_MODELS

PROMPTS = [f"prompt number {n}" for n in range(200)]
FAULTS = {"429": 0.10, "500": 0.05, "hang": 0.03, "cut": 0.03, "garbage": 0.02}


def texts(generations):
    return [generation.text for generation in generations]


def expected(prompts):
    return [f"reply to {prompt}" for prompt in prompts]


def test_replies_come_in_the_order_of_the_prompts_however_they_end(serve, engine_of):
    server = serve(seconds=0.002, spread=20)
    engine = engine_of(server)
    assert texts(engine.generate(PROMPTS, max_new_tokens=8)) == expected(PROMPTS)
    assert engine.generate([], max_new_tokens=8) == []
    assert 1 < server.stats()["most"] <= 64


def test_the_limit_of_requests_in_flight_holds(serve, engine_of):
    server = serve(seconds=0.003)
    engine_of(server, concurrency=5).generate(PROMPTS, max_new_tokens=8)
    assert server.stats()["most"] == 5


def test_what_a_request_carries(serve, engine_of):
    server = serve(keep_bodies=True)
    engine = engine_of(server, extra={"repetition_penalty": 1.0})
    conversation = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    options = {"max_new_tokens": 9, "temperature": 0.5, "top_p": 0.8, "seed": 3}
    replies = engine.generate([conversation, "hello", "hello"], **options)
    bodies = server.stats()["bodies"]
    user = [{"role": "user", "content": "hello"}]
    assert sorted(map(str, (body["messages"] for body in bodies))) == sorted(map(str, [conversation, user, user]))
    for body in bodies:
        kept = {key: body[key] for key in body if key not in ("messages", "seed")}
        assert kept == {
            "model": "served",
            "max_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.8,
            "repetition_penalty": 1.0,
        }
    assert {body["seed"] for body in bodies} == {reply.seed for reply in replies}
    assert len({reply.seed for reply in replies}) == 3, "a prompt asked twice is answered twice"
    assert all(0 <= reply.seed < 2**31 for reply in replies)
    parameters = {"max_new_tokens": 9, "temperature": 0.5, "top_p": 0.8, "repetition_penalty": 1.0}
    assert json.loads(replies[0].parameters) == parameters
    assert [r.seed for r in engine.generate([conversation], **options)] == [replies[0].seed]
    assert [r.seed for r in engine.generate([conversation], **(options | {"seed": 4}))] != [replies[0].seed]


def test_cut_filtered_and_refused_replies_are_marked(serve, engine_of):
    engine = engine_of(serve())
    got = engine.generate(["a CUT", "a FILTER", "to REFUSE", "fine", "SURROGATE"], max_new_tokens=8)
    assert [g.finish_reason for g in got] == ["length", "content_filter", "refusal", "stop", "stop"]
    assert got[2].text == "I can't help with that."
    assert got[4].text == "half \ufffd and \x00 whole \U0001f600"
    assert engine.generate(["SURROGATE"], max_new_tokens=8)[0].text == got[4].text, "from the store as from the server"


def test_what_a_server_refuses_for_good_is_a_reply_that_says_so(serve, engine_of, monkeypatch):
    monkeypatch.setenv("SLMFAST_TEST_KEY", "very-secret")
    server = serve(key="very-secret")
    engine = engine_of(server, api_key="SLMFAST_TEST_KEY", concurrency=2)
    odd = ["a BAD one", "a LARGE one", "MALFORMED", "ILLEGAL", "ABORT"]
    got = engine.generate([*odd, *PROMPTS[:20]], max_new_tokens=8)
    assert texts(got) == [""] * 5 + expected(PROMPTS[:20])
    assert [g.finish_reason for g in got] == ["refused"] * 5 + ["stop"] * 20
    words = [f"HTTP {status}: content filter, as Bearer *** may know" for status in (400, 413, 422, 451)]
    assert [g.refusal for g in got] == [*words, "finish reason 'abort'"] + [None] * 20
    assert all(g.tokens == 0 and g.parameters == got[-1].parameters for g in got[:5])
    asked = server.stats()["asked"]
    assert [next(n for text, n in asked.items() if prompt in text) for prompt in odd] == [1, 1, 1, 1, 3]
    notes = engine.notes()
    assert (notes["replies"], notes["refused"], notes["failed_tries"]) == (25, 5, {"finish reason 'abort'": 3})
    assert "25 replies (5 of them refusals)" in engine.state()
    engine.close()
    again = engine_of(server, api_key="SLMFAST_TEST_KEY")
    assert again.generate([*odd, *PROMPTS[:20]], max_new_tokens=8) == got
    assert again.notes()["refused"] == 5
    assert server.stats()["asked"] == asked, "a refusal is kept, and not asked for again"
    # In this store requests were answered, so that a call of refusals alone is no sign of a wrong setup.
    assert [g.finish_reason for g in again.generate(["BAD luck"] * 30, max_new_tokens=8)] == ["refused"] * 30


@pytest.mark.parametrize(
    ("prompts", "said"), [(200, "all 10 first requests"), (3, "all 3 first"), (1, "the first req")]
)
@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_refuses_all_first_requests_stops_the_run(serve, engine_of, prompts, said, status):
    server = serve(refuse=status)
    engine = engine_of(server, concurrency=5)
    wanted = rf"engines\.large: {server.url}: it refuses {said}.*: HTTP {status}: content filter.* correct its model"
    for _ in range(2):
        with pytest.raises(UserError, match=wanted) as caught:
            engine.generate(PROMPTS[:prompts], max_new_tokens=8)
        assert "\n" not in str(caught.value)
    assert sum(server.stats()["asked"].values()) <= 2 * (10 + 5), "the run ends soon"
    assert engine.store.totals() == (0, 0, 0, 0), "what a wrong setup gives is no result"
    server.end()
    serve(port=server.port)
    assert texts(engine.generate(PROMPTS[:prompts], max_new_tokens=8)) == expected(PROMPTS[:prompts])


def test_quick_refusals_before_the_first_answer_are_no_wrong_setup(serve, engine_of):
    """Refusals come at once, replies take their time: with many in flight the former are the first to come."""
    server = serve(seconds=0.3)
    engine = engine_of(server, concurrency=4)
    prompts = [f"BAD {n}" for n in range(6)] + ["good"]
    engine.begin(prompts[6:], max_new_tokens=8)
    got = engine.generate(prompts[:6], max_new_tokens=8)
    assert [g.finish_reason for g in got] == ["refused"] * 6
    assert engine.generate(prompts[6:], max_new_tokens=8)[0].text == "reply to good"
    assert engine.store.totals()[:2] == (7, 6)


def test_begun_requests_are_put_once(serve, engine_of):
    server = serve(seconds=0.001)
    engine = engine_of(server)
    engine.begin(PROMPTS[:100], max_new_tokens=8)
    engine.begin(PROMPTS[100:], max_new_tokens=8)
    assert texts(engine.generate(PROMPTS[:100], max_new_tokens=8)) == expected(PROMPTS[:100])
    assert texts(engine.generate(PROMPTS[50:], max_new_tokens=8)) == expected(PROMPTS[50:])
    assert set(server.stats()["asked"].values()) == {1}


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


def test_another_engine_on_the_same_store_asks_nothing(serve, engine_of):
    server = serve()
    first = engine_of(server)
    replies = first.generate(PROMPTS, max_new_tokens=8)
    first.close()
    server.end()
    second = engine_of("http://127.0.0.1:9/v1", tries=1)
    assert second.generate(PROMPTS, max_new_tokens=8) == replies
    assert second.notes()["of_an_earlier_run"] == second.notes()["replies"] == len(PROMPTS)
    with pytest.raises(UserError, match="failed 1 times"):
        second.generate(PROMPTS, max_new_tokens=9)


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


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        (
            {"key": "right"},
            {},
            r"recipe key engines\.large\.api_key: .*\(none is named\) \(HTTP 401: Incorrect API key",
        ),
        ({"key": "right"}, {"api_key": "SLMFAST_TEST_KEY"}, r"does not take the key in SLMFAST_TEST_KEY"),
        ({}, {"model": "other"}, r"engines\.large\.model 'other' and .*HTTP 404: The model does not exist"),
        ({}, {"api_key": "SLMFAST_NO_SUCH_KEY"}, "variable SLMFAST_NO_SUCH_KEY is not set"),
    ],
)
def test_refusals_are_one_line(serve, engine_of, monkeypatch, tmp_path, options, settings, message):
    monkeypatch.setenv("SLMFAST_TEST_KEY", "wrong-secret")
    server = serve(**options)
    with pytest.raises(UserError, match=message) as caught:
        engine_of(server, **settings).generate(PROMPTS, max_new_tokens=8)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert sum(server.stats()["keys"].values()) <= 64, "the first refusal ends it for those that wait"


@pytest.mark.parametrize(
    "given", [{"extra": {"note": ["a very-secret-key"]}}, {"base_url": "http://very-secret-key/v1"}]
)
def test_a_key_that_stands_elsewhere_is_refused(engine_of, monkeypatch, given):
    monkeypatch.setenv("SLMFAST_TEST_KEY", "very-secret-key")
    url = given.pop("base_url", "http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="the key in SLMFAST_TEST_KEY stands in extra or base_url") as caught:
        engine_of(url, api_key="SLMFAST_TEST_KEY", **given)
    assert "secret" not in str(caught.value)


def test_a_server_that_repeats_the_key_does_not_show_it(serve, engine_of, monkeypatch):
    monkeypatch.setenv("SLMFAST_TEST_KEY", "very-secret-key")
    with pytest.raises(UserError, match=r"HTTP 401: Incorrect API key: Bearer \*\*\*") as caught:
        engine_of(serve(key="right"), api_key="SLMFAST_TEST_KEY").generate(["a"], max_new_tokens=1)
    assert "secret" not in str(caught.value)


def test_the_key_goes_to_the_server_and_nowhere_else(serve, engine_of, monkeypatch, tmp_path):
    monkeypatch.setenv("SLMFAST_TEST_KEY", "very-secret-key")
    server = serve(key="very-secret-key")
    engine = engine_of(server, api_key="SLMFAST_TEST_KEY")
    assert texts(engine.generate(PROMPTS[:3], max_new_tokens=8)) == expected(PROMPTS[:3])
    engine.close()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and all(b"very-secret-key" not in path.read_bytes() for path in written)


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


@pytest.mark.parametrize(
    ("options", "settings", "window"),
    [
        ({}, {}, 1024),
        ({"max_model_len": 77}, {}, 77),
        ({"max_model_len": 10**6}, {}, 1024),
        ({"max_model_len": 77}, {"window": 50}, 50),
        ({"no_models": True}, {}, 1024),
    ],
)
def test_the_window_is_the_smaller_one_and_stays(serve, engine_of, options, settings, window):
    configured = json.loads((BUILTIN_MODELS / "large" / "config.json").read_text())["max_position_embeddings"]
    window = configured if window == 1024 else window
    server = serve(**options)
    engine = engine_of(server, **settings)
    assert engine.window == window
    engine.close()
    server.end()
    assert engine_of(server, tries=1).window == window, "kept with the replies"


def test_a_window_that_is_given_asks_the_server_nothing(serve, engine_of):
    server = serve(broken_models=True)
    assert engine_of(server, window=50).window == 50
    assert server.stats()["listed"] == 0
    with pytest.raises(UserError, match=r"/models failed 2 times, the last time with HTTP 500"):
        engine_of(server, store="other.sqlite", tries=2).window  # noqa: B018


def test_scores_are_those_of_the_local_engine(serve, engine_of):
    folder = BUILTIN_MODELS / "large"
    engine, local = engine_of(serve(model=str(folder))), open_engine("local", folder, threads=1)
    prompts = ["What is 3 + 4?", "3加4等于多少？"]
    choices = [["yes", "no"], ["1", "0.5", "0"]]
    for got, wanted in zip(engine.choose(prompts, choices), local.choose(prompts, choices), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4)
    replies = [["7", "", None], ["seven of them"]]
    got, wanted = engine.perplexity(prompts, replies), local.perplexity(prompts, replies)
    assert got.schema == wanted.schema and got["tokens"].equals(wanted["tokens"])
    for name in ("bits", "perplexity"):
        np.testing.assert_allclose(got[name].to_pandas(), wanted[name].to_pandas(), rtol=1e-4, atol=1e-6)
    assert engine.choose([], []) == []
    asked = engine.requests.replies
    engine.perplexity(prompts, replies)
    assert engine.requests.replies == asked == 7, "a score is asked for once"


def test_a_text_that_a_server_refuses_to_score_is_null(serve, engine_of):
    folder = BUILTIN_MODELS / "large"
    engine, local = engine_of(serve(model=str(folder))), open_engine("local", folder, threads=1)
    asked, several = ["Is it?", "BAD"], [["yes", "no"]] * 2
    good, bad = engine.choose(asked, several)
    np.testing.assert_allclose(good, local.choose(asked[:1], several[:1])[0], rtol=1e-4)
    assert np.isnan(bad).all()
    rows = engine.perplexity(["Is it?"], [["7", "BAD", "8"]]).to_pylist()
    assert [row["bits"] is None for row in rows] == [row["perplexity"] is None for row in rows] == [False, True, False]
    assert rows[1]["tokens"] > 0
    refused = engine_of(serve(model=str(folder), refuse=400), store="other.sqlite")
    with pytest.raises(UserError, match=r"can't score a given text \(it refuses all 4 first requests: HTTP 400"):
        refused.choose(asked, several)


def test_a_server_without_scores_of_given_text_is_noticed(serve, engine_of):
    """llama.cpp's way: a log-probability for the generated token alone, which would score every choice alike."""
    engine = engine_of(serve(model=str(BUILTIN_MODELS / "large"), echo=False))
    with pytest.raises(UserError, match=r"engines\.large: .* can't score a given text .* kind local, or .* vLLM"):
        engine.choose(["Is it?"], [["yes", "no"]])


@pytest.mark.parametrize(("option", "value"), [("temperature", -1.0), ("top_p", 0.0), ("max_new_tokens", 0)])
def test_generation_options_are_checked(serve, engine_of, option, value):
    with pytest.raises(UserError, match=option):
        engine_of(serve()).generate(["fox"], **({"max_new_tokens": 4} | {option: value}))


def test_retry_after_is_a_number_or_a_date():
    assert seconds_of(None) == seconds_of("soon") == seconds_of("-3") == seconds_of("nan") == 0
    assert seconds_of("2.5") == 2.5
    assert seconds_of("86400") == 600
    assert seconds_of("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert 90 < seconds_of(later) <= 100
