"""The suite `paper`: its local items become the hub's own rows, settings are pinned, programs run if allowed."""

import csv
import json

import pyarrow.parquet as pq
import pytest

from slmfast.errors import UserError
from slmfast.evaluation import evaluate_model, humaneval, local_items, suite
from slmfast.evaluation.run import described, load_tasks
from slmfast.job import BUILTIN_MODELS
from slmfast.recipe import Evaluate, load_recipe
from slmfast.sandbox import Outcome, why_no_sandbox

ROWS = [  # fields that a reader which guesses types, or takes NA for nothing, would change
    ["Which is 1,0?", "1.0", "2", "NA", "3", "B"],
    ['He said "no".', "", "2020-01-01", "true", "None", "D"],
]


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture
def data(tmp_path):
    """Files of one subject of each benchmark, as their authors give them out."""
    root = tmp_path / "data"
    heading = ["", "Question", "A", "B", "C", "D", "Answer"]
    for split in ("dev", "test"):
        write_csv(root / "mmlu" / split / f"anatomy_{split}.csv", ROWS * 5)
        write_csv(root / "cmmlu" / split / "agronomy.csv", [heading, *([i, *row] for i, row in enumerate(ROWS * 5))])
    for split in ("dev", "val"):
        rows = [["id", "question", "A", "B", "C", "D", "answer", "explanation"], *([0, *row, "so"] for row in ROWS * 5)]
        write_csv(root / "ceval" / split / f"accountant_{split}.csv", rows)
    for split in ("train", "test"):
        lines = [json.dumps({"question": f"{i} + 1?", "answer": f"so\n#### {i + 1}"}) for i in range(9)]
        (root / "gsm8k").mkdir(exist_ok=True)
        (root / "gsm8k" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (root / "humaneval").mkdir()
    tasks = [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f'def f{i}(x):\n    """The same."""\n',
            "entry_point": f"f{i}",
            "canonical_solution": "    return x\n",
            "test": "def check(candidate):\n    assert candidate(1) == 1\n",
        }
        for i in range(3)
    ]
    (root / "humaneval" / "HumanEval.jsonl").write_text("\n".join(map(json.dumps, tasks)) + "\n")
    return root


ONLY = {"mmlu_anatomy", "cmmlu_agronomy", "ceval-valid_accountant", "gsm8k"}


def loaded(benchmark, data, tmp_path):
    (task,) = suite.load(benchmark, data, tmp_path / "scratch", only=ONLY)["tasks"].values()
    return task


@pytest.mark.parametrize(("benchmark", "answer"), [("mmlu", "answer"), ("cmmlu", "Answer"), ("ceval-valid", "answer")])
def test_choices_stay_the_text_that_they_are(data, tmp_path, benchmark, answer, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task = loaded(benchmark, data, tmp_path)
    docs = list(task.eval_docs)
    assert len(docs) == 10 and task.config.num_fewshot == 5
    for doc, (question, *choices, right) in zip(docs, ROWS, strict=False):
        own = doc["choices"] if benchmark == "mmlu" else [doc[letter] for letter in "ABCD"]
        assert own == choices
        assert doc[answer] == ("ABCD".index(right) if benchmark == "mmlu" else right)
        text = task.doc_to_text(doc)
        assert text.startswith(question) and f"\nA. {choices[0]}\nB. {choices[1]}\n" in text


def test_a_heading_with_numbered_choices_is_mmlu_too(tmp_path):
    file = tmp_path / "x.csv"
    numbered = [[q, *choices, "ABCD".index(right)] for q, *choices, right in ROWS]
    write_csv(file, [["question", "choice0", "choice1", "choice2", "choice3", "answer"], *numbered])
    write_csv(tmp_path / "y.csv", ROWS)
    for name in ("x", "y"):
        local_items.convert("mmlu", "test", tmp_path / f"{name}.csv", tmp_path / f"{name}.parquet")
    assert pq.read_table(tmp_path / "x.parquet") == pq.read_table(tmp_path / "y.parquet")


def test_local_files_that_are_missing_or_wrong_are_named(data, tmp_path):
    with pytest.raises(UserError, match=r"abstract_algebra_dev\.csv is missing: put mmlu's dev items there"):
        suite.local_files(["mmlu"], data)
    assert len(suite.local_files(["gsm8k", "humaneval", "another"], data)) == 3
    (data / "gsm8k" / "test.jsonl").write_text('{"question": "q"}\n')
    with pytest.raises(UserError, match=r"test\.jsonl does not hold gsm8k's items \('answer'\)"):
        loaded("gsm8k", data, tmp_path)
    write_csv(data / "mmlu" / "test" / "anatomy_test.csv", [["only", "three", "fields"]])
    with pytest.raises(UserError, match=r"anatomy_test\.csv does not hold mmlu's items"):
        loaded("mmlu", data, tmp_path)


def test_settings_are_pinned_and_told():
    whole = Evaluate(suite="paper", run_generated_code=True)
    assert described(whole) == (
        "suite paper: mmlu 5-shot, cmmlu 5-shot, ceval-valid 5-shot, humaneval 0-shot, gsm8k 4-shot; float32, bare "
        "text, greedy; data from the hub"
    )
    assert not whole.templated and Evaluate(tasks=["x"]).templated
    assert Evaluate(suite="paper", tasks=["mmlu"], chat_template=True).templated
    with pytest.raises(UserError, match=r"evaluate\.run_generated_code: humaneval runs programs that the model writes"):
        load_recipe(None, ["evaluate.suite=paper"])
    with pytest.raises(UserError, match=r"evaluate\.suite: use paper"):
        load_recipe(None, ["evaluate.suite=papers"])
    load_recipe(None, ["evaluate.suite=paper", "evaluate.tasks=[mmlu, gsm8k]"])


def test_every_subject_of_the_groups_is_there():
    sizes = {name: len(list(suite._leaves(suite._manager(name), name))) for name in ("mmlu", "cmmlu", "ceval-valid")}
    assert sizes == {"mmlu": 57, "cmmlu": 67, "ceval-valid": 52}


@pytest.fixture
def checked(monkeypatch):
    """What is to be run; nothing is. A body that returns x passes."""
    replies = []

    def check(doc, reply):
        replies.append((doc["task_id"], reply))
        return Outcome("return x" in reply, "")

    monkeypatch.setattr(humaneval, "check_completion", check)
    return replies


def test_a_reply_is_checked_behind_its_prompt(data):
    """In the sandbox, where this machine has one."""
    if reason := why_no_sandbox():
        pytest.skip(reason)
    docs = [json.loads(line) for line in (data / "humaneval" / "HumanEval.jsonl").read_text().splitlines()]
    assert humaneval.process_results(docs[1], ["    return x\n"]) == {"pass@1": 1.0}
    assert humaneval.process_results(docs[1], ["    return 2\n"]) == {"pass@1": 0.0}


def test_gsm8k_and_humaneval_end_to_end(data, checked, tmp_path, monkeypatch):
    monkeypatch.setitem(humaneval.TASK["generation_kwargs"], "max_gen_toks", 8)
    settings = Evaluate(suite="paper", tasks=["humaneval", "gsm8k"], limit=2, run_generated_code=True)
    result = evaluate_model(str(BUILTIN_MODELS / "small"), settings, None, tmp_path / "cache", data)
    assert set(result.scores) == {"humaneval", "gsm8k"}
    common = {"dtype": "float32", "chat_template": False, "limit": 2}
    assert result.settings == {
        "humaneval": {"shots": 0, "metric": "pass@1", "filter": "none"} | common,
        "gsm8k": {"shots": 4, "metric": "exact_match", "filter": "strict-match"} | common,
    }
    assert [(row["task"], row["item"]) for row in result.items] == [(t, i) for t in settings.tasks for i in (0, 1)]
    assert checked == [(f"HumanEval/{i}", result.items[i]["output"]) for i in (0, 1)]


def test_programs_of_other_tasks_are_refused(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "d.jsonl").write_text(json.dumps({"q": "1", "a": "1"}) + "\n")
    (tmp_path / "t" / "risky.yaml").write_text(
        "task: risky\nunsafe_code: true\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/d.jsonl}}}}\n"
        "output_type: generate_until\ntest_split: test\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    with pytest.raises(UserError, match="task risky runs programs that the model writes"):
        load_tasks(Evaluate(tasks=["risky"]), tmp_path / "t", tmp_path / "cache")
