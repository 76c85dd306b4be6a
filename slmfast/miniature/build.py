"""`python -m slmfast.miniature.build --output DIR`: tokenizer and models, trained from scratch and measured.

Less than an hour on two idle cores, and it needs a C++ compiler (torch.compile halves the time). The committed models
were trained by this code, the large one in three runs, each from the weights of the one before; models/scores.json has
the steps and the scores. A build of your own gives models of the same kind, not the same bytes.
"""

import argparse
import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import GenerationConfig, Qwen2ForCausalLM

from slmfast.miniature import MODEL_NAMES
from slmfast.miniature.examples import BASE_DIET, LARGE_DIET, SMALL_DIET
from slmfast.miniature.measure import judge_scores, task_scores
from slmfast.miniature.tokenizer import save_tokenizer, train_tokenizer
from slmfast.miniature.training import Plan, train
from slmfast.store import read_json, write_json

PLANS = {
    "large": Plan(hidden=160, layers=5, heads=4, diet=LARGE_DIET, steps=7100),
    "base": Plan(hidden=128, layers=4, heads=4, diet=BASE_DIET, steps=2900),
    "small": Plan(hidden=64, layers=2, heads=2, diet=SMALL_DIET, steps=1200),
}


def save_model(model: Qwen2ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """A complete model folder: bf16 weights, configuration, generation configuration, tokenizer, chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    model.bfloat16().save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone


def build(output: Path, *, seed: int = 0, steps: float = 1.0, names: tuple[str, ...] = MODEL_NAMES) -> None:
    """Trains the named models into `output` and writes what they score to its scores.json.

    `steps` multiplies the number of steps of each plan.
    """
    tokenizer = train_tokenizer(seed)
    for name in names:
        plan = replace(PLANS[name], steps=max(1, round(PLANS[name].steps * steps)))
        model = train(plan, tokenizer, seed, lambda line, name=name: print(f"{name}: {line}", flush=True))
        save_model(model, tokenizer, output / name)
        record_scores(output, name, {"steps": plan.steps, "seed": seed, "parameters": model.num_parameters()})


def record_scores(output: Path, name: str, facts: dict[str, Any]) -> None:
    """Measures a saved model and puts its figures into scores.json beside those of the other models."""
    file = output / "scores.json"
    scores = read_json(file) if file.exists() else {}
    tasks = task_scores(output / name)
    scores[name] = {
        **facts,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")},
        "tasks": tasks,
        "mean": sum(tasks.values()) / len(tasks),
    }
    if name == "large":
        scores[name]["judge"] = judge_scores(output / name)
    write_json(file, dict(sorted(scores.items())))
    for key, value in (tasks | {"mean": scores[name]["mean"]} | scores[name].get("judge", {})).items():
        print(f"{name}: {key} {value:.1%}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m slmfast.miniature.build", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="the folder for large/, base/, small/ and scores.json"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=float, default=1.0, help="factor on the steps of every plan (0.01 for a trial)")
    parser.add_argument("--models", nargs="+", choices=MODEL_NAMES, default=MODEL_NAMES)
    options = parser.parse_args(arguments)
    build(options.output, seed=options.seed, steps=options.steps, names=tuple(options.models))


if __name__ == "__main__":
    main()
