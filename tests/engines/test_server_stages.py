"""Classify, regenerate and rate through servers: every record once, and the same tables as with the local engine."""

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slmfast import pipeline, store
from slmfast.commands import MINIATURE
from slmfast.errors import UserError
from slmfast.job import BUILTIN_MODELS, Job, _looked_ahead, _Unit
from slmfast.recipe import Engines, dump_recipe, load_recipe
from slmfast.records import RECORD_SCHEMA, record_id
from slmfast.stages import classify
from slmfast.store import read_table, shards

SMALL = ["classify.unit_rows=16", "regenerate.unit_rows=8", "rate.unit_rows=8", "threads=1"]
QUESTIONS = ["What is {} + 4?", "{}加5等于多少？", "Is {} larger than 7?", "Next number: {}, 20, 30"]


@pytest.fixture
def collected(tmp_path):
    """A folder of 60 records as dedup leaves them, one of them over any window of the miniature's models."""
    questions = [QUESTIONS[n % 4].format(n) if n != 7 else "long " * 5000 for n in range(60)]
    return records(questions, tmp_path / "dedup")


def records(questions, folder):
    """A folder of records as dedup leaves them."""
    rows = []
    for n, question in enumerate(questions):
        prompt = [{"role": "user", "content": question}]
        row = {"id": record_id("tiny", prompt, "1"), "source": "tiny", "source_row": n, "language": "en"}
        rows.append(row | {"source_category": None, "prompt": prompt, "reply": "1", "category": "math", "rule_id": "m"})
    (folder / "records").mkdir(parents=True)
    schema = RECORD_SCHEMA.append(pa.field("category", pa.string())).append(pa.field("rule_id", pa.string()))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "records" / "part-00000.parquet")
    return folder


def stage(name, recipe, source, folder):
    """Runs one stage alone; gives its tables' rows and the manifest."""
    inputs = dict.fromkeys(pipeline.stage_module(name).INPUTS, source)
    pipeline.run_stage(Job(stage=name, recipe=recipe, run_dir=folder, folder=folder, inputs=inputs))
    manifest = json.loads((folder / "manifest.json").read_text())
    return read_table(folder / "records").to_pylist(), read_table(folder / "dropped").to_pylist(), manifest


def served(server, **more):
    settings = {"kind": "openai", "base_url": server.url, "model": "served", "tokenizer": "builtin:large"}
    return settings | {"concurrency": 8, "backoff": 0.01, "tries": 20} | more


def recipe_of(**engines):
    return load_recipe(MINIATURE, [*SMALL, f"engines={json.dumps(engines)}"])


def without_origin(rows, column):
    """Rows without what says who wrote a reply, and with which seed."""
    ours = {"model", "seed", "parameters", "tokens"}
    cut = []
    for row in rows:
        several = row[column] if isinstance(row[column], list) else [row[column]]
        cut.append(row | {column: [{k: v for k, v in reply.items() if k not in ours} for reply in several]})
    return cut


@pytest.mark.slow
def test_the_miniature_through_servers_equals_the_local_one(serve, collected, tmp_path):
    """Labels over HTTP with faults, large replies over HTTP, small ones and the judge here, then the judge there."""
    local = load_recipe(MINIATURE, SMALL)
    model = str(BUILTIN_MODELS / "large")
    server = serve(model=model, faults={"429": 0.1, "500": 0.05, "cut": 0.05, "garbage": 0.05}, seed=2)
    mixed = recipe_of(large=served(server), small={"kind": "local"}, judge={"kind": "local"})
    ours, gone, _ = stage("classify", local, collected, tmp_path / "local-classify")
    theirs, dropped, manifest = stage("classify", mixed, collected, tmp_path / "classify")
    assert [row["source_row"] for row in dropped] == [row["source_row"] for row in gone] == [7]
    assert without_origin(theirs, "label_generation") == without_origin(ours, "label_generation")
    assert {row["label_generation"]["model"] for row in theirs} == {"served"}
    assert {row["label_generation"]["model"] for row in ours} == {"builtin:large"}
    note = manifest["notes"]["engines"]["large"]
    assert note["replies"] >= 59 and note["reply_tokens"] > 0 and note["prompt_tokens"] > 0
    assert sum(note["failed_tries"].values()) == sum(server.stats()["faults"].values()) > 0
    assert not (tmp_path / "classify" / ".work").exists()

    ours, _, _ = stage("regenerate", local, tmp_path / "classify", tmp_path / "local-regenerate")
    theirs, _, manifest = stage("regenerate", mixed, tmp_path / "classify", tmp_path / "regenerate")
    assert without_origin(theirs, "replies") == without_origin(ours, "replies")
    assert list(manifest["notes"]["engines"]) == ["large"]
    assert {tuple(reply["model"] for reply in row["replies"]) for row in theirs} == {(None, "served", "builtin:small")}

    honest = serve(model=model)
    judged = recipe_of(large=served(server), small={"kind": "local"}, judge=served(honest))
    few = tmp_path / "few"
    few.mkdir()
    pq.write_table(read_table(tmp_path / "regenerate" / "records").slice(0, 10), few / "part-00000.parquet")
    ours, _, _ = stage("rate", mixed, few, tmp_path / "local-rate")
    theirs, _, _ = stage("rate", judged, few, tmp_path / "rate")
    assert len(theirs) == 10
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["instruction_safe"] == other["instruction_safe"]
        for a, b in zip(mine["ratings"], other["ratings"], strict=True):
            assert (a["tokens"], a["safety"], a["quality"]) == (b["tokens"], b["safety"], b["quality"])
            assert a["bits_per_token"] == pytest.approx(b["bits_per_token"], rel=1e-3, abs=1e-5)


def test_what_changes_no_reply_asks_for_none_again(serve, collected, tmp_path):
    """Another address, pace or key leaves a stage up to date; another model or extra parameter does not."""
    server = serve(model=str(BUILTIN_MODELS / "large"))
    inputs = {"dedup": collected}

    def key(**more):
        settings = recipe_of(large=served(server, **more))
        job = Job(stage="classify", recipe=settings, run_dir=tmp_path, folder=tmp_path / "x", inputs=inputs)
        return pipeline.job_key(job)

    assert key() == key(base_url="http://elsewhere/v1", concurrency=3, timeout=5, tries=2, backoff=3, api_key="KEY")
    assert (
        len({key(), key(model="other"), key(extra={"top_k": -1}), key(window=99), key(tokenizer="builtin:small")}) == 5
    )


def test_what_a_server_refuses_is_accounted_for_in_every_stage(serve, tmp_path):
    """No label: the row goes, and says why. No reply: an empty one that says why. No judgement: null."""
    words = ["HTTP 400: content filter", "HTTP 413: content filter", "finish reason 'abort'"]
    odd = ["What is BAD + 4?", "What is LARGE + 4?", "What is ABORT + 4?", "What is FILTER + 4?"]
    collected = records([*odd, "What is 3 + 4?", "What is CUT + 4?"], tmp_path / "dedup")
    server = serve(model=str(BUILTIN_MODELS / "large"))
    recipe = recipe_of(large=served(server), small={"kind": "local"}, judge=served(server))
    labelled, dropped, manifest = stage("classify", recipe, collected, tmp_path / "classify")
    reasons = {row["source_row"]: row["reason"] for row in dropped}
    for n, said in enumerate(words):
        assert reasons.pop(n).startswith(f"refused by the labelling model's server: {said}")
    # The filter's word is kept with what the model wrote before it, which may be a label.
    assert {row["source_row"]: row["label_generation"]["finish_reason"] for row in labelled} == {
        3: "content_filter",
        4: "stop",
        5: "length",
    }
    assert reasons == {}
    assert manifest["notes"]["engines"]["large"]["refused"] == 3
    assert manifest["notes"]["label_ends"] == {"content_filter": 1, "length": 1, "stop": 1}

    everything = [
        row | {k: labelled[0][k] for k in ("label", "label_reply", "label_generation")} for row in _rows(collected)
    ]
    whole = tmp_path / "whole"
    (whole / "records").mkdir(parents=True)
    schema = pq.read_schema(tmp_path / "classify" / "records" / "part-00000.parquet")
    pq.write_table(pa.Table.from_pylist(everything, schema=schema), whole / "records" / "part-00000.parquet")
    answered, dropped, manifest = stage("regenerate", recipe, whole, tmp_path / "regenerate")
    assert (len(answered), dropped) == (6, [])
    large = [row["replies"][1] for row in answered]
    assert [reply["finish_reason"] for reply in large] == ["refused"] * 3 + ["content_filter", "stop", "length"]
    assert [reply["text"] == "" for reply in large] == [True] * 3 + [False] * 3
    assert all(reply["refusal"].startswith(said) for reply, said in zip(large, words, strict=False))
    assert [reply["refusal"] for reply in large[3:]] == [None] * 3
    assert manifest["notes"]["reply_ends"]["large"] == {"refused": 3, "content_filter": 1, "length": 1, "stop": 1}
    assert set(manifest["notes"]["reply_ends"]["small"]) <= {"stop", "length"}

    rated, _, manifest = stage("rate", recipe, tmp_path / "regenerate", tmp_path / "rate")
    for row in rated:
        unread = row["source_row"] < 2  # the judge's server refuses to read these two at all
        assert (row["instruction_safe"] is None) == unread
        for reply, rating in zip(row["replies"], row["ratings"], strict=True):
            null = unread or not reply["text"]
            assert [rating[name] is None for name in ("perplexity", "safety", "quality")] == [null] * 3
    assert manifest["notes"]["engines"]["judge"]["refused"] > 0
    unrated = [None in rating.values() for row in rated for rating in row["ratings"]]
    assert manifest["notes"]["unrated_replies"] == sum(unrated) >= 2 * 3 + 1


def _rows(folder):
    return read_table(folder / "records").to_pylist()


def test_the_rows_outside_a_sample_keep_their_own_shards(serve, tmp_path, monkeypatch):
    """However many shards they take: the rows that go later are written behind them."""
    monkeypatch.setattr(store, "ROWS_PER_CHECK", 4)
    monkeypatch.setattr(store, "BYTES_PER_SHARD", 1000)
    monkeypatch.setattr(classify, "parse_label", lambda reply: "Even-Number" if reply[-1] in "02468" else None)
    collected = records([f"question {n}" for n in range(60)], tmp_path / "dedup")
    recipe = load_recipe(MINIATURE, ["classify.sample=20", f"engines={json.dumps({'large': served(serve())})}"])
    labelled, dropped, _ = stage("classify", recipe, collected, tmp_path / "classify")
    assert len(shards(tmp_path / "classify" / "dropped")) == 4 + 1
    assert sorted(row["source_row"] for row in [*labelled, *dropped]) == list(range(60))
    unparsed = sum(row["reason"] == "unparsed label" for row in dropped)
    assert 0 < unparsed < 20 and len(labelled) == 20 - unparsed


PROGRAM = "from slmfast.cli import main; import sys; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
def test_a_killed_stage_goes_on_and_ends_with_the_same_bytes(serve, collected, tmp_path):
    """Killed twice while a server answers; in the end every prompt was answered once and nothing is lost."""
    server = serve(seconds=0.05)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe_of(large=served(server, concurrency=2))))

    def command(folder):
        options = ["--recipe", tmp_path / "recipe.yaml", "-o", folder]
        return [sys.executable, "-c", PROGRAM, "classify", collected, *options]

    def finish(name):
        """To the end, where the stage says that it keeps nothing: none of these replies is a label."""
        ended = subprocess.run(command(tmp_path / name), capture_output=True, text=True, check=False)
        assert ended.returncode == 2 and "59 go for: unparsed label" in ended.stderr

    for target in (10, 40):
        process = subprocess.Popen(command(tmp_path / "killed"), start_new_session=True)
        while sum(server.stats()["answered"].values()) < target:
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finish("killed")
    asked = server.stats()["asked"]
    # "reply to ..." is no label, so each prompt is asked twice; what was in flight at a kill is asked once more.
    assert len(asked) == 59 and 2 * 59 <= sum(asked.values()) <= 2 * 59 + 2 * 2
    finish("whole")
    for table in ("records", "dropped"):
        pairs = list(zip(shards(tmp_path / "killed" / table), shards(tmp_path / "whole" / table), strict=True))
        assert table == "records" or pairs
        assert all(a.read_bytes() == b.read_bytes() for a, b in pairs)


@pytest.mark.parametrize("name", ["classify", "regenerate"])
def test_a_stage_that_keeps_nothing_says_why(name, tmp_path):
    """And not a later one, in words about something else; it is not taken for done."""
    source = records(["What is 3 + 4?", "What is 4 + 5?", "And 5 + 6?"], tmp_path / "in")
    longest = {"classify": 5000, "regenerate": 1023}[name]
    recipe = load_recipe(None, [f"{name}.max_new_tokens={longest}", "classify.sample=2"])
    job = Job(name, recipe, tmp_path, tmp_path / "out", dict.fromkeys(("dedup", "diversify"), source))
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{name} keeps no record \([23] go for: over the .* window.*\)"):
            pipeline.run_stage(job)


def test_replies_as_long_as_the_window_are_refused(tmp_path):
    source = records(["What is 3 + 4?"], tmp_path / "in")
    recipe = load_recipe(None, ["regenerate.max_new_tokens=1024"])
    job = Job("regenerate", recipe, tmp_path, tmp_path / "out", {"diversify": source})
    with pytest.raises(UserError, match=r"regenerate\.max_new_tokens: 1,024 leave no room .* window of 1,024 tokens"):
        pipeline.run_stage(job)


def test_the_next_units_are_begun_before_one_is_due():
    begun = []

    def units():
        for number in range(8):
            done = number in (2, 3)
            if not done:
                begun.append(number)
            yield _Unit(number, 10, None if done else ([number], None))

    seen = [(unit.number, max(begun)) for unit in _looked_ahead(units(), 15)]
    assert [number for number, _ in seen] == list(range(8))
    assert seen[0] == (0, 4), "20 rows behind it, those that are done not counted"
    assert seen[4] == (4, 6)
    alone = _looked_ahead(units(), 0)
    begun.clear()
    assert next(alone).number == 0 and begun == [0], "an engine that wants nothing ahead is told nothing ahead"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["models.engine=openai"], r"key engines\.large\.base_url: name the server"),
        (["engines.large.kind=magic"], r"section engines\.large: kind: use local or openai or vllm"),
        (["engines.large.base_url=http://x/v1"], r"engines\.large\.kind: say openai"),
        (["engines.large={kind: openai, base_url: 'http://x'}"], r"engines\.large\.model: give the name"),
        (["engines.large={kind: openai, base_url: 'http://x', model: m}"], r"engines\.large\.tokenizer: give its"),
        (["engines.judge={kind: openai}"], r"engines\.judge\.base_url: name"),
        (["engines.small={kind: openai, base_url: localhost}"], r"engines\.small: base_url: give the server's address"),
        *[
            ([f"engines.small={{base_url: '{url}'}}"], r"engines\.small: base_url: give the server's address")
            for url in ("http:///v1", "http://a..b/v1", "http://x:99999/v1", "http://x:0", "http://[::1/v1")
        ],
        (["engines.small.timeout=.inf"], r"engines\.small: timeout: give a positive"),
        (["engines.small.backoff=.inf"], r"engines\.small: backoff: give zero or more"),
        (["engines.small.extra.since=2024-01-01"], r"engines\.small: extra: give what JSON can hold"),
        (["engines.small.extra.top_k=.nan"], r"engines\.small: extra: give what JSON can hold"),
        (["engines.small={base_url: 'http://me:word@x'}"], "without a user, password or query"),
        (["engines.small={base_url: 'http://x/v1?key=123abc'}"], r"engines\.small: base_url: .* without .* or query"),
        (["engines.small.api_key=123456"], r"engines\.small\.api_key: give a text, not something else"),
        (["engines.small.api_key=[123abc"], r"--set engines\.small\.api_key: the value is not YAML"),
        (
            ["engines.small.extra={headers: [{X-Api-Key: 123abc}]}"],
            r"extra\.X-Api-Key: name a key's environment variable",
        ),
        (
            ["engines.small={kind: local, concurrency: 3}"],
            r"engines\.small\.concurrency: leave it out: an engine of kind local",
        ),
        (["engines.small={timeout: 3}"], r"engines\.small\.timeout: leave it out: an engine of kind local"),
        (["engines.small.api_key=sk-123abc"], r"engines\.small: api_key: name the environment variable"),
        (["engines.small.concurrency=0"], r"engines\.small: concurrency: give a positive"),
        (["engines.small.timeout=0"], r"engines\.small: timeout: give a positive"),
        (["engines.small.tries=0"], r"engines\.small: tries: give a positive"),
        (["engines.small.backoff=-1"], r"engines\.small: backoff: give zero or more"),
        (["engines.small.window=1"], r"engines\.small: window: give at least 2"),
        (["engines.small.extra.seed=3"], r"engines\.small: extra\.seed: leave it out"),
        (["engines.small.url=x"], r"engines\.small\.url is unknown"),
        (["engines.medium.kind=local"], r"engines\.medium is unknown: the keys here are large, small, judge"),
    ],
)
def test_a_wrong_engine_names_key_and_remedy(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(MINIATURE, overrides)
    assert "\n" not in str(caught.value) and "123abc" not in str(caught.value) and ":word" not in str(caught.value)


def test_who_runs_a_role():
    server = "{kind: openai, base_url: 'http://x/v1', model: m, tokenizer: 'builtin:large', extra: {top_k: -1}}"
    recipe = load_recipe(MINIATURE, [f"engines.large={server}"])
    assert recipe.engine("judge") == recipe.engine("large"), "a judge that is named nowhere is the large model"
    assert recipe.engine("small").kind == "local"
    assert (
        load_recipe(MINIATURE, [f"engines.large={server}", "models.judge=builtin:base"]).engine("judge").kind == "local"
    )
    named = load_recipe(MINIATURE, [f"engines.large={server}", "engines.judge.kind=local"])
    assert named.engine("judge").kind == "local"
    assert load_recipe(MINIATURE).engines == Engines()
    everywhere = ["models.engine=openai", "models.large=a/b", "models.small=c/d", "engines.large.base_url=http://x"]
    recipe = load_recipe(MINIATURE, [*everywhere, "engines.small.base_url=http://y"])
    assert (recipe.engine("small").model, recipe.engine("small").tokenizer) == ("c/d", "c/d")


def test_a_recipe_with_servers_comes_back_from_its_own_text(tmp_path):
    server = "{kind: openai, base_url: 'http://x/v1', model: m, tokenizer: 'builtin:large', extra: {a: {b: [1, null]}}}"
    recipe = load_recipe(MINIATURE, [f"engines.large={server}"])
    (tmp_path / "copy.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "copy.yaml") == recipe


def test_a_key_that_is_not_set_stops_a_run_before_it_starts(tmp_path):
    server = "{kind: openai, base_url: 'http://x/v1', model: m, tokenizer: 'builtin:large', api_key: SLMFAST_NO_KEY}"
    recipe = load_recipe(MINIATURE, [f"engines.large={server}"])
    with pytest.raises(UserError, match=r"engines\.large\.api_key: the environment variable SLMFAST_NO_KEY is not set"):
        pipeline.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
