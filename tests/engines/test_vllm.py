"""The engine on vLLM, of which a module in its place tells what it was told; its replies are the local engine's."""

import sys
from types import SimpleNamespace

import pytest

from slmfast import pipeline
from slmfast.commands import MINIATURE
from slmfast.engines import open_engine
from slmfast.engines.settings import EngineSettings
from slmfast.errors import UserError
from slmfast.job import BUILTIN_MODELS
from slmfast.recipe import load_recipe

MODEL = str(BUILTIN_MODELS / "large")
PROMPTS = ["What is 3 + 4?", "3加4等于多少？", "What is 3 + 4?"]


@pytest.fixture
def told(monkeypatch):
    """What the module was told; it stands for vLLM while the test runs."""
    told = SimpleNamespace(llm=None, asked=[], ends={})

    class LLM:
        def __init__(self, **options):
            told.llm = options
            self.local = open_engine("local", options["model"], threads=1)
            self.tokenizer = self.local.encoder.tokenizer

        def generate(self, prompts, sampling, use_tqdm):
            assert use_tqdm is False and len(prompts) == len(sampling)
            answers = []
            for prompt, how in zip(prompts, sampling, strict=True):
                told.asked.append((prompt["prompt_token_ids"], how))
                reply = self.local.generate(["What is 3 + 4?"], max_new_tokens=how["max_tokens"])[0]
                reason = told.ends.get(len(told.asked), reply.finish_reason)
                output = SimpleNamespace(text=f" {reply.text}\n", finish_reason=reason, token_ids=range(reply.tokens))
                answers.append(SimpleNamespace(outputs=[output]))
            return answers

    module = SimpleNamespace(LLM=LLM, SamplingParams=dict, __version__="9.9")
    monkeypatch.setitem(sys.modules, "vllm", module)
    return told


def engine_of(**settings):
    return open_engine(EngineSettings(kind="vllm", **settings), MODEL, role="large", key="engines.large", store=None)


def test_what_vllm_is_told(told):
    engine, local = engine_of(extra={"tensor_parallel_size": 2}), open_engine("local", MODEL)
    assert told.llm is None, "the weights load at the first use"
    replies = engine.generate(PROMPTS, max_new_tokens=24, temperature=0.5, top_p=0.8, seed=3)
    assert told.llm == {
        "model": MODEL,
        "dtype": "bfloat16",
        "max_model_len": local.window,
        "trust_remote_code": False,
        "generation_config": "vllm",
        "tensor_parallel_size": 2,
    }
    assert [ids for ids, _ in told.asked] == local.encoder.prompts(PROMPTS)
    for _, how in told.asked:
        assert (how["temperature"], how["top_p"], how["max_tokens"]) == (0.5, 0.8, 24)
        assert how["stop_token_ids"] == [local.encoder.closing_token]
    assert [how["seed"] for _, how in told.asked] == [reply.seed for reply in replies]
    assert len({reply.seed for reply in replies}) == 3, "a prompt asked twice is answered twice"
    wanted = local.generate(PROMPTS[:1], max_new_tokens=24)[0]
    assert [(r.text, r.finish_reason, r.tokens) for r in replies] == [(wanted.text, "stop", wanted.tokens)] * 3
    assert engine.generate([], max_new_tokens=4) == []
    assert engine.notes() == {"kind": "vllm", "version": "9.9", "dtype": "bfloat16", "window": local.window}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_is_always_said(told, dtype):
    engine = engine_of(dtype=dtype, window=77)
    engine.generate(["a"], max_new_tokens=1)
    assert (told.llm["dtype"], told.llm["max_model_len"]) == (dtype, 77)
    with pytest.raises(UserError, match="dtype: use float32 or bfloat16"):
        EngineSettings(kind="vllm", dtype="auto")


def test_a_reply_that_vllm_gives_up_is_refused(told):
    told.ends = {2: "abort"}
    replies = engine_of().generate(PROMPTS, max_new_tokens=24)
    assert [reply.finish_reason for reply in replies] == ["stop", "refused", "stop"]
    assert (replies[1].text, replies[1].refusal) == ("", "finish reason 'abort'")


def test_it_gives_no_scores(told):
    for call in (lambda e: e.choose(["a"], [["b", "c"]]), lambda e: e.perplexity(["a"], [["b"]])):
        with pytest.raises(UserError, match=r"engines\.large\.kind: vllm gives no scores here: judge with"):
            call(engine_of())


def test_without_the_package_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"engines\.large\.kind: vllm is not installed .*: install it, or say local"):
        engine_of()


def test_without_the_package_no_run_begins(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    recipe = load_recipe(MINIATURE, ["engines.small.kind=vllm"])
    with pytest.raises(UserError, match=r"engines\.small\.kind: vllm is not installed: install it, or say local"):
        pipeline.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_judge_that_gives_no_scores_stops_a_run_that_needs_one():
    for given in (["models.engine=vllm"], ["engines.large.kind=vllm"], ["engines.judge.kind=vllm"]):
        recipe = load_recipe(MINIATURE, [*given, "diversify.audit=10"])
        recipe.require_complete("classify")
        for last in ("diversify", "rate", None):
            with pytest.raises(UserError, match=r"engines\.judge\.kind: vllm gives no scores here"):
                recipe.require_complete(last)
    load_recipe(MINIATURE, ["engines.large.kind=vllm"]).require_complete("regenerate")
    load_recipe(MINIATURE, ["engines.large.kind=vllm", "engines.judge.kind=local"]).require_complete()


def test_a_recipe_may_name_it():
    given = ["engines.large={kind: vllm, dtype: float32, extra: {seed: 1}}", "engines.judge.kind=local"]
    with pytest.raises(UserError, match=r"extra\.seed"):
        load_recipe(MINIATURE, given)
    recipe = load_recipe(MINIATURE, ["engines.large={kind: vllm, dtype: float32}", "engines.judge.kind=local"])
    assert (recipe.engine("large").kind, recipe.engine("large").dtype) == ("vllm", "float32")
    assert recipe.engine("small").kind == recipe.engine("judge").kind == "local"
    with pytest.raises(UserError, match=r"engines\.large\.concurrency: leave it out: an engine of kind vllm"):
        load_recipe(MINIATURE, ["engines.large={kind: vllm, concurrency: 3}"])
