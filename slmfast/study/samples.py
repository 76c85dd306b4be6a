"""What the models answer to a few instructions that none of the first seed's trainings has seen."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from slmfast import __version__, pipeline
from slmfast.engines.local import LocalEngine
from slmfast.recipe import TRAINED, Recipe
from slmfast.records import prompt_text
from slmfast.sampling import seeded_hashes
from slmfast.store import digest, model_digest, read_batches, read_json, write_json
from slmfast.study.plan import BASE, FUSED

LANGUAGES = ("zh", "en")
EACH = 3  # instructions of a language
LONGEST_PROMPT = 600  # characters: a sample is there to be read
CANDIDATES = 256  # of a batch of rows
MOST_TOKENS = 256  # of a reply
COLUMNS = ["id", "prompt", "label", "source", "language"]


def answer_samples(recipe: Recipe, run_dir: Path, path: Path) -> list[dict[str, Any]]:
    """Writes and gives, for each instruction, its text, label, source and language, and every model's greedy reply.

    Args:
        run_dir: a finished run.
        path: the JSON file, made anew where the models or the instructions have changed.
    """
    folders = {BASE: Path(pipeline.make_job("train", recipe, run_dir).model("base"))}
    folders |= {name: run_dir / "train" / name for name in TRAINED} | {FUSED: run_dir / "fuse" / "fused"}
    rows = _held_out(recipe, run_dir)
    tokens = min(recipe.regenerate.max_new_tokens, MOST_TOKENS)
    key = digest(
        [__version__, [row["id"] for row in rows], tokens, [model_digest(folder) for folder in folders.values()]]
    )
    if path.exists() and (found := read_json(path))["key"] == key:
        return found["samples"]
    samples: list[dict[str, Any]] = [
        {"prompt": prompt_text(row["prompt"]), "replies": {}}
        | {name: row[name] for name in ("label", "source", "language")}
        for row in rows
    ]
    for name, folder in folders.items() if rows else ():
        engine = LocalEngine(folder, dtype="float32", threads=recipe.threads)
        replies = engine.generate([row["prompt"] for row in rows], max_new_tokens=tokens)
        for sample, reply in zip(samples, replies, strict=True):
            sample["replies"][name] = reply.text
    write_json(path, {"key": key, "samples": samples})
    return samples


def _held_out(recipe: Recipe, run_dir: Path) -> list[dict[str, Any]]:
    """Labelled records outside the training sets: of each language those of the smallest seeded hashes."""
    used = {i for batch in read_batches(run_dir / "align" / "records", columns=["id"]) for i in batch["id"].to_pylist()}
    found: dict[str, list[tuple[int, str, dict[str, Any]]]] = {language: [] for language in LANGUAGES}
    for batch in read_batches(run_dir / "classify" / "records", columns=COLUMNS):
        hashes = seeded_hashes(batch["id"].to_pylist(), recipe.seed, "study samples")
        candidates = np.argsort(hashes, kind="stable")[:CANDIDATES]
        for value, row in zip(hashes[candidates].tolist(), batch.take(pa.array(candidates)).to_pylist(), strict=True):
            short = len(prompt_text(row["prompt"])) <= LONGEST_PROMPT
            if short and row["language"] in found and row["id"] not in used:
                found[row["language"]].append((value, row["id"], row))
        found = {language: sorted(rows, key=lambda item: item[:2])[:EACH] for language, rows in found.items()}
    return [row for rows in found.values() for _, _, row in rows]
