"""Scores from a server are those of the local engine; what it can't score is null or refused."""

import numpy as np
import pytest

from slmfast import UserError
from slmfast.engines import open_engine
from slmfast.engines.openai import check_scoring
from slmfast.engines.settings import EngineSettings
from slmfast.job import BUILTIN_MODELS
from slmfast.recipe import load_recipe
from slmfast.study.plan import make_plan
from slmfast.study.runs import make_models


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


def test_an_answer_without_scores_between_others_is_asked_for_again(serve, engine_of):
    engine = engine_of(serve(model=str(BUILTIN_MODELS / "large"), faults={"scoreless": 0.3}, seed=2), concurrency=1)
    scores = engine.choose(["Is it?", "Or not?", "Who knows?"], [["yes", "no"]] * 3)
    assert np.isfinite(scores).all()
    assert engine.client.failures["an answer that can't be read"] > 0


def test_what_a_judge_can_do_is_asked_before_the_other_stages(serve, capsys):
    folder = BUILTIN_MODELS / "large"

    def ask(url):
        check_scoring(EngineSettings(kind="openai", base_url=url, model="served", tries=9), folder, "engines.judge")

    ask(serve(model=str(folder)).url)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"engines\.judge: .* can't score a given text"):
        ask(serve(model=str(folder), echo=False).url)
    ask("http://127.0.0.1:9/v1")  # not started yet
    assert "engines.judge is asked again when its stage begins" in capsys.readouterr().out


def test_a_study_asks_the_judge_before_what_its_seeds_share(serve, tmp_path):
    url = serve(model=str(BUILTIN_MODELS / "large"), echo=False).url
    judge = f"engines.judge={{kind: openai, base_url: '{url}', model: served, tokenizer: 'builtin:large'}}"
    tmp_path.joinpath("study").mkdir()
    with pytest.raises(UserError, match=r"engines\.judge: .* can't score a given text"):
        make_models(make_plan(load_recipe(BUILTIN_MODELS.parent / "recipe.yaml", [judge]), seeds=1), tmp_path / "study")
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["recipe.yaml"]
