"""What a server refuses, for good or for its key: marked, told in one line, and the key shown nowhere."""

import sys
from pathlib import Path

import pytest

from slmfast import UserError

sys.path.insert(0, str(Path(__file__).parent))

from numbered import PROMPTS, expected, texts


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
