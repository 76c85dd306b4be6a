"""The search for fusion weights: its grid, its winner against brute force, and that no test item chooses weights."""

import json
import math
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from slmfast import fusion_search
from slmfast.cli import main
from slmfast.errors import UserError
from slmfast.evaluation import Evaluation, suite
from slmfast.fusion import fuse
from slmfast.fusion_search import grid, search
from slmfast.job import BUILTIN_MODELS
from slmfast.recipe import Evaluate

DEVELOPMENT = Evaluate(tasks=["first", "second"])


def test_the_grid_is_every_way_to_share():
    for models, step, steps in ((2, 0.25, 4), (3, 0.1, 10), (4, 0.5, 2), (2, 1, 1)):
        points = grid(models, step)
        assert len(points) == len(set(points)) == math.comb(steps + models - 1, models - 1)
        assert all(sum(point) == steps and min(point) >= 0 for point in points)
    for step in (0.3, 0, -1, 2, float("nan")):
        with pytest.raises(UserError, match=r"--step .* does not divide 1"):
            grid(3, step)


@pytest.fixture
def models(tmp_path):
    """Three models of a single tensor: the corners of a triangle."""
    import torch

    made = []
    for number in range(3):
        folder = tmp_path / f"S{number + 1}"
        folder.mkdir()
        corner = torch.zeros(3)
        corner[number] = 1.0
        save_file({"w": corner}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        made.append(folder)
    return made


@pytest.fixture
def hill(monkeypatch):
    """A scorer whose score is highest at known weights; it counts what it was asked."""
    asked = []
    summit = np.array([0.2, 0.3, 0.5])

    def evaluate(model, settings, folder, cache):
        found = load_file(f"{model}/model.safetensors")["w"].numpy()
        asked.append(tuple(np.round(found, 6)))
        if len(asked) == evaluate.fails_at:
            raise KeyboardInterrupt
        value = 1 - float(np.abs(found - summit).sum())
        scores = {task: {"value": value + plus, "stderr": 0.3, "n": 4} for task, plus in (("first", 0), ("second", 1))}
        items = [{"task": task, "item": i, "value": value * (i % 2)} for task in scores for i in range(4)]
        return Evaluation(scores, items, {})

    evaluate.fails_at = None
    evaluate.asked = asked
    monkeypatch.setattr(fusion_search, "evaluate_model", evaluate)
    return evaluate


def test_the_best_point_becomes_the_model(models, hill, tmp_path):
    output = tmp_path / "best"
    found = search(models, output, DEVELOPMENT, step=0.1)
    assert len(hill.asked) == len(set(hill.asked)) == len(found["points"]) == 66
    assert found["winner"]["weights"] == pytest.approx([0.2, 0.3, 0.5])
    assert found["winner"]["value"] == max(point["value"] for point in found["points"])
    assert json.loads((output / "fusion_search.json").read_text()) == json.loads(json.dumps(found))
    for point in found["points"]:
        distance = np.abs(np.array(point["weights"]) - [0.2, 0.3, 0.5]).sum()
        assert point["value"] == pytest.approx(1.5 - distance, abs=1e-6)
        assert point["stderr"] == pytest.approx((0.3**2 + 0.3**2) ** 0.5 / 2) and set(point["tasks"]) == {
            "first",
            "second",
        }
    card = json.loads((output / "fusion.json").read_text())
    assert [part["name"] for part in card["parts"]] == ["S1", "S2", "S3"]
    assert [part["weight"] for part in card["parts"]] == pytest.approx([0.2, 0.3, 0.5])
    fuse(dict(zip(models, (2, 3, 5), strict=True)), tmp_path / "plain")
    assert (output / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert found["winner"]["best_single"] == str(models[2])
    lead = [(1.0 - 0.0) * (i % 2) for i in range(4)]  # value of the winner less that of S3, at every item of a task
    assert found["winner"]["lead"] == pytest.approx(1.0, abs=1e-6)
    assert found["winner"]["lead_stderr"] == pytest.approx(np.std(lead, ddof=1) / 2 / 2**0.5, abs=1e-6)


def test_a_search_that_was_cut_off_goes_on(models, hill, tmp_path):
    hill.fails_at = 5
    with pytest.raises(KeyboardInterrupt):
        search(models, tmp_path / "best", DEVELOPMENT, step=0.5)
    assert not (tmp_path / "best" / "fusion.json").exists()
    hill.fails_at = None
    found = search(models, tmp_path / "best", DEVELOPMENT, step=0.5)
    assert len(hill.asked) == 7 and len(found["points"]) == 6  # the fifth was asked twice
    assert not (tmp_path / "best" / ".work").exists()
    hill.fails_at = 7 + 3
    with pytest.raises(KeyboardInterrupt):
        search(models, tmp_path / "other", DEVELOPMENT, step=0.5)
    hill.fails_at = None
    search(models, tmp_path / "other", Evaluate(tasks=["first", "second"], limit=3), step=0.5)
    assert len(hill.asked) == 7 + 3 + 6  # other settings: no point of the first search counts


def test_a_search_that_has_ended_is_not_made_again_nor_replaced(models, hill, tmp_path):
    best = tmp_path / "best"
    found = search(models, best, DEVELOPMENT, step=0.5)
    before = {path.name: path.read_bytes() for path in best.iterdir()}
    again = search(models, best, DEVELOPMENT, step=0.5)
    assert again == json.loads(json.dumps(found)) and len(hill.asked) == 6
    fuse({models[0]: 1, models[1]: 1}, tmp_path / "plain")
    for output, step in ((best, 0.1), (tmp_path / "plain", 0.5)):
        with pytest.raises(UserError, match="holds another fused model: give another output"):
            search(models, output, DEVELOPMENT, step=step)
    assert len(hill.asked) == 6  # refused before any point
    assert {path.name: path.read_bytes() for path in best.iterdir()} == before


def test_equal_scores_go_to_the_even_average(models, monkeypatch, tmp_path):
    scores = {"first": {"value": 0.5, "stderr": None, "n": 1}}
    monkeypatch.setattr(fusion_search, "evaluate_model", lambda *_: Evaluation(scores, [], {}))
    found = search(models[:2], tmp_path / "best", DEVELOPMENT, step=0.25)
    assert found["winner"] == found["winner"] | {"weights": (0.5, 0.5), "lead": 0.0, "lead_stderr": None}
    assert found["winner"]["stderr"] is None


def _tasks(folder, name, questions):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '${{DATA}}/{name}.jsonl'}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{gold}}'\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )


def _row(number, **more):
    return {"question": f"Which is {number}?", "choices": ["3", "7"], "gold": number % 2, **more}


def test_an_item_of_the_test_chooses_no_weights(models, hill, tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    _tasks(folder, "dev", [_row(n) for n in range(4)])
    _tasks(folder, "other", [_row(n, id=n) for n in range(10, 14)])
    _tasks(folder, "held", [_row(9, id="x"), _row(2, id="y") | {"question": "which  is\n２?"}])
    where = {"task_folder": str(folder), "data": str(folder)}
    development = Evaluate(tasks=["dev"], **where)
    with pytest.raises(
        UserError, match=r"1 of 4 development items are test items too \(item 2 of dev is item 1 of held"
    ):
        search(models, tmp_path / "best", development, test=Evaluate(tasks=["other", "held"], **where))
    assert not hill.asked and not (tmp_path / "best").exists()
    with pytest.raises(UserError, match="4 of 4 development items"):
        search(models, tmp_path / "best", development, test=development)
    found = search(models, tmp_path / "best", development, step=0.5, test=Evaluate(tasks=["other"], **where))
    assert len(found["points"]) == 6


def test_a_step_that_is_no_binary_fraction_has_its_corners(models, hill, tmp_path):
    found = search(models[:2], tmp_path / "best", DEVELOPMENT, step=0.3333333333)
    assert [point["weights"] for point in found["points"]] == [(1.0, 0.0), (2 / 3, 1 / 3), (1 / 3, 2 / 3), (0.0, 1.0)]


def test_the_questions_of_humaneval_are_read_without_a_metric_that_runs_them(models, hill, tmp_path, monkeypatch):
    folder = tmp_path / "tasks"
    folder.mkdir()
    _tasks(folder, "dev", [_row(n) for n in range(4)])
    item = {"prompt": "def f():\n", "test": "def check(f): pass", "entry_point": "f"}
    (folder / "he.jsonl").write_text(json.dumps(item) + "\n")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "he.jsonl")}}}
    monkeypatch.setattr(suite, "_local", lambda *given: data)
    development = Evaluate(tasks=["dev"], task_folder=str(folder), data=str(folder))
    test = Evaluate(tasks=["humaneval"], run_generated_code=True)
    assert len(search(models, tmp_path / "best", development, step=1, test=test)["points"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["S1", "S2", "--search"], "--tasks is missing"),
        (["S1=0.5", "--search", "--tasks", "dev"], "name the model folder alone"),
        (["S1", "S2", "--search", "--tasks", "dev", "--step", "0.3"], "--step 0.3 does not divide 1"),
        (["S1", "--search", "--tasks", "dev"], "name at least two models"),
        (["S1", "S2", "--search", "--tasks", "dev", "--dtype", "bfloat16"], "a search writes float32"),
        (["S1", "S2", "--search", "--tasks", "humaneval"], "run_generated_code"),
        (["S1=1", "--tasks", "dev"], "add --search"),
        (["S1=1", "--step", "0.5"], "add --search"),
    ],
)
def test_refusals(arguments, message, capsys, tmp_path):
    assert main(["fuse", *arguments, "-o", str(tmp_path / "best")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_command_searches_with_real_models_and_tasks(tmp_path, capsys):
    folder = tmp_path / "tasks"
    folder.mkdir()
    _tasks(folder, "dev", [_row(n) for n in range(4)])
    _tasks(folder, "held", [_row(n) for n in range(10, 12)])
    first = BUILTIN_MODELS / "small"
    second = tmp_path / "second"
    shutil.copytree(first, second)
    weights = {name: tensor * 1.01 for name, tensor in load_file(first / "model.safetensors").items()}
    save_file(weights, second / "model.safetensors", metadata={"format": "pt"})
    where = ["--task-folder", str(folder), "--data", str(folder), "--step", "0.5", "-o", str(tmp_path / "best")]
    assert main(["fuse", str(first), str(second), "--search", "--tasks", "dev", "--test-tasks", "held", *where]) == 0
    said = capsys.readouterr().out
    assert not (tmp_path / ".best.lock").exists()
    assert "point 3 of 3, weights 0 1" in said and "lead over the best single model" in said
    found = json.loads((tmp_path / "best" / "fusion_search.json").read_text())
    assert [point["weights"] for point in found["points"]] == [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    assert all(0 <= point["value"] <= 1 and point["tasks"]["dev"]["n"] == 4 for point in found["points"])
    assert (tmp_path / "best" / "tokenizer.json").exists() and (tmp_path / "best" / "fusion.json").exists()
