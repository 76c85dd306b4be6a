"""The engine on a server: what it asks, once each, and what it keeps."""

import json
import sys
from pathlib import Path

import pytest

from slmfast import UserError
from slmfast.job import BUILTIN_MODELS

sys.path.insert(0, str(Path(__file__).parent))

from numbered import PROMPTS, expected, texts


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


def test_begun_requests_are_put_once(serve, engine_of):
    server = serve(seconds=0.001)
    engine = engine_of(server)
    engine.begin(PROMPTS[:100], max_new_tokens=8)
    engine.begin(PROMPTS[100:], max_new_tokens=8)
    assert texts(engine.generate(PROMPTS[:100], max_new_tokens=8)) == expected(PROMPTS[:100])
    assert texts(engine.generate(PROMPTS[50:], max_new_tokens=8)) == expected(PROMPTS[50:])
    assert set(server.stats()["asked"].values()) == {1}


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


@pytest.mark.parametrize("told", [10**30, -1])
def test_numbers_of_tokens_that_can_not_be_are_not_taken_over(serve, engine_of, told):
    engine = engine_of(serve(usage={"prompt_tokens": told, "completion_tokens": told}))
    reply = engine.generate(["fox"], max_new_tokens=8)[0]
    assert (reply.text, reply.tokens) == ("reply to fox", len(engine.encoder.replies(["reply to fox"])[0]) + 1)
    assert engine.requests.tokens_in == 0


@pytest.mark.parametrize(
    ("options", "settings", "window"),
    [
        ({}, {}, 1024),
        ({"max_model_len": 77}, {}, 77),
        ({"max_model_len": 10**6}, {}, 1024),
        ({"max_model_len": 77}, {"window": 50}, 50),
        ({"no_models": True}, {}, 1024),
        ({"max_model_len": "77"}, {}, 1024),
        ({"max_model_len": -1}, {}, 1024),
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
    with pytest.raises(UserError, match=r"/models failed 2 times, .* HTTP 500 .*give engines\.large\.window"):
        engine_of(server, store="other.sqlite", tries=2).window  # noqa: B018


@pytest.mark.parametrize(("option", "value"), [("temperature", -1.0), ("top_p", 0.0), ("max_new_tokens", 0)])
def test_generation_options_are_checked(serve, engine_of, option, value):
    with pytest.raises(UserError, match=option):
        engine_of(serve()).generate(["fox"], **({"max_new_tokens": 4} | {option: value}))
