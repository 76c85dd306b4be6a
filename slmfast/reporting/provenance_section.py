"""What stands behind the figures: deviations from the method, settings, environment, and how to do it all again."""

import platform
from pathlib import Path

from slmfast import __version__
from slmfast.doctor import findings
from slmfast.recipe import dump_recipe
from slmfast.reporting.document import Block, Code, Section, Table, Text, decimal
from slmfast.reporting.run_folder import RunFolder

CPU_INFO = Path("/proc/cpuinfo")


def method_section(run: RunFolder) -> Section | None:
    """Where this run goes its own way, so that no reader has to find out by comparing; of its finished stages."""
    wanted, limit = run.recipe.align.positives_per_negative, run.recipe.evaluate.limit
    limits = f" at most {limit:,} items a task;" if limit else ""
    kto = (
        f"The KTO set aims at {wanted:g} positives for each negative, and keeps replies to one prompt from being "
        "neighbours."
    )
    precision = (
        "Weights are trained, stored and fused in fp32: at the method's learning rates a bf16 weight would keep almost "
        "nothing of the update."
    )
    evaluated = (
        f"Evaluated in {run.recipe.evaluate.dtype} with our harness, the base model included;{limits} published scores "
        "are not comparable."
    )
    perplexity = (
        "Perplexity is conditional on the prompt and only breaks ties among replies of equal safety and quality."
    )
    parts = [("train", part) for part in _class_weights(run)]
    parts += [("align", kto), ("train", precision), ("evaluate", evaluated), ("rate", perplexity)]
    texts = [Text(part) for stage, part in parts if run.manifest(stage)]
    return Section("Choices and deviations", texts) if texts else None


def _class_weights(run: RunFolder) -> list[str]:
    """How KTO weighs the two classes, one sentence for the runs that weigh them alike."""
    wanted = run.recipe.align.positives_per_negative
    alike: dict[tuple[float, float], list[str]] = {}
    for name in ("S2", "S3"):
        settings = getattr(run.recipe.train, name)
        alike.setdefault((settings.desirable_weight, settings.undesirable_weight), []).append(name)
    return [
        f"{' and '.join(names)}: KTO weighs an undesirable reply's loss {bad:g} and a desirable one's {good:g}; in a "
        f"{wanted:g} : 1 set the desirable ones then weigh {decimal(wanted * good / bad if bad else None, 2)} times "
        "the others in all. The method states no weight: an undesirable weight of 1.5, as our recipes set it "
        f"({', '.join(f'train.{name}.undesirable_weight' for name in names)}), is our choice and a deviation."
        for (good, bad), names in alike.items()
    ]


def provenance_section(run: RunFolder) -> Section:
    """The recipe, the machine and the versions, and the command that repeats the run."""
    recipe = dump_recipe(run.recipe)
    blocks: list[Block] = [
        Text(
            "The run's folder holds recipe.yaml, the same text as the settings below. The same recipe and seed give "
            "the same bytes: of the text stages on any machine, of the float stages on the same machine with the same "
            "versions and number of threads."
        ),
        Code("How to reproduce", f"slmfast run recipe.yaml --run-dir {run.recipe.name}-again"),
        Table(
            "Models",
            ["role", "model"],
            [[role, run.recipe.model_name(role)] for role in ("base", "large", "small")]
            + [["judge, and perplexity", run.judge_name()]],
            text_columns=2,
        ),
        Table("Environment of the report", ["what", "how it stands"], environment(run), text_columns=2),
        Code("Settings: the whole recipe", recipe, folded=True),
    ]
    return Section("Settings and reproduction", blocks)


def environment(run: RunFolder) -> list[list[str]]:
    """The rows of a table: versions, system, processor, and what this machine offers."""
    versions = {stage: run.manifest(stage).get("code_version") for stage in run.stages}
    used = sorted({version for version in versions.values() if version})
    rows = [["slmfast", f"{__version__} (stages written by {', '.join(used) or 'none'})"]]
    rows += [["system", f"{platform.system()} {platform.machine()}"], ["processor model", _processor()]]
    return rows + [list(finding) for finding in findings()]


def _processor() -> str:
    """The processor's name as Linux tells it, or what Python knows elsewhere."""
    if CPU_INFO.exists():
        for line in CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
