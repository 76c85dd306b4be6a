"""A study that is killed at random instants and started again ends as one that nobody disturbed."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slmfast.study.run import STUDY

SMALL = [
    "world.size=300",
    "diversify.target=60",
    "diversify.min_label_count=1",
    "align.sft_size=40",
    *(f"train.{name}.{key}" for name in ("S1", "S2", "S3") for key in ("epochs=1", "save_steps=1")),
    "evaluate.tasks=[mini_text]",
    "evaluate.limit=8",
    "threads=1",
]
# What a start is let say, and for how many seconds at most it then goes on: among the shared stages, in a seed's run,
# and among the models that only a study has.
KILLS = (("classify: running", 1.5), ("train: running", 4.0), ("study: S1-0.001@16 is SFT", 2.5))


def start(folder: Path) -> subprocess.Popen:
    """Begins or goes on with the study, in a process group of its own."""
    overrides = [part for override in SMALL for part in ("--set", override)]
    command = [sys.executable, "-m", "slmfast.cli", "study", "--seeds", "1", "--rates", "1e-3@16", *overrides]
    return subprocess.Popen(
        [*command, "--run-dir", str(folder)],
        cwd="/",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(folder: Path) -> None:
    process = start(folder)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def result(folder: Path) -> tuple[str, dict[str, str]]:
    """Every figure, without the folder's own name, and the digest of all weights, answers and samples."""
    text = (folder / STUDY).read_text(encoding="utf-8").replace(str(folder), "HERE")
    found = [*folder.rglob("*.parquet"), *folder.rglob("*.safetensors"), folder / "samples.json"]
    return text, {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def kill(folder: Path, line: str, seconds: float) -> bool:
    """Whether a start was killed, so many seconds after it had said a line; one that had ended was not."""
    process = start(folder)
    said = any(text.startswith(line) for text in process.stdout)
    time.sleep(seconds)
    alive = said and process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return alive


@pytest.mark.slow
def test_a_killed_study_ends_as_an_undisturbed_one(tmp_path):
    whole, broken, draw = tmp_path / "whole", tmp_path / "broken", random.Random(0)
    finish(whole)
    assert sum(kill(broken, line, draw.uniform(0, longest)) for line, longest in KILLS) >= 2
    finish(broken)
    assert json.loads(result(broken)[0]) == json.loads(result(whole)[0])
    assert result(broken)[1] == result(whole)[1]
    assert not [path for path in broken.rglob("*") if path.name.endswith(".tmp") or path.name == ".work"]
