"""Training beside TRL: one command, one table a case, one line of JSON.

    slmfast bench training                 all cases on two layers, in about six minutes on two cores
    slmfast bench training --full          all layers of the model: about 25 minutes
    slmfast bench training --case kto --layers 24 --samples 16 --steps 3

The model has the shape of Qwen2-0.5B and random weights; prompts, replies and tokenizer are real ones: they are looked
for in $SLMFAST_DATA, and without it --tokenizer names a folder and the texts are the miniature's. All sides have the
same weights, rows, order, KL groups, constant rate, dtype and threads, nothing is clipped, and each runs in a process
of its own; they take their steps in turn. Unless the losses of all steps agree no ratio is printed and the exit code is
1. A side that gives no figure is named below the tables.
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
from result_table import Result
from scoring_model import SHAPES, model_config, with_layers
from training_cases import kto_case, memory_case, sft_case
from training_context import Context, Sizes
from training_optimizers import optimizer_case
from training_sides import GROUP

from slmfast.errors import UserError
from slmfast.training.loading import load_tokenizer

DEFAULT = "qwen2-0.5b"
ALL = 1 << 20  # layers: as many as the model has
QUICK = Sizes(layers=2, samples=4, steps=2)
FULL = Sizes(layers=ALL, samples=8, steps=2)
# A GPU computes a whole batch of some thousand tokens at once; --full takes the paper's step of 4 x 250.
QUICK_CUDA = Sizes(layers=ALL, samples=64, steps=4)
FULL_CUDA = Sizes(layers=ALL, samples=1000, steps=3)
CASES: dict[str, Callable[[Context], Iterator[Result]]] = {
    "kto": kto_case,
    "sft": sft_case,
    "memory": memory_case,
    "optimizer": optimizer_case,
}


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(prog="slmfast bench training", description=__doc__.partition("\n")[0])
    options.add_argument("--case", action="append", choices=CASES, help="a case (may be repeated; default: all)")
    options.add_argument("--full", action="store_true", help="all layers of the model; on cuda 1,000 samples a step")
    known = ", ".join(SHAPES)
    options.add_argument("--model-config", help=f"a folder with config.json, or one of {known} (default {DEFAULT})")
    options.add_argument(
        "--tokenizer", help="a folder with tokenizer and template (default: $SLMFAST_DATA's qwen2-0.5b)"
    )
    options.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    options.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of the forward (cpu: float32, cuda: bfloat16)"
    )
    options.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="threads on all sides")
    options.add_argument("--layers", type=int, help=f"of the model (default {QUICK.layers}, on cuda all)")
    options.add_argument("--samples", type=int, help=f"of a step, a multiple of {GROUP} (default {QUICK.samples})")
    options.add_argument("--steps", type=int, help=f"that are timed, after one more (default {QUICK.steps})")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, help="a file for the line of JSON")
    return options


def chosen_sizes(options: argparse.Namespace, device: torch.device, layers: int) -> Sizes:
    """The sizes that the options ask for, of a model of so many layers.

    Raises:
        UserError: a size is out of range.
    """
    on_gpu = device.type == "cuda"
    usual = (FULL_CUDA if on_gpu else FULL) if options.full else (QUICK_CUDA if on_gpu else QUICK)
    for flag in ("layers", "samples", "steps", "threads"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} must be at least 1, not {value}")
    if options.layers is not None and options.layers > layers:
        raise UserError(f"--layers {options.layers}: the model has {layers}; give no more")
    samples = usual.samples if options.samples is None else options.samples
    if samples % GROUP:
        raise UserError(f"--samples {samples}: give a multiple of {GROUP}, the size of a KL group and a micro-batch")
    return Sizes(min(options.layers or usual.layers, layers), samples, options.steps or usual.steps)


def open_context(options: argparse.Namespace) -> Context:
    """The configuration, the tokenizer and the sizes that the options ask for.

    Raises:
        UserError: there is no such device, configuration or tokenizer.
    """
    device = chosen_device(options.device)
    folder = data_folder()
    real = folder / DEFAULT if folder and (folder / DEFAULT / "config.json").is_file() else None
    source = options.model_config or str(real or DEFAULT)
    if options.tokenizer is None and real is None:
        raise UserError("no tokenizer: give --tokenizer FOLDER, or set SLMFAST_DATA to a folder that holds qwen2-0.5b")
    named = str(options.tokenizer or real)
    config, tokenizer = model_config(source), load_tokenizer(Path(named))
    if len(tokenizer) > config.get_text_config().vocab_size:
        raise UserError(f"--tokenizer {named}: it has {len(tokenizer)} tokens, more than the model; give its own")
    sizes = chosen_sizes(options, device, config.get_text_config().num_hidden_layers)
    with_layers(config, sizes.layers)
    torch.set_num_threads(options.threads)
    return Context(
        model_config=source,
        tokenizer_folder=named,
        tokenizer=tokenizer,
        config=config,
        device=device,
        dtype=getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32")),
        threads=options.threads,
        seed=options.seed,
        sizes=sizes,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases; 1 if any answer that should be the same was not, if our own side or every peer failed.

    Raises:
        UserError: an option is out of range, or names what does not exist.
    """
    options = parser().parse_args(argv)
    context = open_context(options)
    precision = str(context.dtype).removeprefix("torch.")
    model = f"{context.model_config}, {context.sizes.layers} layers, random fp32 weights, forward in {precision}"
    print(f"{model}, tokenizer {context.tokenizer_folder}\n", flush=True)
    return run_bench("training", CASES, context, options, device_name(context.device), empty_fails=True)


if __name__ == "__main__":
    from slmfast.cli import main as command_line

    raise SystemExit(command_line(["bench", "training", *sys.argv[1:]]))  # user errors become one line there
