"""Real items of mmlu, cmmlu, gsm8k and HumanEval: ours equals HFLM item by item, at Qwen2-0.5B's widths."""

from pathlib import Path

import pytest
import torch

from slmfast.evaluation import task_folder
from slmfast.evaluation.language_model import PackedLM
from slmfast.job import BUILTIN_MODELS
from slmfast.recipe import Evaluate
from slmfast.scoring.loading import load_model, load_tokenizer


@pytest.fixture(scope="module")
def subject(real_data):
    """Two layers of Qwen2-0.5B's shape with random weights whose predictions are not uniform, and its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer, Qwen2ForCausalLM

    config = AutoConfig.from_pretrained(real_data / "qwen2-0.5b")
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                size = 3.0 if len(weight) == config.vocab_size else 1.0
                weight.normal_(0, size / weight.shape[1] ** 0.5)
    return model, AutoTokenizer.from_pretrained(real_data / "qwen2-0.5b")


@pytest.fixture
def few_subjects(monkeypatch):
    """mmlu and cmmlu of one subject each: all of them would be 124."""
    from slmfast.evaluation import suite

    whole = suite._leaves
    chosen = ("mmlu_anatomy", "cmmlu_agronomy", "gsm8k")
    monkeypatch.setattr(suite, "_leaves", lambda *given: (name for name in whole(*given) if name in chosen))


@pytest.mark.slow
def test_choices(subject, real_data, tmp_path, hflm, answers, same, few_subjects):
    settings = Evaluate(suite="paper", tasks=["mmlu", "cmmlu"], limit=3)
    ours = answers(PackedLM(*subject), settings, tmp_path / "ours", data=real_data)
    theirs = answers(hflm(*subject), settings, tmp_path / "theirs", data=real_data)
    assert same(ours, theirs) == 6
    assert set(ours["n-shot"].values()) == {5}
    context = ours["samples"]["cmmlu_agronomy"][0]["arguments"][0][0]
    assert context.startswith("以下是关于农学的单项选择题") and context.count("答案：") == 6


@pytest.mark.slow
def test_generations(subject, real_data, tmp_path, hflm, answers, same, few_subjects, monkeypatch):
    from slmfast.evaluation import humaneval

    monkeypatch.setitem(humaneval.TASK["generation_kwargs"], "max_gen_toks", 12)
    monkeypatch.setitem(humaneval.TASK, "process_results", lambda doc, replies: {"pass@1": float(len(replies[0]))})
    settings = Evaluate(suite="paper", tasks=["gsm8k", "humaneval"], limit=2, run_generated_code=True)
    packed, harness = PackedLM(*subject), hflm(*subject)
    packed.max_gen_toks = 12
    type(harness).max_gen_toks = property(lambda self: 12)
    ours = answers(packed, settings, tmp_path / "ours", data=real_data)
    theirs = answers(harness, settings, tmp_path / "theirs", data=real_data)
    assert same(ours, theirs) == 6  # gsm8k has two filters
    assert ours["n-shot"] == {"gsm8k": 4, "humaneval": 0}
    question = ours["samples"]["gsm8k"][0]["arguments"][0][0]
    assert question.count("Question:") == 5 and question.endswith("Answer:")


@pytest.mark.slow
def test_a_whole_set_with_the_miniatures_model(real_data, tmp_path, hflm, answers, same):
    """Four subjects of cmmlu without worked examples, for which the miniature's window has no room, and some gsm8k."""
    folder = str(BUILTIN_MODELS / "small")
    small = load_model(folder, device="cpu"), load_tokenizer(folder)
    own = Path(__file__).parents[2] / "recipes" / "real-sample-tasks"
    tasks = task_folder(str(own), str(real_data), tmp_path / "tasks")
    whole, some = Evaluate(tasks=["real_cmmlu"]), Evaluate(tasks=["real_gsm8k"], limit=12)
    for settings, batch, items in ((whole, 32, 703), (some, 1, 12)):
        ours = answers(PackedLM(*small), settings, tmp_path / "ours", tasks)
        theirs = answers(hflm(*small, batch_size=batch), settings, tmp_path / "theirs", tasks)
        assert same(ours, theirs) == items
        for task in settings.tasks:
            assert ours["results"][task] == theirs["results"][task]
