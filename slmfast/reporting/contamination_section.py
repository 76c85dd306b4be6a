"""Which records hold items of the benchmarks that the models are scored on."""

from slmfast.contamination import BENCHMARKS, GRAM
from slmfast.reporting.document import Block, Section, Table, Text, percent, shortened, whole
from slmfast.reporting.run_folder import RunFolder
from slmfast.store import read_table

EXAMPLES = 12
WORDS = {
    "report": "They stay in the sets: align.contamination is report.",
    "remove": "They are dropped: align.contamination is remove.",
    "skip": "Nothing was checked: align.contamination is skip.",
}


def contamination_section(run: RunFolder) -> Section | None:
    """Counts by benchmark, the unchecked ones named, and the passages that overlap most."""
    notes = run.notes("align").get("contamination")
    if notes is None:
        return None
    found = notes["benchmarks"]
    rows = []
    for name in [*BENCHMARKS, *(name for name in found if name not in BENCHMARKS)]:
        counts = found.get(name)
        figures = [whole(counts[key]) for key in ("items", "records", "exact", "in_sets")] if counts else ["–"] * 4
        rows.append([name, "yes" if counts else "not checked", *figures])
    header = ["benchmark", "checked", "items", "records that hold one", "of these a whole item", "of these in the sets"]
    words = (
        f"A record holds an item if one of its messages is the item, or if both hold the same {GRAM} words (in Chinese "
        "characters) in a row, whatever their case and punctuation. Checked are the prompts and the chosen replies of "
        f"all records with a good reply. {WORDS[notes['mode']]} The recipe names the benchmarks' files under "
        "align.benchmarks."
    )
    return Section("Contamination", [Text(words), Table("Records that hold items", header, rows, 2), *_examples(run)])


def _examples(run: RunFolder) -> list[Block]:
    columns = ["id", "benchmark", "item", "part", "how", "share", "passage"]
    folder = run.table("align", columns, "contamination")
    if folder is None:
        return []
    found = read_table(folder, columns).to_pylist()
    found.sort(key=lambda row: (-row["share"], row["benchmark"], row["item"], row["id"]))
    rows = [
        [row["benchmark"], row["item"], row["part"], shortened(row["passage"], 160), percent(row["share"])]
        for row in found[:EXAMPLES]
    ]
    if not rows:
        return []
    header = ["benchmark", "item", "stands in the", "first shared passage", "share of the item"]
    return [Table(f"The {len(rows)} findings that hold most of an item, of {len(found):,}", header, rows, 4)]
