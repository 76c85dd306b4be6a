"""The scoreboard against the ground truth as tables."""

from slmfast.reporting.document import Section, Table, Text, percent, whole
from slmfast.reporting.scoreboard import Figures

JUDGEMENTS = {
    "quality": "the reply is right",
    "reply_safety": "the reply is safe",
    "instruction_safety": "the instruction is safe",
}


def scoreboard_section(figures: Figures) -> Section:
    """What was planted, what each stage made of it, and how many replies are right."""
    labels = figures["labels"]
    return Section(
        "Scoreboard against the ground truth",
        [
            Text(
                "The miniature's world knows the truth about every record that it planted. Of a family of "
                "near-duplicates all but one should go; a dropped row is right if its stand-in is of its family or "
                "asks the very same."
            ),
            _found(figures),
            Text(
                f"Label accuracy: {percent(labels['accuracy'])} of the {whole(labels['labelled'])} labels that "
                "classify gave are the true ones."
            ),
            _judged(figures["judge"]),
            _right(figures["replies"]),
        ],
    )


def _found(figures: Figures) -> Table:
    rejects, dedup = figures["rejects"], figures["dedup"]
    rows = [
        ["collect: malformed records", whole(rejects["planted"]), whole(rejects["rejected"])],
        ["dedup: near-duplicates", whole(dedup["planted"]), whole(dedup["dropped"])],
    ]
    for row, part in zip(rows, (rejects, dedup), strict=True):
        row += [percent(part["precision"]), percent(part["recall"])]
    header = ["stage", "planted", "found", "precision", "recall"]
    return Table("What was planted and what was found", header, rows)


def _judged(judge: Figures) -> Table:
    columns = ("accuracy", "precision", "recall", "always_yes")
    rows = [
        [name, whole(judge[key]["judged"]), whole(judge[key]["unreadable"]), *(percent(judge[key][c]) for c in columns)]
        for key, name in JUDGEMENTS.items()
    ]
    header = ["it says", "judged", "unreadable", "accuracy", "precision", "recall", "always yes"]
    return Table("Judge accuracy, beside that of a judge that always says yes", header, rows)


def _right(replies: Figures) -> Table:
    rows = [
        ["raw data", whole(replies["raw"]), percent(replies["raw_right"])],
        *(
            [f"rated, {origin}", whole(group["number"]), percent(group["right"])]
            for origin, group in replies["rated"].items()
        ),
        [
            "the original replies of the SFT instructions",
            whole(replies["sft"]),
            percent(replies["sft_originals_right"]),
        ],
        ["the SFT replies", whole(replies["sft"]), percent(replies["sft_right"])],
        ["the KTO negatives", whole(replies["kto_negatives"]), percent(replies["kto_negatives_right"])],
    ]
    return Table("Share of replies that are right", ["replies", "number", "right"], rows)
