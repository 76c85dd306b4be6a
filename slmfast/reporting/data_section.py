"""What became of the raw data: the balance of every stage, who went and why, and how the mixture changed."""

from collections import Counter

from slmfast.recipe import STAGES
from slmfast.reporting import plots
from slmfast.reporting.document import (
    LANGUAGES,
    NOTHING,
    Block,
    Plot,
    Section,
    Table,
    Text,
    decimal,
    percent,
    shortened,
    whole,
)
from slmfast.reporting.run_folder import RunFolder

TOP = 20  # rows of the tables that could be long
REASONS = 40


def stages_section(run: RunFolder) -> Section:
    """The counts of every finished stage, and the reasons of all rows that went."""
    rows = []
    for stage in STAGES:
        manifest = run.manifest(stage) if stage in run.stages else {}
        if manifest:
            counts = manifest["counts"]
            figures = [whole(counts[key]) for key in ("rows_in", "out", "dropped", "rejected")]
            rows.append([stage, *figures, decimal(manifest["seconds"], 1)])
    counts = Table("Instructions by stage", ["stage", "in", "out", "dropped", "rejected", "seconds"], rows)
    law = Text(
        "From collect to align every instruction is accounted for: in = out + dropped + rejected. The later stages "
        "don't take instructions; their column out counts the models they wrote or scored. The stage report writes "
        "this page, so it is not in the table; summary.json has it."
    )
    missing = [stage for stage in STAGES if stage in run.stages and not run.manifest(stage)]
    unfinished = [Text(f"The run has not ended. Not in this report: {', '.join(missing)}.")] if missing else []
    return Section("Stages", [*unfinished, law, counts, *_reasons(run)])


def _reasons(run: RunFolder) -> list[Block]:
    rows = []
    for stage in run.stages:
        for table in ("rejected", "dropped"):
            reasons = run.reasons(stage, table)
            total = sum(count for _, count in reasons)
            for reason, count in reasons[:REASONS]:
                rows.append([stage, table, shortened(reason, 200), whole(count), percent(count, total)])
            rest = reasons[REASONS:]
            if rest:
                count = sum(count for _, count in rest)
                rows.append([stage, table, f"{len(rest):,} further reasons", whole(count), percent(count, total)])
    if not rows:
        return [Text("No row was dropped or rejected.")]
    header = ["stage", "what", "reason", "rows", "share"]
    return [Table("Why rows went, with their share of the stage's dropped or rejected rows", header, rows, 3)]


def _ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    """By falling count, equal ones by name."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0] or ""))


def mixture_section(run: RunFolder) -> Section | None:
    """Shares by source, language and category as the data are collected, deduplicated and chosen."""
    blocks: list[Block] = []
    for column, title in (
        ("source", "Sources"),
        ("language", "Languages"),
        ("category", f"Categories, the {TOP} most frequent"),
    ):
        found = {
            "collected": run.count_by("collect", column),
            "after dedup": run.count_by("dedup", column),
            "in the SFT set": run.count_by("align", column, where="in_sft"),
        }
        counts = {name: count for name, count in found.items() if count}
        if counts:
            blocks.append(_shares(title, column, counts))
            if column == "source":
                blocks.append(_share_plot(counts))
    blocks += _matching(run)
    return Section("Mixture", blocks) if blocks else None


def _matching(run: RunFolder) -> list[Block]:
    """How the data are matched by source and language at once: in the raw data and in the SFT set."""
    pairs = ("source", "language")
    found = {
        "collected": run.count_together("collect", pairs),
        "SFT": run.count_together("align", pairs, where="in_sft"),
    }
    found = {name: counts for name, counts in found.items() if counts}
    if not found:
        return []
    sources = [value for value, _ in _ranked(run.count_by("collect", "source"))][:TOP]
    header = ["source", *(f"{name}: {words}" for name in found for words in LANGUAGES.values())]
    rows = [[s, *(whole(counts[s, code]) for counts in found.values() for code in LANGUAGES)] for s in sources]
    blocks: list[Block] = [Table("Data matching: instructions by source and language", header, rows)]
    for name, counts in found.items():
        total = counts.total()
        parts = {words: [100 * counts[s, code] / total for s in sources] for code, words in LANGUAGES.items()}
        drawing = plots.stacked_bars(sources, parts, "% of instructions")
        blocks.append(Plot(f"Data matching by source and language, {name}", drawing))
    return blocks


def _shares(title: str, column: str, counts: dict[str, Counter[str]]) -> Table:
    first = next(iter(counts.values()))
    rows = []
    for value, _ in _ranked(first)[:TOP]:
        cells = [LANGUAGES.get(value, value) if column == "language" else value]
        for found in counts.values():
            cells += [whole(found[value]), percent(found[value], found.total())]
        rows.append(cells)
    if len(first) > TOP:
        cells = [f"{len(first) - TOP:,} more"]
        for found in counts.values():
            rest = found.total() - sum(found[value] for value, _ in _ranked(first)[:TOP])
            cells += [whole(rest), percent(rest, found.total())]
        rows.append(cells)
    header = [column, *(cell for name in counts for cell in (name, "share"))]
    return Table(title, header, rows)


def _share_plot(counts: dict[str, Counter[str]]) -> Plot:
    names = [value for value, _ in _ranked(next(iter(counts.values())))[:TOP]]
    series = {name: [100 * found[value] / found.total() for value in names] for name, found in counts.items()}
    return Plot("Shares of the sources as the run goes on", plots.bars(names, series, "% of instructions"))


def summary_rows(run: RunFolder) -> list[list[str]]:
    """The run's way from raw records to sets, as rows of a table."""
    counts = {stage: run.manifest(stage).get("counts", {}) for stage in run.stages}
    sets = run.notes("align").get("sets", {})
    figures = {
        "raw records read": counts["collect"].get("rows_in"),
        "well-formed": counts["collect"].get("out"),
        "left after near-duplicates went": counts["dedup"].get("out"),
        "labelled": counts["classify"].get("out"),
        "in the balanced sample": counts["diversify"].get("out"),
        "SFT rows": sets.get("sft"),
        "KTO rows": sets.get("kto"),
    }
    return [[name, whole(figure)] for name, figure in figures.items() if whole(figure) != NOTHING]
