"""The whole walk on a small miniature: balanced, resumable, reproducible, and usable by others.

One undisturbed run is made for the module. A second run in another folder is killed in every stage and started again;
its data files must come out byte for byte the same.
"""

import importlib.util
import itertools
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from slmfast.miniature.truth import Truth
from slmfast.recipe import STAGES
from slmfast.records import prompt_text

pytestmark = pytest.mark.slow

# The small run, and what is compared of it, are those of tests/kills, which kills it more often than a test may.
_spec = importlib.util.spec_from_file_location("kills", Path(__file__).parent / "kills" / "run.py")
kills = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kills)
command, start, finish, data_files = kills.command, kills.start, kills.finish, kills.data_files

BALANCED = STAGES[: STAGES.index("train")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed")
    output = finish(run_dir)
    return run_dir, output


def test_summary_and_balance(undisturbed):
    run_dir, output = undisturbed
    summary = json.loads((run_dir / "summary.json").read_text())
    assert tuple(summary["stages"]) == STAGES
    for name, row in summary["stages"].items():
        assert set(row) == {"in", "out", "dropped", "rejected", "seconds"}
        assert (row["in"] is not None) == (name in BALANCED)
        if row["in"] is not None:
            assert row["in"] == row["out"] + row["dropped"] + row["rejected"], name
    for before, after in itertools.pairwise(BALANCED):
        assert summary["stages"][after]["in"] == summary["stages"][before]["out"]
    assert set(summary["models"]) == set(summary["scores"]) == {"base", "S1", "S2", "S3", "fused"}
    for scores in summary["scores"].values():
        assert all({"value", "stderr", "n"} == set(score) for score in scores.values())
    assert Path(summary["report"]).is_file()
    assert summary["report"] in output


def test_every_row_is_accounted_for(undisturbed):
    run_dir, _ = undisturbed
    for name in BALANCED[1:]:
        table = pq.read_table(run_dir / name / "dropped") if (run_dir / name / "dropped").exists() else None
        dropped = 0 if table is None else table.num_rows
        assert dropped == json.loads((run_dir / name / "manifest.json").read_text())["counts"]["dropped"]
        assert table is None or set(table.column("stage").to_pylist()) <= {name}
    duplicates = pq.read_table(run_dir / "dedup" / "dropped").to_pylist()
    kept = set(pq.read_table(run_dir / "dedup" / "records").column("id").to_pylist())
    assert duplicates
    assert all(row["duplicate_of"] in kept and row["distance"] <= 3 for row in duplicates)
    rejected = pq.read_table(run_dir / "collect" / "rejected").to_pylist()
    assert rejected
    assert all(row["file"] and row["line"] > 0 and row["reason"] for row in rejected)


def test_the_share_of_right_replies_rises_by_at_least_three_tenths(undisturbed):
    run_dir, _ = undisturbed
    truth = Truth(run_dir / "raw")

    def share(rows):
        right = [truth.is_right(prompt_text(prompt), reply) for prompt, reply in rows]
        assert None not in right
        return sum(right) / len(right)

    collected = pq.read_table(run_dir / "diversify" / "records").to_pylist()
    chosen = pq.read_table(run_dir / "align" / "sft").to_pylist()
    original = share((row["prompt"], row["reply"]) for row in collected)
    assert share((row["prompt"], row["completion"][0]["content"]) for row in chosen) >= 1.3 * original > 0


def test_columns_are_added_and_never_rewritten(undisturbed):
    run_dir, _ = undisturbed
    earlier = {}
    for name in BALANCED:
        table = pq.read_table(run_dir / name / "records")
        rows = {(row["source"], row["source_row"]): row for row in table.to_pylist()}
        for key, row in rows.items():
            assert not earlier or earlier[key].items() <= row.items()
        earlier = rows


def test_sets_follow_the_design(undisturbed):
    run_dir, _ = undisturbed
    sft = pq.read_table(run_dir / "align" / "sft").to_pylist()
    kto = pq.read_table(run_dir / "align" / "kto").to_pylist()
    positives = [row for row in kto if row["label"]]
    assert [(row["prompt"], row["completion"]) for row in positives] == [(r["prompt"], r["completion"]) for r in sft]
    assert len(kto) - len(positives) == len(positives) // 2
    assert all(a["prompt"] != b["prompt"] for a, b in itertools.pairwise(kto))
    lines = (run_dir / "align" / "llamafactory" / "kto.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == [row["label"] for row in kto]


def test_a_second_run_does_nothing(undisturbed):
    run_dir, _ = undisturbed
    before = data_files(run_dir)
    output = finish(run_dir)
    assert all(f"{name}: up to date" in output for name in STAGES)
    assert data_files(run_dir) == before


def test_a_changed_setting_reruns_what_depends_on_it(undisturbed, tmp_path):
    run_dir, _ = undisturbed
    subprocess.run(["cp", "-r", str(run_dir), str(tmp_path / "copy")], check=True)
    process = subprocess.run(
        [*command(tmp_path / "copy"), "--set", "fuse.weights={S1: 1}"], cwd="/", capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    for name in STAGES[: STAGES.index("train")]:
        assert f"{name}: up to date" in process.stdout
    for name in ("fuse", "evaluate", "report"):
        assert f"{name}: running" in process.stdout
    fused, s1 = (tmp_path / "copy" / part / "model.safetensors" for part in ("fuse/fused", "train/S1"))
    assert fused.read_bytes() == s1.read_bytes()


def test_killed_in_every_stage_gives_the_same_bytes(undisturbed, tmp_path):
    run_dir, _ = undisturbed
    delays = random.Random(0)
    broken = []
    for name in STAGES:
        process = start(tmp_path)
        for line in process.stdout:
            if line.startswith(f"{name}: running"):
                break
        seconds = json.loads((run_dir / name / "manifest.json").read_text())["seconds"]
        time.sleep(delays.uniform(0.0, 0.6) * seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not (tmp_path / name / "manifest.json").exists():
            broken.append(name)
    # Half of the stages take milliseconds, so that a kill may come too late for them, but never for all.
    assert len(broken) >= 4, f"only {broken} were killed midway"
    finish(tmp_path)
    assert data_files(tmp_path) == data_files(run_dir)


def test_models_are_complete_folders(undisturbed):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_dir, _ = undisturbed
    models = json.loads((run_dir / "summary.json").read_text())["models"]
    for path in models.values():
        model = AutoModelForCausalLM.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": "3 + 4 = ?"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        assert torch.isfinite(model(**ids).logits).all()
        assert (Path(path) / "generation_config.json").is_file()


def test_the_sets_train_in_trl_as_they_are(undisturbed, tmp_path):
    from datasets import load_dataset
    from trl import KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

    run_dir, _ = undisturbed
    model = json.loads((run_dir / "summary.json").read_text())["models"]["base"]
    common = {"output_dir": str(tmp_path), "max_steps": 1, "report_to": [], "use_cpu": True, "bf16": False}
    for name, trainer_class, config in (
        ("sft", SFTTrainer, SFTConfig(**common, per_device_train_batch_size=4)),
        ("kto", KTOTrainer, KTOConfig(**common, per_device_train_batch_size=4)),
    ):
        files = str(run_dir / "align" / name / "*.parquet")
        data = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
        result = trainer_class(model=model, args=config, train_dataset=data).train()
        assert result.global_step == 1


def test_two_runs_in_one_folder_do_not_mix(undisturbed):
    import fcntl

    run_dir, _ = undisturbed
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.run(command(run_dir), cwd="/", capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.strip().splitlines()[-1].endswith("wait for it or give another --run-dir")
