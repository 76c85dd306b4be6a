"""Evaluation through lm-eval against a plain forward pass, and its refusals."""

import json

import pytest

from slmfast.errors import UserError
from slmfast.evaluation import evaluate_model, task_folder
from slmfast.evaluation.metrics import score_metric
from slmfast.job import BUILTIN_MODELS
from slmfast.recipe import Evaluate

MODEL = str(BUILTIN_MODELS / "small")


def plain_choices(model, tokenizer, question, choices):
    """The log-probability of every choice after the rendered question, one forward each, no batching."""
    import torch

    turn = [{"role": "user", "content": question}]
    context = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(context, add_special_tokens=False)["input_ids"]
    scores = []
    for choice in choices:
        more = tokenizer(choice, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids + more])).logits[0, len(ids) - 1 : -1].double()
        scores.append(logits.log_softmax(-1)[range(len(more)), more].sum().item())
    return scores


@pytest.mark.slow
def test_multiple_choice_equals_a_plain_forward(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from slmfast.miniature.world import write_world

    write_world(tmp_path / "raw", size=200, seed=0)
    data = tmp_path / "raw" / "eval"
    folder = task_folder("builtin:miniature", str(data), tmp_path / "tasks")
    result = evaluate_model(MODEL, Evaluate(tasks=["mini_compare"], limit=25), folder, tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = [json.loads(line) for line in (data / "mini_compare.jsonl").read_text().splitlines()[:25]]
    expected = []
    for row in rows:
        scores = plain_choices(model, tokenizer, row["question"], row["choices"])
        expected.append(float(scores.index(max(scores)) == row["gold"]))
    assert [item["value"] for item in result.items] == expected
    score = result.scores["mini_compare"]
    assert score["n"] == 25
    assert score["value"] == pytest.approx(sum(expected) / 25)
    share = score["value"]
    assert score["stderr"] == pytest.approx((share * (1 - share) / 24) ** 0.5)


def test_refusals(tmp_path):
    with pytest.raises(UserError, match=r"holds no \*\.yaml task file"):
        task_folder(str(tmp_path), None, tmp_path / "tasks")
    (tmp_path / "x.yaml").write_text("task: x\ndataset_kwargs: {data_files: '${DATA}/x'}\n")
    with pytest.raises(UserError, match=r"evaluate\.data"):
        task_folder(str(tmp_path), None, tmp_path / "tasks")
    folder = task_folder(str(tmp_path), "/data", tmp_path / "tasks")
    assert "/data/x" in (folder / "x.yaml").read_text()
    with pytest.raises(UserError, match="knows no task no_such_task"):
        evaluate_model(MODEL, Evaluate(tasks=["no_such_task"]), folder, tmp_path / "cache")


def test_a_question_over_the_window_is_refused(tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"question": "字" * 4000, "answer": "1"}) + "\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "long.yaml").write_text(
        "task: long\ndataset_path: json\ndataset_kwargs: {data_files: {test: '${DATA}/long.jsonl'}}\n"
        "output_type: generate_until\ntest_split: test\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: ['<|im_end|>'], max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    folder = task_folder(str(tmp_path / "tasks"), str(tmp_path), tmp_path / "work")
    with pytest.raises(UserError, match="item 0 of task long takes"):
        evaluate_model(MODEL, Evaluate(tasks=["long"]), folder, tmp_path / "cache")


def task_of(folder, name, lines):
    folder.mkdir(exist_ok=True)
    (folder / "d.jsonl").write_text("\n".join(json.dumps({"q": f"{i}?", "a": str(i)}) for i in range(3)) + "\n")
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/d.jsonl}}}}\n"
        f"test_split: test\ndoc_to_text: '{{{{q}}}}'\ndoc_to_target: ' {{{{a}}}}'\n{lines}"
    )
    return folder


def test_a_score_is_a_mean_over_items_and_higher_where_better(tmp_path):
    """A perplexity beside an accuracy is passed over; alone it is refused before any model is read."""
    perplexity = "{metric: perplexity, aggregation: perplexity, higher_is_better: false}"
    accuracy = "{metric: acc, aggregation: mean, higher_is_better: true}"
    tasks = task_of(tmp_path / "t", "both", f"output_type: loglikelihood\nmetric_list: [{perplexity}, {accuracy}]\n")
    result = evaluate_model(MODEL, Evaluate(tasks=["both"]), tasks, tmp_path / "cache")
    assert result.settings["both"]["metric"] == "acc"
    assert result.scores["both"]["value"] == pytest.approx(sum(row["value"] for row in result.items) / 3)
    task_of(tmp_path / "t", "rolling", "output_type: loglikelihood_rolling\nmetric_list: [{metric: word_perplexity}]\n")
    with pytest.raises(UserError, match=r"task rolling has no metric that is a mean over items .*\(word_perplexity\)"):
        evaluate_model("nowhere", Evaluate(tasks=["rolling"]), tasks, tmp_path / "cache")


def test_a_group_is_scored_over_all_its_items(tmp_path):
    accuracy = "{metric: acc, aggregation: mean, higher_is_better: true}"
    for name in ("one", "two"):
        tasks = task_of(tmp_path / "t", name, f"output_type: loglikelihood\nmetric_list: [{accuracy}]\n")
    for name, weigh in (("whole", "true"), ("uneven", "false")):
        aggregated = f"aggregate_metric_list: [{{metric: acc, aggregation: mean, weight_by_size: {weigh}}}]\n"
        (tasks / f"{name}.yaml").write_text(f"group: {name}\ntask: [one, two]\n{aggregated}")
    result = evaluate_model(MODEL, Evaluate(tasks=["whole"]), tasks, tmp_path / "cache")
    assert result.scores["whole"]["n"] == len(result.items) == 6
    with pytest.raises(UserError, match="task uneven is a group that has no score"):
        evaluate_model("nowhere", Evaluate(tasks=["uneven"]), tasks, tmp_path / "cache")
    with pytest.raises(UserError, match="task tagged stands for several tasks"):
        score_metric("tagged", {"tasks": {}, "groups": {}})
