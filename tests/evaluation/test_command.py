"""`slmfast evaluate`: what it prints and writes for several models."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from slmfast.cli import main
from slmfast.job import BUILTIN_MODELS
from slmfast.miniature.world import write_world


def test_two_models_side_by_side(tmp_path, capsys):
    write_world(tmp_path / "raw", size=200, seed=0)
    models = [f"{name}={BUILTIN_MODELS / name}" for name in ("base", "large")]
    tasks = ["--tasks", "mini_compare,mini_lexicon", "--task-folder", "builtin:miniature"]
    data, output = ["--data", str(tmp_path / "raw" / "eval")], tmp_path / "out" / "scores.json"
    assert main(["evaluate", *models, *tasks, *data, "--limit", "30", "-o", str(output)]) == 0
    said = capsys.readouterr().out
    assert (
        "evaluate: mini_compare, mini_lexicon; float32, chat template, greedy; of each task the first 30 items" in said
    )
    scores = json.loads(output.read_text())
    differences = json.loads((tmp_path / "out" / "scores.differences.json").read_text())
    assert [(row["model"], row["less"], row["task"]) for row in differences] == [
        ("large", "base", task) for task in ("mini_compare", "mini_lexicon")
    ]
    for row in differences:
        own = {name: scores[name][row["task"]]["value"] for name in scores}
        assert row["difference"] == pytest.approx(own["large"] - own["base"]) and row["n"] == 30
        assert f"{100 * row['difference']:+.1f}" in said
    settings = json.loads((tmp_path / "out" / "scores.settings.json").read_text())
    told = {"shots": 0, "metric": "acc", "filter": "none", "dtype": "float32", "chat_template": True, "limit": 30}
    assert settings["mini_compare"] == told
    items = pq.read_table(tmp_path / "out" / "scores.items" / "large.parquet").to_pylist()
    assert len(items) == 60
    chosen = [row for row in items if row["task"] == "mini_compare"]
    assert sum(row["value"] for row in chosen) / 30 == pytest.approx(scores["large"]["mini_compare"]["value"])
    assert all(len(json.loads(row["output"])) > 1 for row in chosen)


def test_an_earlier_difference_goes_and_a_folder_may_hold_an_equals_sign(tmp_path, capsys):
    """As do names twice, and commas without one."""
    write_world(tmp_path / "raw", size=200, seed=0)
    shutil.copytree(BUILTIN_MODELS / "small", tmp_path / "lr=1e-6" / "S1")
    tasks = ["--tasks", "mini_compare,mini_compare,", "--task-folder", "builtin:miniature", "--limit", "3"]
    data, output = ["--data", str(tmp_path / "raw" / "eval")], tmp_path / "out.json"
    (tmp_path / "out.differences.json").write_text("[]")
    for model in ("lr=1e-6/S1", "S1=lr=1e-6/S1"):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            assert main(["evaluate", model, *tasks, *data, "-o", str(output)]) == 0
        assert list(json.loads(output.read_text())) == ["S1"]
        assert list(json.loads(output.read_text())["S1"]) == ["mini_compare"]
    assert not (tmp_path / "out.differences.json").exists()


def test_low_precision_says_what_it_does_not_see(tmp_path, capsys):
    """A step that bf16 rounds away."""
    write_world(tmp_path / "raw", size=200, seed=0)
    models = [f"a={on_the_grid(tmp_path, 'a', 1.0)}", f"b={on_the_grid(tmp_path, 'b', 1 + 2**-12)}"]
    more = ["--task-folder", "builtin:miniature", "--data", str(tmp_path / "raw" / "eval"), "--dtype", "bfloat16"]
    assert (
        main(
            ["evaluate", *models, "--tasks", "mini_compare", "--limit", "4", *more, "-o", str(tmp_path / "scores.json")]
        )
        == 0
    )
    assert "evaluate: b, of whose update bfloat16 keeps 0.00% of the weights" in capsys.readouterr().out


def on_the_grid(tmp_path, name, factor):
    """The base model rounded to bf16, times a factor."""
    folder = tmp_path / name
    shutil.copytree(BUILTIN_MODELS / "base", folder)
    (file,) = folder.glob("*.safetensors")
    weights = {name: weight.bfloat16().float() * factor for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "name --tasks, or --suite paper"),
        (["--tasks", ","], "name --tasks, or --suite paper"),
        (["--suite", "papers"], "evaluate.suite: use paper"),
        (["--suite", "paper"], "humaneval runs programs that the model writes"),
        (["--tasks", "x", "--dtype", "int8"], "evaluate.dtype: use float32, bfloat16, float16"),
        (["--suite", "paper", "--tasks", "gsm8k", "--data", "/nowhere"], "/nowhere/gsm8k/train.jsonl is missing"),
    ],
)
def test_refusals_are_one_line(options, said, tmp_path, capsys):
    assert main(["evaluate", f"base={BUILTIN_MODELS / 'base'}", *options, "-o", str(tmp_path / "s.json")]) == 2
    line = capsys.readouterr().err.strip()
    assert said in line and "\n" not in line
