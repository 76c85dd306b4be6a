"""What training did: the settings and ends of each run, its curves, and the weights of the fusion."""

import math
from typing import Any

from slmfast.recipe import TRAINED
from slmfast.reporting import plots
from slmfast.reporting.document import NOTHING, Block, Plot, Section, Table, Text, decimal, percent, whole
from slmfast.reporting.run_folder import RunFolder

STARTS = {"S1": "base", "S2": "base", "S3": "S1"}
REWARDS = {
    "reward_desirable": "desirable",
    "reward_undesirable": "undesirable",
    "margin": "margin",
    "z0": "z0",
}
Log = list[dict[str, Any]]


def training_section(run: RunFolder) -> Section | None:
    """Settings, first and last losses, loss curves of S1, S2 and S3, and KTO's rewards."""
    logs = _logs(run)
    if not logs:
        return None
    blocks: list[Block] = [trainings_table(run)]
    for method, words in (
        ("sft", "SFT loss: nats a token of the reply"),
        ("kto", "KTO loss: mean of a step's samples"),
    ):
        lines = {name: _series(log, "loss") for name, log in logs.items() if _method(run, name) == method}
        lines = {name: line for name, line in lines.items() if line[0]}
        if lines:
            blocks.append(Plot(f"{words} ({', '.join(lines)})", plots.curves(lines, "optimizer step", "loss")))
    for name, log in logs.items():
        lines = {title: _series(log, key) for key, title in REWARDS.items()}
        lines = {title: line for title, line in lines.items() if line[0]}
        if lines:
            caption = f"{name}: log-probability over the reference's, in nats a reply, and KTO's baseline z0"
            blocks.append(Plot(caption, plots.curves(lines, "optimizer step", "reward")))
    return Section("Training", blocks)


def _logs(run: RunFolder) -> dict[str, Log]:
    logs = {name: run.json("train", name, "training_log.json") or [] for name in TRAINED}
    return {name: log for name, log in logs.items() if log}


def _method(run: RunFolder, name: str) -> str:
    return getattr(run.recipe.train, name).method


def _series(log: Log, key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one figure, without the rows that lack it."""
    rows = [(row["step"], row[key]) for row in log if "step" in row and _is_finite(row.get(key))]
    return [float(step) for step, _ in rows], [float(value) for _, value in rows]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def trainings_table(run: RunFolder) -> Table:
    """The settings, sizes and ends of S1, S2 and S3, a column each."""
    columns, logs = [], _logs(run)
    for name, log in logs.items():
        settings = getattr(run.recipe.train, name)
        card = run.json("train", name, "training.json") or {}
        losses, margins = _series(log, "loss")[1], _series(log, "margin")[1]
        columns.append(
            {
                "method": settings.method.upper(),
                "starts from": STARTS[name],
                "rows": whole(card.get("rows")),
                "rows over the window, left out": whole(card.get("rows_over_the_window")),
                "peak learning rate": f"{settings.learning_rate:g}",
                "samples a step": f"{settings.batch_size} x {settings.accumulation} = {settings.effective_batch:,}",
                "epochs": whole(settings.epochs),
                "steps": whole(card.get("steps", len(losses))),
                "optimizer, forward pass": f"{settings.optimizer}, {settings.forward}",
                "the update's norm as the forward pass saw it": _norm(card, "forward_sees"),
                "the update's norm as bfloat16 would keep it": _norm(card, "bfloat16_keeps"),
                "weights of positives, negatives": _class_weights(settings),
                "loss, first step": decimal(losses[0] if losses else None, 4),
                "loss, mean of the last tenth": decimal(_tail(losses), 4),
                "reward margin, mean of the last tenth": decimal(_tail(margins), 4),
            }
        )
    rows = [[what, *(column[what] for column in columns)] for what in columns[0]]
    return Table("The three trainings", ["", *logs], rows)


def _norm(card: dict[str, Any], share: str) -> str:
    return percent(card.get(share, {}).get("norm"))


def _class_weights(settings: Any) -> str:
    if settings.method != "kto":
        return NOTHING
    return f"{settings.desirable_weight:g}, {settings.undesirable_weight:g}"


def _tail(values: list[float]) -> float | None:
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last) if last else None


def fusion_section(run: RunFolder) -> Section | None:
    """The parts of the fused model and their weights."""
    card = run.json("fuse", "fused", "fusion.json")
    if card is None:
        return None
    names = [name for name, weight in run.recipe.fuse.weights.items() if weight > 0]
    parts = card["parts"]
    if len(names) != len(parts):
        names = [part["name"] for part in parts]
    rows = [[name, decimal(part["weight"], 4), part["digest"]] for name, part in zip(names, parts, strict=True)]
    blocks: list[Block] = [
        Text(f"The fused model is the weighted average of these models' weights, stored as {card['dtype']}."),
        Table("Fusion", ["part", "weight", "digest of its files"], rows),
    ]
    survival = card.get("update_survival")
    if survival:
        blocks.append(
            Text(
                f"In {card['dtype']}, {percent(survival['weights'])} of the moved weights and "
                f"{percent(survival['norm'])} of the update's norm survive."
            )
        )
    return Section("Fusion", blocks)
