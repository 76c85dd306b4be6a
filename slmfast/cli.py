"""The command line: one sub-command a stage, and run / status / plan / doctor / bench.

A user error is one line on the standard error stream and exit code 2. Commands import what they need when they run,
so that `slmfast --help` is instant.
"""

import argparse
import dataclasses
import errno
import logging
import os
import sys
from pathlib import Path

from slmfast import __version__
from slmfast.errors import NO_ROOM, UserError
from slmfast.training.settings import TrainSettings


def main(argv: list[str] | None = None) -> int:
    """Runs one command and gives the exit code: 0, 1 for problems found, 2 for a user error, 130 for an interrupt."""
    arguments = parser().parse_args(argv)
    _quiet_libraries()
    from slmfast import commands

    try:
        return getattr(commands, arguments.command)(arguments) or 0
    except UserError as error:
        print(f"slmfast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        one_step = arguments.command == "dedup" and arguments.column is not None
        state = "nothing is written" if one_step else "the same command goes on from here"
        print(f"slmfast: interrupted; {state}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output has gone
        return 141  # as the shell counts a broken pipe
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        remedy = _REMEDIES.get(error.errno, "")
        print(f"slmfast: {error.filename or 'the system'}: {error.strerror or error}{remedy}", file=sys.stderr)
        return 2


_REMEDIES = {
    **dict.fromkeys(NO_ROOM, ": free some room; the same command goes on from what is there"),
    errno.EROFS: ": give a folder that can be written to",
    errno.EACCES: ": change its permissions, or name another",
    errno.EPERM: ": change its permissions, or name another",
}


def _quiet_libraries() -> None:
    """Keeps the libraries' own progress bars and start-up remarks off the user's screen."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in ("bitsandbytes", "lm_eval", "datasets", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)


def parser() -> argparse.ArgumentParser:
    """The whole command line as argparse knows it."""
    top = argparse.ArgumentParser(prog="slmfast", description="Post-train small language models on one GPU.")
    top.add_argument("--version", action="version", version=f"slmfast {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_data_stages(commands)
    _add_model_stages(commands)
    doctor = commands.add_parser("doctor", help="what this machine offers, and why not more")
    doctor.add_argument("model", nargs="?", help="a model folder or hub name: also say how it is scored")
    bench = commands.add_parser("bench", help="throughput beside named peers")
    measured = ["dedup", "scoring", "training", "evaluation", "fusion"]
    bench.add_argument("what", choices=measured, help="the hot path to measure")
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="options of the benchmark itself")
    return top


def _add_run(commands: argparse._SubParsersAction) -> None:
    run = commands.add_parser("run", help="run a recipe, all stages in order; with none, the built-in miniature")
    run.add_argument("recipe", nargs="?", type=Path, help="a YAML recipe")
    run.add_argument("--run-dir", type=Path, help="where everything goes (default: runs/<recipe name>)")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")
    run.add_argument("--until", metavar="STAGE", help="stop after this stage")
    _add_study(commands)
    status = commands.add_parser("status", help="which stages of a run are done")
    status.add_argument("run_dir", nargs="?", type=Path, default=Path("runs/miniature"))
    report = commands.add_parser("report", help="write a run's report again, or that of the stages that have ended")
    report.add_argument("run_dir", nargs="?", type=Path, default=Path("runs/miniature"))


def _add_study(commands: argparse._SubParsersAction) -> None:
    study = commands.add_parser(
        "study",
        help="what the paper shows, over several seeds: base, SFT, KTO, both, fusions, learning rates",
        description="Runs a recipe with several seeds, and makes and scores beside each run's five models other mixes "
        "of S1, S2 and S3, and S1 at other learning rates. Ends with study.json, and report.html and report.md with "
        "error bars. The stages before --vary-from are run once. Started again, it goes on.",
    )
    study.add_argument("recipe", nargs="?", type=Path, help="a YAML recipe; with none, the built-in miniature")
    study.add_argument("--run-dir", type=Path, help="where everything goes (default: runs/<recipe name>-study)")
    study.add_argument("--seeds", type=int, default=3, metavar="N", help="how many, from the recipe's on (default 3)")
    study.add_argument(
        "--rates",
        nargs="*",
        metavar="RATE[@SAMPLES]",
        help="learning rates of SFT to compare, each with the samples of a step if not the recipe's; by default the "
        "paper's 1e-6@300, 1e-7 and 5e-8, all times what makes the last one the recipe's; --rates alone compares none",
    )
    study.add_argument(
        "--vary-from",
        default="diversify",
        metavar="STAGE",
        help="the stage from which on each seed has its own: diversify (the default), regenerate, rate, align, train",
    )
    study.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")


def _add_data_stages(commands: argparse._SubParsersAction) -> None:
    _add_collect(commands)
    _add_dedup(commands)
    for name, help_text in (
        ("categorize", "rule categories for records"),
        ("classify", "labels from a language model"),
        ("diversify", "a sample balanced over the labels"),
        ("regenerate", "a large and a small model's replies"),
        ("rate", "perplexity, safety and quality of every reply"),
        ("align", "the SFT and the KTO set"),
    ):
        stage = commands.add_parser(name, help=help_text)
        stage.add_argument("input", type=Path, help="the folder that the stage before wrote")
        stage.set_defaults(command="data_stage", stage=name)
    for name in ("collect", "dedup", "categorize", "classify", "diversify", "regenerate", "rate", "align"):
        stage = commands.choices[name]
        required = name != "collect"  # whose dry run writes nothing
        stage.add_argument("-o", "--output", type=Path, required=required, help="the folder to write")
        stage.add_argument("--recipe", type=Path, help="take settings and models from this recipe")
        stage.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe key")


def _add_collect(commands: argparse._SubParsersAction) -> None:
    collect = commands.add_parser(
        "collect",
        help="raw files to records, or what is wrong with them",
        description="Reads raw files into records: those named, of one format, or without any all sources of the "
        "recipe. With --check it writes nothing: it tells what of each file would be rejected, by line and with a "
        "count of every reason, and ends with exit code 0 only if nothing would be, else 1.",
    )
    collect.add_argument("input", nargs="*", help="files or globs of one format; with none, the recipe's sources")
    collect.add_argument("--format", help="of the files named: belle, coig, camel, dolly, alpaca, ...")
    collect.add_argument("--name", default="source", help="what the source is called in the records")
    collect.add_argument("--check", action="store_true", help="a dry run: tell what would be rejected")
    collect.add_argument("--show", type=int, default=5, metavar="N", help="problems told of each file (default 5)")


def _add_dedup(commands: argparse._SubParsersAction) -> None:
    dedup = commands.add_parser(
        "dedup",
        help="drop near-duplicates from records or from a table's column",
        description="Drops near-duplicates from a folder of records or, with --column, from tables of any size in "
        "Parquet, CSV and JSON files. Of tables, the rows that stay go to OUTPUT/kept/part-*.parquet, in order; where "
        "each of the others was, and the row that stands for it, to OUTPUT/dropped.parquet, and an output that exists "
        "is refused. Of records, they go to OUTPUT/records and OUTPUT/dropped, and an output of the same settings and "
        "input is up to date.",
    )
    dedup.add_argument(
        "input",
        nargs="+",
        type=Path,
        help="a folder of records; or, with --column, files of the same columns (.parquet, .csv, .jsonl, .ndjson, "
        ".json; all but the first also in .gz or .zst), folders of them (not their subfolders, which 'FOLDER/**/*.csv' "
        "takes), and quoted globs; a file named twice counts once. Their order is the order of priority: a row of "
        "an earlier input stands for its copies in later ones",
    )
    dedup.add_argument("--column", help="the column of texts, for files that do not hold records")
    dedup.add_argument("--k", type=int, help="largest Hamming distance, 0 to 8 (default 3)")
    dedup.add_argument("--verify", type=float, help="least Jaccard similarity of the n-grams, 0 to 1 (default 0.8)")
    dedup.add_argument("--no-verify", action="store_true", help="plain SimHash, as the paper has it")
    dedup.add_argument(
        "--mode",
        choices=["representative", "components"],
        help="whether a row goes for one that it resembles itself (the default), or for any that a chain leads to",
    )
    dedup.add_argument("--ngram", type=int, help="characters in a gram, 1 to 9 (default 3)")
    dedup.add_argument("--threads", type=int, help="threads (default: all cores); the result is the same with any")


def _add_model_stages(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser("train", help="SFT or KTO of one model")
    train.add_argument("method", choices=["sft", "kto"])
    train.add_argument(
        "data",
        type=Path,
        help="Parquet, a file or a folder: prompt and completion as lists of {role, content} messages (TRL's "
        "conversational format), for KTO also label, true where the reply is desirable",
    )
    train.add_argument("--model", required=True, help="the model folder to start from")
    train.add_argument("--reference", help="KTO's reference model (default: the starting model)")
    train.add_argument("-o", "--output", type=Path, required=True, help="the model folder to write")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--budget", metavar="SIZE", help="the memory that it may take of the device, such as 24GiB")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help=f"a training setting: {_training_keys()}"
    )
    _add_plan(commands)
    _add_fuse(commands)
    evaluate = commands.add_parser("evaluate", help="score models on lm-eval tasks")
    evaluate.add_argument("models", nargs="+", metavar="NAME=MODEL", help="model folders, named")
    evaluate.add_argument("--tasks", help="task names, separated by commas; of a suite, all unless given")
    evaluate.add_argument("--suite", help="paper: mmlu, cmmlu, ceval-valid, humaneval and gsm8k with pinned settings")
    evaluate.add_argument("--task-folder", help="a folder of lm-eval task files")
    evaluate.add_argument("--data", help="what ${DATA} in these files stands for; the folder of a suite's own files")
    evaluate.add_argument("--limit", type=int, help="items a task")
    evaluate.add_argument(
        "--run-generated-code", action="store_true", help="let HumanEval run, in a sandbox, what the models write"
    )
    evaluate.add_argument("--no-chat-template", action="store_true", help="put the bare text to the model")
    evaluate.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default float32)")
    evaluate.add_argument("--seed", type=int, default=0, help="of the bootstrap over items")
    evaluate.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="the JSON file to write; beside it go NAME.items, NAME.settings.json and, of several models, "
        "NAME.differences.json",
    )


def _add_fuse(commands: argparse._SubParsersAction) -> None:
    fuse = commands.add_parser(
        "fuse",
        help="a weighted average of models, of weights given or searched",
        description="Averages models. With --search the weights are found: every point of a grid is scored on "
        "development tasks, the best becomes the model, and all scores go to fusion_search.json in it. Give "
        "--test-tasks too, and a development item that is one of theirs is refused.",
    )
    fuse.add_argument("models", nargs="+", metavar="MODEL=WEIGHT", help="with --search: model folders alone")
    fuse.add_argument("-o", "--output", type=Path, required=True, help="the model folder to write")
    fuse.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default float32)")
    fuse.add_argument("--base", help="the model before training: what share of its update another type keeps is told")
    fuse.add_argument("--mixed-dtypes", action="store_true", help="average parts of different types as they are stored")
    fuse.add_argument("--search", action="store_true", help="find the weights on development tasks")
    fuse.add_argument("--step", type=float, help="of the grid of weights (default 0.25)")
    fuse.add_argument("--tasks", help="development tasks, separated by commas")
    fuse.add_argument("--task-folder", help="a folder of lm-eval task files")
    fuse.add_argument("--data", help="what ${DATA} in these files stands for")
    fuse.add_argument("--limit", type=int, help="items a task")
    fuse.add_argument("--no-chat-template", action="store_true", help="put the bare text to the model")
    fuse.add_argument("--run-generated-code", action="store_true", help="let HumanEval run what the models write")
    fuse.add_argument("--test-tasks", help="the tasks that will judge the winner: no item may be theirs")
    fuse.add_argument("--test-task-folder", help="their task files (default: --task-folder)")
    fuse.add_argument("--test-data", help="what ${DATA} in these stands for (default: --data)")


def _training_keys() -> str:
    """The settings of a training run with their defaults; learning_rate has none."""
    given = [f for f in dataclasses.fields(TrainSettings) if f.name != "method"]
    return "a training setting: " + ", ".join(
        f.name if f.default is dataclasses.MISSING else f"{f.name}={'' if f.default is None else f.default}"
        for f in given
    )


def _add_plan(commands: argparse._SubParsersAction) -> None:
    plan = commands.add_parser(
        "plan",
        help="what training a model takes of a CUDA device's memory, beside TRL",
        description="Runs one full-size training step on tensors without values, on any machine, and prints what it "
        "would hold of a CUDA device's memory, the packs that fit a budget, and TRL's plan for the same.",
    )
    plan.add_argument("model", type=Path, help="a model's folder; its config.json is enough")
    plan.add_argument("--budget", default="24GiB", metavar="SIZE", help="the device's memory (default 24GiB)")
    plan.add_argument("--method", choices=["sft", "kto"], default="kto")
    plan.add_argument("--optimizer", help="adamw, adamw8bit or adamw8bit-split (default: the settings')")
    plan.add_argument("--forward", help="fp32, bf16 or split")
    plan.add_argument("--max-length", type=int, help="tokens of the longest prompt and reply (default 2048)")
    plan.add_argument("--pack-tokens", type=int, help="the most tokens of a pack (default: the most that fit)")
    plan.add_argument("--checkpointing", choices=["auto", "on", "off"], help="of decoder layers (default auto)")
    plan.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another training setting")


if __name__ == "__main__":
    sys.exit(main())
