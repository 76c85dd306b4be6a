"""Kills a whole run at random instants and starts it again each time; its data files must be those of an unbroken run.

    python tests/kills/run.py --kills 50 --seed 0 --folder DIR

One run of a small miniature is left alone. Another is killed (SIGKILL, its whole process group) at instants drawn from
the seed, each after the start of another process: some before it says what it does, many while it still imports what a
stage needs or soon after, the others as far as 1.2 times what that stage took and the imports. When a run gets to its
end before all kills are used, it is compared and the next folder begun. The last line is one JSON object; the exit
code is 1 where a file differs, is missing, is too many, or where a temporary one was left behind.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

SMALL = [
    "world.size=900",
    "diversify.target=220",
    "classify.unit_rows=256",
    "regenerate.unit_rows=64",
    "rate.unit_rows=64",
    "align.sft_size=150",
    *(f"train.{name}.epochs=1" for name in ("S1", "S2", "S3")),
    *(f"train.{name}.save_steps=2" for name in ("S1", "S2", "S3")),
    "evaluate.limit=10",
    "threads=1",
]
AT_THE_START, SOON = 0.1, 0.4  # of the kills
LATEST = 1.2  # of a stage's own seconds


def command(run_dir: Path) -> list[str]:
    """The command of the run, the same each time."""
    overrides = [part for override in SMALL for part in ("--set", override)]
    return [sys.executable, "-m", "slmfast.cli", "run", "--run-dir", str(run_dir), *overrides]


def start(run_dir: Path) -> subprocess.Popen:
    """Begins or goes on with a run, in a process group of its own, from a folder without the package."""
    return subprocess.Popen(
        command(run_dir), cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(run_dir: Path) -> str:
    """Lets a run get to its end; returns what it printed."""
    process = start(run_dir)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def data_files(run_dir: Path) -> dict[str, str]:
    """The digest of every data output: Parquet files and final weights."""
    found = [*run_dir.rglob("*.parquet"), *run_dir.rglob("*.safetensors")]
    parts = {path.relative_to(run_dir): path for path in found}
    return {
        str(name): hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in sorted(parts.items())
        if not any(part.startswith((".work", "checkpoint-")) for part in name.parts)
    }


def stage_seconds(run_dir: Path) -> dict[str, float]:
    """What each stage of a finished run took."""
    return {path.parent.name: json.loads(path.read_text())["seconds"] for path in run_dir.glob("*/manifest.json")}


def kill_once(run_dir: Path, seconds: dict[str, float], startup: float, draw: random.Random) -> str | None:
    """Goes on with a run and kills it at a drawn instant; gives the stage it worked at, None where it had ended."""
    process = start(run_dir)
    stage, kind = "the start", draw.random()
    if kind < AT_THE_START:
        time.sleep(draw.uniform(0, startup))
    else:
        for line in process.stdout:
            name, _, what = line.strip().partition(": ")
            if what == "running":
                stage = name
                break
        else:
            process.wait()  # there was nothing left to do
        imports = 0.0 if kind < AT_THE_START + SOON else startup
        time.sleep(draw.random() * (imports + LATEST * seconds.get(stage, 0.0)))
    ended = process.poll() is not None
    if not ended:
        os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate()
    if ended:
        assert process.returncode == 0, output
        return None
    for line in output.splitlines():  # what it printed since, up to the kill
        name, _, what = line.partition(": ")
        stage = name if what == "running" else stage
    return stage


def differences(run_dir: Path, wanted: dict[str, str]) -> list[str]:
    """What is wrong with a run that got to its end."""
    found = data_files(run_dir)
    wrong = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
    left = [str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.name.endswith(".tmp")]
    left += [str(path.relative_to(run_dir)) for path in run_dir.rglob(".work")]
    return sorted(wrong + left)


def main(argv: list[str] | None = None) -> int:
    """Kills, compares and tells."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs go (default: a temporary folder)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = killed_runs(Path(folder), options.kills, random.Random(options.seed))
    print(json.dumps(result))
    return 1 if result["differences"] else 0


def killed_runs(folder: Path, kills: int, draw: random.Random) -> dict:
    """All kills, over as many runs as they take; what they hit, and where a run's files are others."""
    begin = time.monotonic()
    finish(folder / "unbroken")
    again = time.monotonic()
    finish(folder / "unbroken")  # does nothing, and so shows how long the start takes
    startup = time.monotonic() - again
    wanted, seconds = data_files(folder / "unbroken"), stage_seconds(folder / "unbroken")
    print(f"unbroken: {len(wanted)} data files, {again - begin:.0f} s; a start takes {startup:.0f} s", flush=True)
    hit: Counter[str] = Counter()
    wrong, runs = [], 1
    while hit.total() < kills:
        run_dir = folder / f"killed-{runs}"
        stage = kill_once(run_dir, seconds, startup, draw)
        if stage is None:
            wrong += differences(run_dir, wanted)
            runs += 1
        else:
            hit[stage] += 1
            print(f"kill {hit.total()}: run {runs}, {stage}", flush=True)
    finish(folder / f"killed-{runs}")
    wrong += differences(folder / f"killed-{runs}", wanted)
    return {
        "kills": hit.total(),
        "by_stage": dict(hit.most_common()),
        "runs": runs,
        "data_files": len(wanted),
        "differences": wrong,
        "seconds": round(time.monotonic() - begin),
    }


if __name__ == "__main__":
    sys.exit(main())
