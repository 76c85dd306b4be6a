"""The data card: what the final sets are made of and how, as Markdown, with nothing in it that differs from run to run.

It lies beside the sets but is no part of them: what depends on the sets does not depend on its words.
"""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from slmfast import __version__
from slmfast.contamination import BENCHMARKS, GRAM
from slmfast.recipe import STAGES, dump_recipe
from slmfast.reporting.document import (
    LANGUAGES,
    NOTHING,
    Block,
    Code,
    Document,
    Section,
    Table,
    Text,
    decimal,
    percent,
    whole,
)
from slmfast.reporting.markdown_page import render_markdown
from slmfast.reporting.run_folder import RunFolder
from slmfast.store import DATA_CARD, atomic_path, digest

DATA_STAGES = STAGES[: STAGES.index("align") + 1]
SETTINGS = ("name", "seed", "threads", "world", "models", "engines", *DATA_STAGES)
_MARK = "<!-- facts "  # the last line begins so: a digest of all that the card was made from
_NO_LICENCE = "no licence given"


def write_data_card(run: RunFolder) -> Path:
    """Writes the card into align's folder, unless it says already what it would say."""
    path = run.stages["align"] / DATA_CARD
    manifests = {stage: run.manifest(stage) | {"seconds": None} for stage in run.stages}
    mark = f"{_MARK}{digest([__version__, manifests, dump_recipe(run.recipe), run.apart])} -->\n"
    if not path.exists() or not path.read_text(encoding="utf-8").endswith(mark):
        with atomic_path(path) as temporary:
            temporary.write_text(render_markdown(_document(run)) + "\n" + mark, encoding="utf-8")
    return path


def _document(run: RunFolder) -> Document:
    sections = [_sets(run), _sources(run), _counts(run), _making(run), _limits(run)]
    sections += [] if run.apart else [_again(run)]
    files = run.notes("collect").get("files", {})
    sections += [_raw_files(files)] if files else []
    if run.apart:
        title = "Data card"
        how = f"made by stages of slmfast that were run one by one, the last of them, align, by slmfast {__version__}."
    else:
        title = f"Data card: {run.recipe.name}"
        how = f"made by the stages collect to align of slmfast {__version__} with seed {run.recipe.seed}."
    subtitle = f"An SFT set and a KTO set for small language models, {how}"
    return Document(title=title, subtitle=subtitle, note=run.recipe.report.note, sections=sections)


def _settings(run: RunFolder, stage: str) -> dict[str, Any] | None:
    """The settings that a stage ran with; None where it ran by itself and its manifest is not at hand."""
    if run.apart:
        return run.manifest(stage).get("settings")
    return dataclasses.asdict(getattr(run.recipe, stage))


def _absent(run: RunFolder) -> list[str]:
    """The stages of which nothing is known."""
    return [stage for stage in DATA_STAGES if not run.manifest(stage)]


def _sets(run: RunFolder) -> Section:
    notes = run.notes("align").get("sets", {})
    rows = [
        ["SFT", "sft/, llamafactory/sft.jsonl", whole(notes.get("sft"))],
        ["KTO", "kto/, llamafactory/kto.jsonl", whole(notes.get("kto"))],
        ["KTO, label true", "", whole(notes.get("kto_positive"))],
        ["KTO, label false", "", whole(notes.get("kto_negative"))],
    ]
    words = (
        "The Parquet files are in TRL's format: prompt and completion are lists of messages (role, content), and the "
        "KTO set has a label, true for a reply to prefer. llamafactory/ holds the same rows for LLaMA-Factory. The "
        "positives of the KTO set are the SFT set. records/ keeps every instruction of the sets with its source, "
        "language, category, label, all of its replies and their ratings."
    )
    outputs = run.manifest("align").get("outputs", {})
    own = [[name, value] for name, value in outputs.items() if name.split("/")[0] in ("sft", "kto", "llamafactory")]
    hashes = Table("BLAKE2b hashes of 128 bits, as b2sum -l 128 prints them", ["file", "hash"], own, 2)
    return Section("The sets", [Text(words), Table("Sizes", ["set", "where", "rows"], rows, 2), hashes])


def _sources(run: RunFolder) -> Section:
    collect = _settings(run, "collect")
    if collect is None:
        words = (
            "The sources' formats, files and licences are not known here: collect was run apart, and the manifest.json "
            "beside what it wrote has them. Find the licences before you pass the sets on."
        )
        return Section("Sources and licences", [Text(words)])
    read = run.notes("collect").get("sources", {})
    ends = {name: run.count_by("align", "source", where=name) for name in ("in_sft", "in_kto_negative")}
    rows = []
    for source in collect["sources"]:
        counts = read.get(source["name"], {})
        figures = [counts.get("records"), counts.get("rejected"), *(end[source["name"]] for end in ends.values())]
        rows.append([source["name"], source["licence"] or _NO_LICENCE, source["format"], *map(whole, figures)])
    header = ["source", "licence", "format", "records", "rejected", "SFT rows", "KTO negatives"]
    words = (
        "In the order of priority: of near-duplicates, the record of the earlier source stays. The licences are those "
        "that collect was told; each binds the rows of its source, regenerated replies included, beside the terms of "
        "the models that wrote them."
    )
    bare = [source["name"] for source in collect["sources"] if not source["licence"]]
    if bare:
        words += f" No licence given: {', '.join(bare)}. Find out what binds these rows before you pass them on."
    return Section("Sources and licences", [Text(words), Table("Sources", header, rows, 3)])


def _counts(run: RunFolder) -> Section:
    absent = _absent(run)
    known = [stage for stage in DATA_STAGES if stage not in absent]
    rows = []
    for stage in known:
        counts = run.manifest(stage).get("counts", {})
        rows.append([stage, *(whole(counts.get(key)) for key in ("rows_in", "out", "dropped", "rejected"))])
    law = "At every stage, in = out + dropped + rejected; the tables dropped/ and rejected/ say why each row went."
    if absent:
        law += (
            f" Not known here: {', '.join(absent)}, run apart; the manifest.json beside what each wrote has its counts."
        )
    blocks: list[Block] = [Text(law)]
    blocks.append(Table("Instructions by stage", ["stage", "in", "out", "dropped", "rejected"], rows))
    for column, words in (("source", {}), ("language", LANGUAGES)):
        found = {stage: run.count_by(stage, column) for stage in known}
        found |= {"SFT rows": run.count_by("align", column, where="in_sft")}
        found |= {"KTO negatives": run.count_by("align", column, where="in_kto_negative")}
        blocks.append(_by_stage(column, words, found))
    return Section("Counts", blocks)


def _by_stage(column: str, words: dict[str, str], found: dict[str, Counter[str]]) -> Table:
    first: Counter[str] = next((counts for counts in found.values() if counts), Counter())
    rows = [
        [words.get(value, value), *(whole(counts[value]) if counts else NOTHING for counts in found.values())]
        for value in sorted(first, key=lambda value: (-first[value], value))
    ]
    return Table(f"Instructions left after each stage, by {column}", [column, *found], rows)


def _making(run: RunFolder) -> Section:
    diversify, notes = run.notes("diversify"), run.notes("align").get("contamination", {})
    entropy, gini = ((diversify.get(key) or [None, None]) for key in ("entropy_bits", "gini"))
    rows = _models(run)
    if diversify or not run.apart:
        rows += [
            ["labels before diversify", whole(len(diversify["labels"])) if "labels" in diversify else NOTHING],
            ["entropy of the labels, before and after (bits)", " and ".join(map(decimal, entropy))],
            ["Gini coefficient of the labels, before and after", " and ".join(map(decimal, gini))],
        ]
    for name in dict.fromkeys([*BENCHMARKS, *notes.get("benchmarks", {})]):
        counts = notes.get("benchmarks", {}).get(name)
        words = "not checked"
        if counts:
            words = f"{counts['records']:,} records hold one of {counts['items']:,}, "
            words += f"{counts['in_sets']:,} of them in the sets"
        rows.append([f"items of {name}", words])
    return Section(
        "How they were made",
        [Table("Models and measures", ["what", "figure"], rows, 2), *_settings_blocks(run)],
    )


def _models(run: RunFolder) -> list[list[str]]:
    """Who wrote and who judged. A recipe says so; of stages run one by one only the rows themselves do."""
    if run.apart:
        return [
            ["labels", "named in records/, label_generation"],
            ["replies", "named in records/, replies"],
            ["perplexity and judgements", "not known here: rate was run by itself"],
        ]
    return [
        ["labels, and large replies", run.recipe.model_name("large")],
        ["small replies", run.recipe.model_name("small")],
        ["perplexity and judgements", run.judge_name()],
    ]


def _settings_blocks(run: RunFolder) -> list[Block]:
    caption = "Settings that decide the data"
    if not run.apart:
        settings = {key: value for key, value in yaml.safe_load(dump_recipe(run.recipe)).items() if key in SETTINGS}
        return [Code(caption, yaml.safe_dump(settings, allow_unicode=True, sort_keys=False))]
    absent = _absent(run)
    manifests = {stage: run.manifest(stage) for stage in DATA_STAGES if stage not in absent}
    known = {stage: {"seed": found.get("seed"), **(found.get("settings") or {})} for stage, found in manifests.items()}
    words = "The stages were run one by one; the settings are those of their manifests."
    if absent:
        words += f" Not known here: {', '.join(absent)}, run apart; the manifest.json beside what each wrote has them."
    return [Text(words), Code(caption, yaml.safe_dump(known, allow_unicode=True, sort_keys=False))]


def _limits(run: RunFolder) -> Section:
    unrated, dedup = run.notes("rate"), _settings(run, "dedup")
    share = percent(unrated.get("unrated_replies"), unrated.get("replies") or 0)
    near = "of the settings that dedup, run apart, was given"
    if dedup is not None:
        near = f"of {dedup['k']}"
        near += f", verified at a Jaccard similarity of {dedup['verify']:g}" if dedup["verify"] is not None else ""
    parts = [
        "No person has read these rows. Labels, safety and quality are one model's judgements, and share its errors; "
        + (f"{share} of the replies could" if share != NOTHING else "Replies that could")
        + " not be rated"
        + (" and neither win nor lose." if share != NOTHING else " neither win nor lose."),
        "Replies that models wrote may be wrong, and inherit what their models learned. Nothing is removed for "
        "personal data or for bias; only the judge's safety answers stand between the raw data and the sets.",
        f"Near-duplicates are found by SimHash at a distance {near}: short texts that differ in a few characters may "
        "both be there.",
        "Languages are told by scripts alone: zh, en, or other.",
        f"Contamination is looked for only in the benchmarks named above, by whole items and {GRAM} tokens in a row: a "
        "paraphrase or a translation is not found.",
    ]
    return Section("Known limits", [Text(part) for part in parts])


def _again(run: RunFolder) -> Section:
    words = (
        f"With slmfast {__version__}, the same raw files and the settings above as recipe.yaml. Same settings and seed "
        "give the same text stages on any machine; replies and ratings are the same on the same machine, with the same "
        "versions and number of threads."
    )
    command = f"slmfast run recipe.yaml --until align --run-dir {run.recipe.name}-again"
    return Section("How to reproduce", [Text(words), Code("From raw files to the sets", command)])


def _raw_files(found: dict[str, dict[str, Any]]) -> Section:
    rows = [[source, name, value] for source, files in found.items() for name, value in files.items()]
    return Section("Raw files", [Table("Their hashes, made as those of the sets", ["source", "file", "hash"], rows, 3)])
