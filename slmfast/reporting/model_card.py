"""The model card: README.md in the folder of every trained and fused model, as model hubs show it.

It is made of what decides the model's bytes, and of nothing else: no times, no paths, no names of machines. So the same
run gives the same card, and nothing depends on its words.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from slmfast import __version__
from slmfast.reporting.document import Code, Document, Section, Table, Text, decimal, percent, whole
from slmfast.reporting.markdown_page import render_markdown
from slmfast.store import MODEL_CARD, model_digest

METHODS = {"sft": "supervised fine-tuning (SFT)", "kto": "KTO"}
_FP32 = (
    "Load it in fp32. What the training changed is smaller than the spacing of bf16 numbers wherever the learning rate "
    "is small: a cast to bf16 or fp16 on loading, or an export in them, loses it."
)
_SAME_BYTES = (
    f"With slmfast {__version__}, the versions above, the same starting model, set, settings, seed and "
    "number of threads, the same machine gives the same bytes. training.json and training_log.json "
    "beside this card hold the settings again and every step's figures."
)


def model_title(folder: Path) -> str:
    """What a model is called without its place: the hub's name of a snapshot, else the folder's name."""
    snapshots, repository = folder.parent, folder.parent.parent.name
    if snapshots.name == "snapshots" and repository.startswith("models--"):
        return f"{repository.removeprefix('models--').replace('--', '/')}@{folder.name}"
    return folder.name


def write_training_card(
    folder: Path,
    *,
    start: Path,
    reference: Path | None,
    weights: int,
    data_digest: str,
    card: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    versions: Mapping[str, str],
) -> None:
    """Writes the card of a trained model.

    Args:
        folder: the model's.
        start, reference: the folders of the model that it began with and, for KTO, of the one that held it.
        weights: how many it has.
        data_digest: of the set's rows.
        card, history: what training.json and training_log.json hold.
        versions: of the packages that decide its bytes, by name.
    """
    method = card["method"]
    rows = [
        ["method", METHODS[method]],
        ["starts from", _model(start)],
        *([["reference model", _model(reference)]] if reference is not None else []),
        ["weights", whole(weights)],
        ["stored as", "float32, safetensors"],
        *_training_figures(card, history, data_digest),
        *([name, version] for name, version in versions.items()),
    ]
    told = yaml.safe_dump(dict(card["settings"]), sort_keys=False)
    sections = [
        Section("How it was made", [Table("Training", ["what", "figure"], rows, 2), Code("Settings", told)]),
        _use("float32"),
        Section("How to reproduce", [Text(_SAME_BYTES), Code("The command", _command(card, start, reference))]),
        _limits(f"It inherits what {model_title(start)} and the training set hold, errors and bias included."),
    ]
    title = f"{method.upper()} of {model_title(start)}"
    _write(folder, title, f"A language model after {METHODS[method]}, by slmfast {__version__}.", method, sections)


def _training_figures(
    card: Mapping[str, Any], history: Sequence[Mapping[str, Any]], data_digest: str
) -> list[list[str]]:
    """What was trained on, how far, and with what outcome, a row a figure."""
    settings, losses = card["settings"], [row["loss"] for row in history]
    tail = losses[-max(1, len(losses) // 10) :]
    return [
        ["training rows", whole(card["rows"])],
        ["rows over the window, left out", whole(card["rows_over_the_window"])],
        ["digest of the training set", data_digest],
        ["samples a step", f"{settings['batch_size']} x {settings['accumulation']}"],
        ["optimizer steps", whole(card["steps"])],
        ["loss, first step", decimal(losses[0] if losses else None, 4)],
        ["loss, mean of the last tenth", decimal(sum(tail) / len(tail) if tail else None, 4)],
        ["share of the update's norm that the forward pass saw", percent(card["forward_sees"]["norm"])],
        ["share of the update's norm that bfloat16 would keep", percent(card["bfloat16_keeps"]["norm"])],
        ["seed", str(card["seed"])],
    ]


def write_fusion_card(folder: Path, paths: Sequence[Path], card: Mapping[str, Any]) -> None:
    """Writes the card of a fused model; `card` is what fusion.json holds, its parts in the order of `paths`."""
    names = [model_title(path) for path in paths]
    rows = [[name, decimal(part["weight"], 4), part["digest"]] for name, part in zip(names, card["parts"], strict=True)]
    words = (
        f"The weighted average of these models' weights, tensor by tensor, added in float64 and stored as "
        f"{card['dtype']}."
    )
    blocks = [Text(words), Table("Parts", ["model", "weight", "digest of its tensors"], rows)]
    if survival := card.get("update_survival"):
        blocks.append(
            Text(
                f"Of the update from {survival['base']}, {card['dtype']} keeps {percent(survival['weights'])} of the "
                f"moved weights and {percent(survival['norm'])} of the norm."
            )
        )
    # The weights in full: rounded ones would give other bytes.
    given = " ".join(f"{name}={part['weight']}" for name, part in zip(names, card["parts"], strict=True))
    mixed = " --mixed-dtypes" if card.get("mixed_dtypes") else ""
    command = f"slmfast fuse {given} --dtype {card['dtype']}{mixed} -o fused"
    sections = [
        Section("How it was made", blocks),
        _use(card["dtype"]),
        Section("How to reproduce", [Code(f"With slmfast {__version__}", command)]),
        _limits("It inherits what its parts hold, errors and bias included."),
    ]
    _write(
        folder,
        f"Average of {', '.join(names)}",
        f"A fused language model, by slmfast {__version__}.",
        "fusion",
        sections,
    )


def _model(folder: Path) -> str:
    return f"{model_title(folder)} (digest of its files {model_digest(folder)})"


def _command(card: Mapping[str, Any], start: Path, reference: Path | None) -> str:
    held = f" --reference {model_title(reference)}" if reference not in (None, start) else ""
    told = " ".join(
        f"--set {key}={_plain(value)}"
        for key, value in card["settings"].items()
        if key != "method" and value is not None
    )
    return f"slmfast train {card['method']} SET --model {model_title(start)}{held} -o OUT --seed {card['seed']} {told}"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _use(dtype: str) -> Section:
    words = _FP32 if dtype == "float32" else f"Its weights are stored in {dtype}: what that type lost is gone."
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")\n'
        'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER", dtype="' + dtype + '")'
    )
    return Section("Use", [Text(words), Code("From Python", code)])


def _limits(inherits: str) -> Section:
    words = (
        f"{inherits} No person has read its replies, and it is not aligned for safety beyond its data. Scores are told "
        "by the evaluation and the report of the run that made it, not here."
    )
    return Section("Limits", [Text(words)])


def _write(folder: Path, title: str, subtitle: str, tag: str, sections: list[Section]) -> None:
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["slmfast", tag]}
    text = render_markdown(Document(title=title, subtitle=subtitle, note=None, sections=sections))
    front = yaml.safe_dump(head, sort_keys=False)
    (folder / MODEL_CARD).write_text(f"---\n{front}---\n\n{text}", encoding="utf-8")
