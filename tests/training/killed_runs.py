"""Run by test_training_resume: trains in child processes that kill themselves at a given call, then trains on.

Usage: python killed_runs.py CASES.json. Prints, as its last line, a JSON list with a verdict a case. Forking from one
parent that has only imported torch costs its import once.
"""

import hashlib
import importlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

import slmfast.training.kto
import slmfast.training.sft
from slmfast.training.optimizer import make_optimizer
from slmfast.training.settings import TrainSettings
from slmfast.training.split_weights import SplitWeights


def kill_at(target: str, number: int) -> None:
    """Makes the `number`-th call of `module:name` kill this process on entry, as a power cut would."""
    module_name, name = target.split(":")
    owner = importlib.import_module(module_name)
    *parents, last = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, last), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, last, counted)


def in_child(case: dict, output: Path, kill: tuple[str, int] | None = None) -> int:
    """Trains in a forked child, killed at a call if asked; the signal that ended it, or 0."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            if kill:
                kill_at(*kill)
            train(case, output)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"a child failed with {os.WEXITSTATUS(status)}")
    return os.WTERMSIG(status)


def compile_split_step() -> None:
    """Takes a step on split weights, whose compiler then need not run in every child."""
    layer = torch.nn.Linear(64, 64)
    settings = TrainSettings(method="sft", learning_rate=1e-8, optimizer="adamw8bit-split")
    optimizer = make_optimizer(layer, settings, 1, SplitWeights(layer))
    layer.weight.grad = torch.ones(64, 64)
    optimizer.step()


def train(case: dict, output: Path) -> None:
    """One run of a case's arguments."""
    settings = TrainSettings(**case["settings"])
    common = {"seed": 3, "threads": 1, "progress": False}
    if settings.method == "sft":
        slmfast.training.sft.train_sft(case["model"], case["dataset"], output, settings, **common)
    else:
        reference = case.get("reference")
        slmfast.training.kto.train_kto(case["model"], case["dataset"], output, settings, reference=reference, **common)


def hashes(output: Path) -> dict[str, str]:
    """The bytes of every file of the finished folder, by its name."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(output.iterdir())}


def undisturbed(case: dict, folder: Path) -> dict[str, str]:
    """The files of the same run when nothing kills it, trained once for each set of arguments."""
    arguments = {key: case[key] for key in ("model", "dataset", "settings")} | {"reference": case.get("reference")}
    output = folder / f"calm-{hashlib.sha256(json.dumps(arguments).encode()).hexdigest()[:8]}"
    if not output.exists():
        in_child(case, output)
    return hashes(output)


def main(path: str) -> None:
    """Goes through the cases of a JSON file."""
    verdicts, cases = [], json.loads(Path(path).read_text())
    if any(case["settings"]["optimizer"] == "adamw8bit-split" for case in cases):
        compile_split_step()
    for number, case in enumerate(cases):
        folder = Path(path).parent
        output = folder / f"killed-{number}"
        signals = [in_child(case, output, kill) for kill in case["kills"]]
        left = sorted(p.name for p in (folder / ".work" / output.name).glob("*")) if not output.exists() else []
        in_child(case, output)
        same = hashes(output) == undisturbed(case, folder)
        log = json.loads((output / "training_log.json").read_text())
        verdicts.append({"signals": signals, "left": left, "same": same, "steps": [row["step"] for row in log]})
    print(json.dumps(verdicts))


if __name__ == "__main__":
    main(sys.argv[1])
