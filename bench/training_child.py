"""One side of the training benchmark in a process of its own, which takes a step whenever it is told to.

python training_child.py REQUEST.json

Says {"ready": ...} when its trainer stands, then {"loss", "seconds", "norm"} after every line that it reads, and
{"baseline", "peak"} at the end, all as lines of JSON on stdout. The training is the trainer's own `train()`, which a
callback holds before every step, so that two sides can take turns.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from peak_memory import peak_resident
from scoring_model import model_config, random_model, with_layers
from torch import nn
from training_sides import OURS
from transformers import TrainerCallback
from transient import give_back_freed


class Turns(TrainerCallback):
    """Waits for a line before each step, and says after it what it gave and took.

    The clock runs from there until the loss is on the host: forward, backward, optimizer and the trainer's own work.
    The data of the step are drawn before. The first step, a warm-up that nobody counts, also takes the gradient's norm.
    """

    def __init__(self, output: TextIO, device: torch.device):
        self._output, self._device = output, device
        self._start = 0.0
        self._norm: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not sys.stdin.readline():
            raise SystemExit("whoever told us to step has gone")
        self._wait()
        self._start = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if self._norm is None:
            norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
            self._norm = float(torch.stack([norm.double() for norm in norms]).norm())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self._wait()
            seconds = time.perf_counter() - self._start
            say(self._output, {"loss": logs["loss"], "seconds": seconds, "norm": self._norm})

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def say(output: TextIO, content: dict[str, Any]) -> None:
    """One line of JSON."""
    print(json.dumps(content), file=output, flush=True)


def held(device: torch.device) -> int:
    """Bytes that are held now, from where the peak is counted anew: the process's, or the allocator's on CUDA."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    give_back_freed()
    return peak_resident(reset=True)


def run(request: dict[str, Any], output: TextIO) -> None:
    """Trains as the request says."""
    device = torch.device(request["device"])
    if request["side"] == OURS:
        from training_ours import build
    else:
        from training_trl import build
    config = with_layers(model_config(request["model_config"]), request["layers"])
    model = random_model(config, torch.float32, device, request["seed"])
    baseline = held(device)
    trainer, precomputed = build(model, request)
    trainer.add_callback(Turns(output, device))
    say(output, {"ready": True, "precompute_seconds": precomputed, "pid": os.getpid()})
    trainer.train()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident()
    say(output, {"baseline": baseline, "peak": peak})


def main(path: str) -> None:
    """Runs one request; whatever libraries print goes to stderr."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    run(request, output)


if __name__ == "__main__":
    main(sys.argv[1])
