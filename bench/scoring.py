"""Scoring of replies beside named peers: one command, one table a case, one line of JSON.

    slmfast bench scoring                  all cases at sizes that end in about five minutes on two cores
    slmfast bench scoring --full           more prompts and more batch sizes for the peers
    slmfast bench scoring --case long --dtype bfloat16
    slmfast bench scoring --plan --model-config qwen2.5-7b    what it takes of CUDA devices' memory; nothing is run

The model has the shape of Qwen2-0.5B and random weights; prompts, replies and tokenizer are real ones: they are looked
for in $SLMFAST_DATA, and without it --tokenizer names a folder and the texts are the miniature's. All sides have the
same weights, token ids, dtype and threads, and every peer its best batch size of a few. Ours is timed from texts to
scores; the peers are given ids. Without the same scores no ratio is printed and the exit code is 1. A side that gives
no figure is named below the tables.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the other files of this folder, which is in no package

import torch
from case_runner import run_bench
from devices import chosen_device, device_name
from inputs import data_folder
from result_table import Result, document, table, write_document
from scoring_cases import long_case, padded_case, sharing_case, short_case
from scoring_context import Context, Sizes
from scoring_judge import judge_case
from scoring_methods import Subject
from scoring_model import SHAPES, model_config, random_model
from scoring_plan import memory_plan
from scoring_processes import head_case, memory_case

from slmfast.errors import UserError
from slmfast.scoring.loading import load_tokenizer

QUICK = Sizes(prompts=4, trial=1, judged=2, batches=(1, 4), positions=4096)
FULL = Sizes(prompts=16, trial=6, judged=6, batches=(1, 4, 8, 16), positions=4096)
# A GPU takes thousands of tokens at once, and a dozen prompts would say nothing about it.
QUICK_CUDA = Sizes(prompts=128, trial=32, judged=64, batches=(8, 16, 32, 64), positions=4096)
FULL_CUDA = Sizes(prompts=160, trial=64, judged=160, batches=(8, 16, 32, 64, 128), positions=4096)
DEFAULT = "qwen2-0.5b"
CASES: dict[str, Callable[[Context], Iterator[Result]]] = {
    "long": long_case,
    "short": short_case,
    "padded": padded_case,
    "sharing": sharing_case,
    "head": head_case,
    "judge": judge_case,
    "memory": memory_case,
}


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(prog="slmfast bench scoring", description=__doc__.partition("\n")[0])
    options.add_argument("--case", action="append", choices=CASES, help="a case (may be repeated; default: all)")
    options.add_argument("--plan", action="store_true", help="print a plan of memory from the configuration alone")
    options.add_argument("--full", action="store_true", help="more prompts, and more batch sizes for the peers")
    known = ", ".join(SHAPES)
    options.add_argument("--model-config", help=f"a folder with config.json, or one of {known} (default {DEFAULT})")
    options.add_argument("--tokenizer", help="a tokenizer's folder (default: qwen2-0.5b in $SLMFAST_DATA)")
    options.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    options.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32, on cuda bfloat16")
    options.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="threads on all sides")
    options.add_argument("--prompts", type=int, help="long prompts; of short ones twice as many")
    options.add_argument("--positions", type=int, help="hidden states that the head's case turns into scores")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, help="a file for the line of JSON")
    return options


def chosen_sizes(options: argparse.Namespace, device: torch.device) -> Sizes:
    """The sizes that the options ask for.

    Raises:
        UserError: a size is too small to measure.
    """
    on_gpu = device.type == "cuda"
    usual = (FULL_CUDA if on_gpu else FULL) if options.full else (QUICK_CUDA if on_gpu else QUICK)
    for flag in ("prompts", "positions", "threads"):
        value = getattr(options, flag)
        if value is not None and value < (2 if flag == "prompts" else 1):
            raise UserError(f"--{flag} must be at least {2 if flag == 'prompts' else 1}, not {value}")
    prompts = options.prompts or usual.prompts
    return Sizes(
        prompts=prompts,
        trial=min(usual.trial, prompts),
        judged=min(usual.judged, prompts),
        batches=usual.batches,
        positions=options.positions or usual.positions,
    )


def open_context(options: argparse.Namespace) -> Context:
    """The model, the tokenizer and the sizes that the options ask for.

    Raises:
        UserError: there is no such device, configuration or tokenizer.
    """
    device = chosen_device(options.device)
    sizes = chosen_sizes(options, device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    folder = data_folder()
    real = folder / DEFAULT if folder and (folder / DEFAULT / "config.json").is_file() else None
    source = options.model_config or str(real or DEFAULT)
    if options.tokenizer is None and real is None:
        raise UserError("no tokenizer: give --tokenizer FOLDER, or set SLMFAST_DATA to a folder that holds qwen2-0.5b")
    named = str(options.tokenizer or real)
    config, tokenizer = model_config(source), load_tokenizer(named)
    if len(tokenizer) > config.get_text_config().vocab_size:
        raise UserError(f"--tokenizer {named}: it has {len(tokenizer)} tokens, more than the model; give its own")
    torch.set_num_threads(options.threads)
    return Context(
        model_config=source,
        tokenizer_folder=named,
        tokenizer=tokenizer,
        config=config,
        subject=Subject(random_model(config, dtype, device, options.seed), tokenizer),
        dtype=dtype,
        threads=options.threads,
        seed=options.seed,
        sizes=sizes,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases; 1 if any answer that should be the same was not, or if our own side failed.

    Raises:
        UserError: an option is out of range, or names what does not exist.
    """
    options = parser().parse_args(argv)
    if options.plan:
        return print_plan(options)
    context = open_context(options)
    print(f"{context.model_config}, {context.dtype}, random weights, tokenizer {context.tokenizer_folder}")
    print(f"a plain matrix product: {context.rate / 1e12:.3g} TFLOP/s in {context.dtype}\n", flush=True)
    return run_bench("scoring", CASES, context, options, device_name(context.device))


def print_plan(options: argparse.Namespace) -> int:
    """Prints how much of CUDA devices' memory scoring takes, in --dtype or bf16, and on which it fits; 0."""
    name = options.model_config or DEFAULT
    dtype = getattr(torch, options.dtype or "bfloat16")
    rows = list(memory_plan(name, model_config(name), dtype))
    text = document("scoring", options.threads, rows)
    print(f"{table(rows)}\n\n{text}")
    if options.out:
        write_document(options.out, text)
    return 0


if __name__ == "__main__":
    from slmfast.cli import main as command_line

    raise SystemExit(command_line(["bench", "scoring", *sys.argv[1:]]))  # user errors become one line there
