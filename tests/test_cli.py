"""The command line as a user meets it: what works prints its result, what can't is one line and exit code 2."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import slmfast
from slmfast.cli import main


def outcome(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.strip()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "nowhere.yaml"], "no recipe at nowhere.yaml"),
        (["run", "--set", "dedup.kk=1"], "did you mean dedup.k?"),
        (["run", "--until", "sleep"], "the stages are collect"),
        (["run", "--set", "models.base=/no/such/model"], "recipe key models.base: no model at /no/such/model"),
        (["run", "--set", "models.small=builtin:tiny"], "there is no builtin:tiny"),
        (["run", "--set", "models.engine=magic"], "recipe key models.engine: use local"),
        (["status", "nowhere"], "nowhere holds no run"),
        (["report", "nowhere"], "nowhere holds no finished stage"),
        (["collect", "nowhere.json", "--format", "alpaca", "-o", "out"], "nowhere.json"),
        (["diversify", "nowhere", "-o", "out"], "nowhere is not a folder"),
        (["dedup", "nowhere.parquet", "--column", "text", "-o", "out"], "nowhere.parquet does not exist"),
        (["dedup", "table.xlsx", "--column", "text", "-o", "out"], "give a file that ends in"),
        (["dedup", "table.csv", "other.csv", "-o", "out"], "other.csv: files need --column"),
        (["dedup", "nowhere", "-o", "out"], "nowhere is not a folder"),
        (["dedup", "t.csv", "--column", "text", "-o", "out", "--k", "9"], "give a distance from 0 to 8"),
        (["dedup", "t.csv", "--column", "text", "-o", "out", "--threads", "-1"], "recipe key threads"),
        (["dedup", "t.csv", "--column", "text", "-o", "out", "--verify", "nan"], "give a share from 0 to 1"),
        (["dedup", "t.csv", "--column", "a", "-o", "out", "--verify", "0.5", "--no-verify"], "give one of them"),
        (["dedup", "t.csv", "--column", "a", "-o", "out", "--k", "9"], "--k is 9: give a distance from 0 to 8"),
        (["dedup", "t.csv", "--column", "a", "-o", "out", "--verify", "2"], "give a share from 0 to 1, or --no-verify"),
        (["fuse", "S1", "-o", "out"], "write MODEL=WEIGHT"),
        (["fuse", "S1=half", "-o", "out"], "the weight is not a number"),
        (["fuse", "nowhere=1", "-o", "out"], "nowhere"),
        (["fuse", "S1=1", "./S1=2", "-o", "out"], "is named twice"),
        (["train", "sft", "data", "--model", "m", "-o", "out", "--set", "learning_rate=["], "not YAML"),
        (["train", "sft", "data", "--model", "nowhere", "-o", "out", "--set", "learning_rate=1e-5"], "nowhere"),
        (["train", "sft", "data", "--model", "m", "-o", "out"], "learning_rate: is missing"),
        (["train", "sft", "data", "--model", "m", "-o", "out", "--set", "learning_rate"], "write key=value"),
        (["train", "sft", "d", "--model", "m", "-o", "o", "--reference", "r"], "only KTO has a reference model"),
        (["train", "sft", "d", "--model", "m", "-o", "o", "--set", "method=kto"], "the word after train"),
        (["train", "sft", "d", "--model", "m", "-o", "o", "--set", "learning_rate=1", "--set", "budget=3e9"], "budget"),
        (["plan", "m", "--set", "method=sft"], "a plan is told it by --method sft"),
        (["plan", "m", "--set", "budget=8GiB"], "a plan is told it by --budget 8GiB"),
        (["evaluate", "x=/no/model", "--tasks", "gsm8k", "-o", "out"], "/no/model is not a model folder"),
    ],
)
def test_a_user_error_is_one_line(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = outcome(capsys, *arguments)
    assert code == 2
    assert expected in error
    assert error.startswith("slmfast: ")
    assert len(error.splitlines()) == 1


def test_an_unset_data_folder_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("SLMFAST_DATA", raising=False)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "collect: {sources: [{name: a, format: alpaca, path: '${SLMFAST_DATA}/a.json'}]}\nevaluate: {tasks: [mmlu]}\n"
    )
    code, _, error = outcome(capsys, "run", recipe, "--run-dir", tmp_path / "run")
    assert code == 2
    assert "SLMFAST_DATA" in error.splitlines()[-1]


def test_stages_work_one_by_one(capsys, tmp_path):
    raw = tmp_path / "raw.jsonl"
    rows = [{"instruction": f"What is the colour of number {i}?", "input": "", "output": "Blue."} for i in range(40)]
    raw.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]) + "{broken\n")
    for command in (
        ["collect", raw, "--format", "alpaca", "-o", tmp_path / "collect"],
        ["categorize", tmp_path / "collect", "-o", tmp_path / "categorize"],
        ["dedup", tmp_path / "categorize", "-o", tmp_path / "dedup"],
    ):
        code, out, _ = outcome(capsys, *command)
        assert code == 0, out
        if command[0] == "collect":
            assert "         1  rejected: broken JSON at column …: Expecting property name" in out
    assert "         8  dropped: near-duplicate" in out
    assert "up to date" in outcome(capsys, *command)[1]
    counts = json.loads((tmp_path / "collect" / "manifest.json").read_text())["counts"]
    assert counts == {"rows_in": 42, "out": 41, "dropped": 0, "rejected": 1}
    counts = json.loads((tmp_path / "dedup" / "manifest.json").read_text())["counts"]
    assert counts["rows_in"] == 41 == counts["out"] + counts["dropped"]
    assert counts["dropped"] >= 1


def test_an_unfinished_run_has_a_report_of_what_ended(capsys, tmp_path):
    raw, run = tmp_path / "raw.jsonl", tmp_path / "run"
    raw.write_text("".join(json.dumps({"instruction": f"Name {i} towns", "output": "x"}) + "\n" for i in range(9)))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"collect: {{sources: [{{name: a, format: alpaca, path: '{raw}'}}]}}\n")
    models = [f"--set=models.{role}=builtin:{role}" for role in ("base", "large", "small")]
    assert outcome(capsys, "run", recipe, "--run-dir", run, "--until", "categorize", *models)[0] == 0
    (run / "dedup").mkdir()
    shutil.copytree(run / "categorize" / "records", run / "dedup" / "records")  # as a kill leaves it
    code, out, error = outcome(capsys, "report", run)
    assert code == 0, error
    assert "not in it, for they have not ended: dedup, classify" in out
    page = (run / "report" / "report.md").read_text(encoding="utf-8")
    assert "Not in this report: dedup, classify" in page and "after dedup" not in page.partition("## Settings")[0]
    assert "| categorize | 9 |" in page and not (run / "summary.json").exists()
    assert outcome(capsys, "run", recipe, "--run-dir", run, "--until", "dedup", *models)[0] == 0
    raw.write_text(raw.read_text().partition("\n")[0])
    assert outcome(capsys, "run", recipe, "--run-dir", run, "--until", "collect", *models)[0] == 0
    code, out, error = outcome(capsys, "report", run)  # of other records than collect has now, nothing is told
    assert "they have not ended: classify" in out and "they are out of date: categorize, dedup" in out, error
    page = (run / "report" / "report.md").read_text(encoding="utf-8")
    assert "Not in this report: categorize, dedup" in page and "| categorize |" not in page


def test_a_stage_does_not_overwrite_other_files(capsys, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    raw = tmp_path / "raw.jsonl"
    raw.write_text('{"instruction": "a b c d e f", "output": "x"}\n')
    code, _, error = outcome(capsys, "collect", raw, "--format", "alpaca", "-o", tmp_path)
    assert code == 2
    assert "holds other files" in error
    assert (tmp_path / "letter.txt").read_text() == "dear"


@pytest.fixture
def records(capsys, tmp_path):
    """A folder of ten records, as collect writes it."""
    raw = tmp_path / "raw.jsonl"
    lines = [json.dumps({"instruction": f"Name colour number {i}, please.", "output": "Blue."}) for i in range(10)]
    raw.write_text("\n".join(lines) + "\n")
    assert outcome(capsys, "collect", raw, "--format", "alpaca", "-o", tmp_path / "records")[0] == 0
    return tmp_path / "records"


def test_a_stage_never_writes_over_its_input(records, capsys, tmp_path):
    for output in (records, records / "records", tmp_path):
        code, _, error = outcome(capsys, "categorize", records, "-o", output)
        assert code == 2
        assert "give another folder with -o" in error
    code, _, error = outcome(capsys, "categorize", records / "records", "-o", records)
    assert code == 2
    assert pq.read_table(records / "records").num_rows == 10


def test_a_stage_wants_the_folder_of_the_stage_before(records, capsys, tmp_path):
    code, _, error = outcome(capsys, "diversify", records, "-o", tmp_path / "out")
    assert code == 2
    assert "lacks the columns category, label" in error
    assert "run slmfast classify first" in error
    outcome(capsys, "categorize", records, "-o", tmp_path / "categorized")
    code, _, error = outcome(capsys, "categorize", tmp_path / "categorized", "-o", tmp_path / "out")
    assert code == 2
    assert "has been through categorize already" in error
    code, _, error = outcome(capsys, "dedup", tmp_path / "categorized", "-o", records)
    assert code == 2
    assert "holds other files" in error


def test_changed_rules_run_again(records, capsys, tmp_path):
    rules = tmp_path / "rules.yaml"
    built_in = Path(slmfast.__file__).parent / "data" / "categories.yaml"
    rules.write_text(built_in.read_text(encoding="utf-8"), encoding="utf-8")
    command = ["categorize", records, "-o", tmp_path / "out", "--set", f"categorize.rules={rules}"]
    assert "running" in outcome(capsys, *command)[1]
    assert "up to date" in outcome(capsys, *command)[1]
    rules.write_text(rules.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    assert "running" in outcome(capsys, *command)[1]


def test_a_run_does_not_touch_other_peoples_folders(capsys, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "mine.txt").write_text("dear")
    code, _, error = outcome(capsys, "run", "--run-dir", tmp_path, "--until", "collect")
    assert code == 2
    assert "holds other files" in error
    assert (tmp_path / "raw" / "mine.txt").read_text() == "dear"


def test_a_recipe_may_stop_before_it_evaluates(capsys, tmp_path):
    (tmp_path / "raw.jsonl").write_text('{"instruction": "Name a colour, please.", "output": "Blue."}\n')
    recipe = tmp_path / "r.yaml"
    for form, expected in (("alpaca", 0), ("alpacca", 2)):
        recipe.write_text(f"collect: {{sources: [{{name: a, format: {form}, path: '{tmp_path}/raw.jsonl'}}]}}\n")
        code, _, error = outcome(capsys, "run", recipe, "--run-dir", tmp_path / form, "--until", "dedup")
        assert code == expected, error
    assert "did you mean alpaca?" in error
    assert not (tmp_path / "alpacca").exists()


def test_dedup_takes_settings_from_the_recipe(records, capsys, tmp_path):
    outcome(capsys, "categorize", records, "-o", tmp_path / "c")
    for flags, expected in (
        (["--set", "dedup.k=7", "--set", "dedup.verify=0.1"], (7, 0.1)),
        (["--set", "dedup.k=7", "--k", "2", "--no-verify", "--threads", "1"], (2, None)),
    ):
        assert outcome(capsys, "dedup", tmp_path / "c", "-o", tmp_path / "d", *flags)[0] == 0
        settings = json.loads((tmp_path / "d" / "manifest.json").read_text())["settings"]
        assert (settings["k"], settings["verify"]) == expected


def test_doctor_refuses_a_model_that_cannot_be_scored_with(capsys, tmp_path):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(Path(slmfast.__file__).parent / "miniature" / "models" / "small", model)
    code, _, error = outcome(capsys, "doctor", str(model))
    assert code == 0, error
    weights = load_file(model / "model.safetensors")
    name = next(iter(weights))
    weights[name].view(-1)[3] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    code, _, error = outcome(capsys, "doctor", str(model))
    assert code == 2 and f"weight {name} holds NaN" in error.splitlines()[-1]
    for file in model.glob("*token*"):
        file.unlink()
    code, _, error = outcome(capsys, "doctor", str(model))
    assert code == 2 and "holds no tokenizer" in error.splitlines()[-1]


def test_doctor_tells_the_truth(capsys):
    import torch

    code, out, _ = outcome(capsys, "doctor")
    lines = {line[:22].strip(): line[22:] for line in out.splitlines()}
    assert code == 0
    assert lines["torch"] == torch.__version__
    assert lines["device"].startswith("cuda" if torch.cuda.is_available() else "cpu")
    assert lines["native module"].startswith("built")


def test_help_is_instant_and_complete():
    done = subprocess.run([sys.executable, "-m", "slmfast.cli", "--help"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0
    for name in ("run", "status", "doctor", "bench", "collect", "dedup", "train", "fuse", "evaluate", "report"):
        assert name in done.stdout
