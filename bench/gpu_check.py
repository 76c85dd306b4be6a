"""One command for any CUDA machine: kernels against truth, the roofline, the benchmarks beside their peers; one JSON.

    python bench/gpu_check.py [--out FILE] [--tokenizer FOLDER]

It ends in under eight minutes: what does not fit into --seconds is stopped or left out, and the JSON says so. The last
line of stdout is that JSON, which also goes to --out ($OUT/gpu_check.json where OUT is set). Exit code 1 if a kernel
or a benchmark fails, 2 without a CUDA device.
"""

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the other files of this folder, which is in no package

import torch
from inputs import data_folder
from kernel_checks import CASES, KERNELS, check_all
from optimizer_checks import check_optimizer
from result_table import aligned, commit, write_document
from roofline import copy_rate, matrix_rate

BENCH = Path(__file__).parent
MINIATURE = BENCH.parent / "slmfast" / "miniature" / "models" / "base"
PACKAGES = ("torch", "triton", "transformers", "trl", "lm-eval", "liger-kernel", "cut-cross-entropy", "flash-attn")
SECONDS = 460.0
LEAST_SECONDS = 20.0  # with less time left a benchmark is not begun


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's command, and the largest share of the time left that it may take."""

    name: str
    arguments: tuple[str, ...]
    share: float
    tokenizer: bool = False
    """Whether it takes --tokenizer."""
    memory: int = 0
    """GiB of the device's memory without which it is left out."""

    @property
    def script(self) -> Path:
        return BENCH / f"{self.arguments[0]}.py"


BENCHMARKS = (
    Benchmark("training", ("training",), 0.4, tokenizer=True),
    Benchmark("scoring", ("scoring",), 0.6, tokenizer=True),
    Benchmark("dedup", ("dedup", "--case", "fingerprints", "--case", "join", "--peer-seconds", "20"), 0.5),
    Benchmark(
        "scoring, 7B shape",
        ("scoring", "--model-config", "qwen2.5-7b", "--case", "long", "--case", "head", "--prompts", "32"),
        1.0,
        tokenizer=True,
        memory=64,  # 15 GB of weights, and 30 of their fp32 twin
    ),
)


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__.partition("\n")[0])
    folder = os.environ.get("OUT", ".")
    options.add_argument("--out", type=Path, default=Path(folder) / "gpu_check.json", help="a file for the JSON")
    options.add_argument("--tokenizer", help="a tokenizer's folder (default: qwen2-0.5b in $SLMFAST_DATA)")
    options.add_argument("--seconds", type=float, default=SECONDS, help=f"in all (default {SECONDS:.0f})")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Checks and measures on the CUDA device; 2 where there is none."""
    options = parser().parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device, so there is nothing to check", file=sys.stderr)
        return 2
    return run(options, torch.device("cuda"))


def run(options: argparse.Namespace, device: torch.device) -> int:
    """Everything, on a device of any kind; 1 where a kernel or a benchmark failed."""
    end = time.monotonic() + options.seconds
    report: dict[str, Any] = {"device": device_name(device), "commit": commit(), "versions": versions()}
    report["kernels"] = check_all(KERNELS, CASES, device) + check_optimizer(device)
    print(kernel_table(report["kernels"]), flush=True)
    report["roofline"] = {
        "copy_bytes_per_second": copy_rate(device),
        "bf16_matrix_flops": matrix_rate(torch.bfloat16, device),
        "fp32_matrix_flops": matrix_rate(torch.float32, device),
    }
    tokenizer, note = chosen_tokenizer(options.tokenizer)
    report["notes"] = [note] if note else []
    report["benchmarks"] = {}
    for benchmark in BENCHMARKS:
        report["benchmarks"][benchmark.name] = measure(benchmark, tokenizer, end - time.monotonic(), device)
        write_document(options.out, json.dumps(report))  # a check that is stopped leaves what it has
    report["seconds"] = options.seconds - (end - time.monotonic())
    text = json.dumps(report)
    write_document(options.out, text)
    print(text)
    wrong = any(row["passed"] is False for row in report["kernels"])
    return 1 if wrong or any("failed" in found for found in report["benchmarks"].values()) else 0


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions() -> dict[str, str | None]:
    """Of what the figures depend on; None where a package is missing."""
    found: dict[str, str | None] = {"cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def chosen_tokenizer(given: str | None) -> tuple[str | None, str | None]:
    """(a folder, or None for the benchmark's own default; a note where it is not the real one)."""
    if given is not None:
        return given, None
    folder = data_folder()
    if folder is not None and (folder / "qwen2-0.5b").is_dir():
        return None, None
    return str(
        MINIATURE
    ), "no real tokenizer and data here (SLMFAST_DATA): the miniature's tokens and texts were scored"


def kernel_table(rows: Sequence[dict[str, Any]]) -> str:
    """What failed or is missing, and how many checks passed."""
    passed = sum(row["passed"] is True for row in rows)
    cells = [("kernel", "case", "output", "error", "budget", "passed")]
    for row in rows:
        if row["passed"] is not True:
            cells.append(tuple("" if value is None else str(value) for value in row.values()))
    listed = f"\n{aligned(cells)}" if len(cells) > 1 else ""
    return f"kernels: {passed} checks passed{listed}\n"


def measure(benchmark: Benchmark, tokenizer: str | None, left: float, device: torch.device) -> dict[str, Any]:
    """A benchmark's document, perhaps with "stopped" or "failed"; or {"missing": why} where it was not begun."""
    if not benchmark.script.exists():
        return {"missing": f"bench/{benchmark.script.name} is not in this checkout"}
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < benchmark.memory << 30:
        return {"missing": f"the device has less than {benchmark.memory} GiB free"}
    limit = benchmark.share * left
    if limit < LEAST_SECONDS:
        return {"missing": f"{left:.0f} s were left"}
    with tempfile.TemporaryDirectory(prefix="slmfast-check-") as scratch:
        out = Path(scratch) / "figures.json"
        command = [sys.executable, str(benchmark.script), *benchmark.arguments[1:], "--out", str(out)]
        if benchmark.tokenizer and tokenizer is not None:
            command += ["--tokenizer", tokenizer]
        why = finished(command, limit)
        found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    return found | why


def finished(command: Sequence[str], limit: float) -> dict[str, str]:
    """Runs a command, output and all: {} if it ended with code 0, else {"stopped"} or {"failed"} with a reason.

    A benchmark has children of its own; they are stopped with it.
    """
    print(f"running for at most {limit:.0f} s: {' '.join(command[1:])}", flush=True)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, said = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"stopped": f"after {limit:.0f} s"}
    if process.returncode == 0:
        return {}
    last = said.strip().splitlines()[-1:] or ["it said nothing"]
    return {"failed": f"exit code {process.returncode}: {last[0]}"}


if __name__ == "__main__":
    raise SystemExit(main())
