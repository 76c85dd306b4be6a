"""Multiple choice with worked examples beside lm-eval's HFLM: one command, one table a case, one line of JSON.

    slmfast bench evaluation               two subjects of mmlu and cmmlu, four items of each: about three minutes
    slmfast bench evaluation --full        four subjects, 20 items of each
    slmfast bench evaluation --case mmlu --subjects 1 --items 50 --layers 4

The model has the shape of Qwen2-0.5B and random weights in fp32; items, worked examples (five) and tokenizer are real
ones, from $SLMFAST_DATA. Both sides are given the same requests of lm-eval's own tasks, from texts to scores; HFLM
shares one context among an item's choices and has its best batch size of a few. Unless all log-probabilities agree to
1e-4, all greedy flags and the accuracy, no ratio is printed and the exit code is 1. The more items a subject has, the
more its worked examples are worth sharing: mmlu's subjects have 100 and more.
"""

import argparse
import importlib.metadata
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the other files of this folder, which is in no package

import timing
import torch
from case_runner import Notes, run_bench
from devices import chosen_device, device_name
from evaluation_gate import accuracy, furthest, same_answer
from inputs import data_folder
from result_table import Result
from scoring_model import SHAPES, model_config, random_model, with_layers

from slmfast.errors import UserError
from slmfast.scoring.loading import load_tokenizer

DEFAULT = "qwen2-0.5b"
CHOICES = 4
BATCHES = (1, 4)  # of HFLM: 4 items of 900 tokens take 4.4 GB for logits and their softmax
TRIED = 4  # items on which its batch size is chosen
SUBJECTS = {
    "mmlu": ("anatomy", "high_school_physics", "world_religions", "marketing"),
    "cmmlu": ("agronomy", "world_history", "college_law", "marketing"),
}


@dataclass(frozen=True, kw_only=True)
class Context(Notes):
    """The options that all cases share, and what is made of them once."""

    data: Path
    model: Any
    tokenizer: Any
    subjects: int
    items: int
    """Of a subject."""
    what: str
    """The model, in words."""
    batches: dict[int, float] = field(default_factory=dict)
    """HFLM's seconds on a few items by its batch size, once they are known."""


def case(name: str) -> Any:
    """The case of a benchmark."""

    def run(context: Context) -> Iterator[Result]:
        from slmfast.evaluation.language_model import PackedLM

        context.say(name)
        requests, gold = requests_of(context, name)
        packed = PackedLM(context.model, context.tokenizer)
        packed.loglikelihood(requests[:CHOICES])  # finds out, with calls of its own, what the model can do
        batch = best_batch(context, requests)
        harness = hflm(context, batch)
        race = timing.race(lambda: packed.loglikelihood(requests), lambda: harness.loglikelihood(requests, True))
        same = same_answer(race.our_answer, race.their_answer, gold, CHOICES)
        context.say(f"{name}: {race.ours:.1f} s, HFLM {race.theirs:.1f} s")
        right = accuracy(race.our_answer, gold, CHOICES)
        apart = furthest(race.our_answer, race.their_answer)
        tokens = sum(len(packed.tok_encode(request.args[0])) for request in requests[::CHOICES])
        sizes = f"{context.subjects} subjects of {context.items} items, {tokens:,} tokens"
        yield Result(
            group=name,
            case=f"{name}, 5-shot, {sizes}, {context.what} "
            f"(accuracy {right:.3f}; furthest {apart:.1e} nats; {batch} a batch; {timing.described_runs(race.runs)})",
            peer="lm-eval HFLM loglikelihood",
            version=importlib.metadata.version("lm-eval"),
            ours=race.ours,
            theirs=race.theirs,
            unit="s",
            ratio=race.theirs / race.ours if same else None,
            same_answer=same,
        )

    return run


CASES = {name: case(name) for name in SUBJECTS}


def requests_of(context: Context, name: str) -> tuple[list[Any], list[int]]:
    """lm-eval's requests of the first items of a few subjects, an item's choices together, and the right choices."""
    from slmfast.evaluation.suite import load

    chosen = {f"{name}_{subject}" for subject in SUBJECTS[name][: context.subjects]}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_DATASETS_CACHE"] = scratch
        import datasets

        datasets.config.HF_DATASETS_CACHE = Path(scratch) / "cache"
        datasets.disable_progress_bars()
        tasks = load(name, context.data, Path(scratch), only=chosen)["tasks"]
        requests, gold = [], []
        for task in tasks.values():
            task.set_fewshot_seed(seed=1234)
            task.build_all_requests(limit=context.items)
            requests += task.instances
            gold += [task.doc_to_target(request.doc) for request in task.instances[::CHOICES]]
    return requests, gold


def hflm(context: Context, batch: int) -> Any:
    """lm-eval's own language model over the same weights."""
    from lm_eval.models.huggingface import HFLM

    # It warns of every model that is given and not named, which is no news here.
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    return HFLM(pretrained=context.model, tokenizer=context.tokenizer, batch_size=batch, softmax_dtype="float32")


def best_batch(context: Context, requests: Sequence[Any]) -> int:
    """The items a batch with which HFLM is fastest on the first few, chosen once."""
    if not context.batches:
        some = list(requests[: TRIED * CHOICES])
        for batch in BATCHES:
            harness = hflm(context, batch)
            seconds, _ = timing.stopwatch(lambda harness=harness: harness.loglikelihood(some, True))
            context.say(f"HFLM: {batch} a batch, {seconds:.1f} s for {len(some) // CHOICES} items")
            context.batches[batch] = seconds
    return min(context.batches, key=context.batches.__getitem__)


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(prog="slmfast bench evaluation", description=__doc__.partition("\n")[0])
    options.add_argument("--case", action="append", choices=CASES, help="a case (may be repeated; default: all)")
    options.add_argument("--full", action="store_true", help="four subjects of 20 items")
    known = ", ".join(SHAPES)
    options.add_argument("--model-config", help=f"a folder with config.json, or one of {known} (default {DEFAULT})")
    options.add_argument("--layers", type=int, help="of the model (default: all)")
    options.add_argument("--subjects", type=int, help="of each case, at most four (default 2)")
    options.add_argument("--items", type=int, help="of each subject (default 4)")
    options.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    options.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="threads on both sides")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, help="a file for the line of JSON")
    return options


def open_context(options: argparse.Namespace) -> Context:
    """The model, the tokenizer and the sizes that the options ask for.

    Raises:
        UserError: there is no such device or configuration, no data, or a size is out of range.
    """
    for flag, most in (("layers", None), ("subjects", len(SUBJECTS["mmlu"])), ("items", None), ("threads", None)):
        value = getattr(options, flag)
        if value is not None and not 1 <= value <= (most or value):
            raise UserError(f"--{flag} is {value}: give a number from 1{f' to {most}' if most else ''}")
    device = chosen_device(options.device)
    data = data_folder()
    if data is None or not all((data / name).is_dir() for name in (*SUBJECTS, DEFAULT)):
        raise UserError(f"no items: set SLMFAST_DATA to a folder that holds {', '.join(SUBJECTS)} and {DEFAULT}")
    config, tokenizer = model_config(options.model_config or DEFAULT), load_tokenizer(data / DEFAULT)
    if len(tokenizer) > config.get_text_config().vocab_size:
        raise UserError(f"--model-config {options.model_config}: it has fewer words than Qwen2's tokenizer")
    layers = config.get_text_config().num_hidden_layers
    if options.layers:
        layers = min(layers, options.layers)
        with_layers(config, layers)
    torch.set_num_threads(options.threads)
    return Context(
        data=data,
        model=random_model(config, torch.float32, device, options.seed),
        tokenizer=tokenizer,
        subjects=options.subjects or (4 if options.full else 2),
        items=options.items or (20 if options.full else 4),
        what=f"{options.model_config or DEFAULT}, {layers} layers, fp32",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases; 1 if any answer that should be the same was not, or if our own side failed.

    Raises:
        UserError: an option is out of range, or names what does not exist.
    """
    options = parser().parse_args(argv)
    context = open_context(options)
    print(f"{context.what}, random weights, {options.threads} threads\n", flush=True)
    return run_bench("evaluation", CASES, context, options, device_name(next(context.model.parameters()).device))


if __name__ == "__main__":
    from slmfast.cli import main as command_line

    raise SystemExit(command_line(["bench", "evaluation", *sys.argv[1:]]))  # user errors become one line there
