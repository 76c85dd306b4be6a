"""The data card: what the final sets are made of and how, as Markdown, with nothing in it that differs from run to run.

It lies beside the sets but is no part of them: what depends on the sets does not depend on its words.
"""

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


def write_data_card(run: RunFolder) -> Path:
    """Writes the card into align's folder, unless it says already what it would say."""
    path = run.stages["align"] / DATA_CARD
    manifests = {stage: run.manifest(stage) | {"seconds": None} for stage in run.stages}
    mark = f"{_MARK}{digest([__version__, manifests, dump_recipe(run.recipe)])} -->\n"
    if not path.exists() or not path.read_text(encoding="utf-8").endswith(mark):
        with atomic_path(path) as temporary:
            temporary.write_text(render_markdown(_document(run)) + "\n" + mark, encoding="utf-8")
    return path


def _document(run: RunFolder) -> Document:
    return Document(
        title=f"Data card: {run.recipe.name}",
        subtitle="An SFT set and a KTO set for small language models, made by the stages collect to align of slmfast "
        f"{__version__} with seed {run.recipe.seed}.",
        note=run.recipe.report.note,
        sections=[_sets(run), _sources(run), _counts(run), _making(run), _limits(run), _again(run), _raw_files(run)],
    )


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
    read = run.notes("collect").get("sources", {})
    ends = {name: run.count_by("align", "source", where=name) for name in ("in_sft", "in_kto_negative")}
    rows = []
    for source in run.recipe.collect.sources:
        counts = read.get(source.name, {})
        figures = [counts.get("records"), counts.get("rejected"), *(end[source.name] for end in ends.values())]
        rows.append([source.name, source.licence or "not stated", source.format, *map(whole, figures)])
    header = ["source", "licence", "format", "records", "rejected", "SFT rows", "KTO negatives"]
    words = (
        "In the order of priority: of near-duplicates, the record of the earlier source stays. The licences are those "
        "that the recipe states; each binds the rows of its source, regenerated replies included, beside the terms of "
        "the models that wrote them."
    )
    return Section("Sources and licences", [Text(words), Table("Sources", header, rows, 3)])


def _counts(run: RunFolder) -> Section:
    rows = []
    for stage in DATA_STAGES:
        counts = run.manifest(stage).get("counts", {})
        rows.append([stage, *(whole(counts.get(key)) for key in ("rows_in", "out", "dropped", "rejected"))])
    law = "At every stage, in = out + dropped + rejected; the tables dropped/ and rejected/ say why each row went."
    blocks: list[Block] = [Text(law)]
    blocks.append(Table("Instructions by stage", ["stage", "in", "out", "dropped", "rejected"], rows))
    for column, words in (("source", {}), ("language", LANGUAGES)):
        found = {stage: run.count_by(stage, column) for stage in DATA_STAGES}
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
    recipe = run.recipe
    diversify, notes = run.notes("diversify"), run.notes("align").get("contamination", {})
    entropy, gini = ((diversify.get(key) or [None, None]) for key in ("entropy_bits", "gini"))
    rows = [
        ["labels, and large replies", recipe.model_name("large")],
        ["small replies", recipe.model_name("small")],
        ["perplexity and judgements", run.judge_name()],
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
    settings = {key: value for key, value in yaml.safe_load(dump_recipe(recipe)).items() if key in SETTINGS}
    text = yaml.safe_dump(settings, allow_unicode=True, sort_keys=False)
    return Section(
        "How they were made",
        [Table("Models and measures", ["what", "figure"], rows, 2), Code("Settings that decide the data", text)],
    )


def _limits(run: RunFolder) -> Section:
    unrated = run.notes("rate")
    share = percent(unrated.get("unrated_replies"), unrated.get("replies") or 0)
    k, verify = run.recipe.dedup.k, run.recipe.dedup.verify
    parts = [
        "No person has read these rows. Labels, safety and quality are one model's judgements, and share its errors; "
        f"{share} of the replies could not be rated and neither win nor lose.",
        "Replies that models wrote may be wrong, and inherit what their models learned. Nothing is removed for "
        "personal data or for bias; only the judge's safety answers stand between the raw data and the sets.",
        f"Near-duplicates are found by SimHash at a distance of {k}"
        + (f", verified at a Jaccard similarity of {verify:g}" if verify is not None else "")
        + ": short texts that differ in a few characters may both be there.",
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


def _raw_files(run: RunFolder) -> Section:
    found: dict[str, dict[str, Any]] = run.notes("collect").get("files", {})
    rows = [[source, name, value] for source, files in found.items() for name, value in files.items()]
    return Section("Raw files", [Table("Their hashes, made as those of the sets", ["source", "file", "hash"], rows, 3)])
