"""The replies: how they were rated by origin, which of them made the sets, and some to read."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slmfast.records import prompt_text
from slmfast.reporting import plots
from slmfast.reporting.distributions import spread_blocks, win_blocks, wins
from slmfast.reporting.document import (
    Block,
    Example,
    Plot,
    Reply,
    Section,
    Table,
    Text,
    decimal,
    percent,
    shortened,
    whole,
)
from slmfast.reporting.run_folder import RunFolder
from slmfast.sampling import seeded_hashes, smallest
from slmfast.store import read_batches

ORIGINS = ("original", "large", "small")
REFUSALS = ("refused", "refusal", "content_filter")  # finish reasons
GRADES = (1.0, 0.5, 0.0)
EXAMPLES = 6
EXAMPLE_CHARACTERS = 1500  # of a prompt or a reply


def ratings_section(run: RunFolder) -> Section | None:
    """What the judge and the perplexity model said of the replies of each origin."""
    rated = _rated_replies(run)
    if rated is None or rated.num_rows == 0:
        return None
    groups = {origin: rated.filter(pc.equal(rated["origin"], origin)) for origin in _origins(rated)}
    header = ["replies", "number", "unrated", "quality, mean", "1", "0.5", "0", "safety, mean", "cut off", "refused"]
    rows, grades = [], {origin: _grade_counts(group) for origin, group in groups.items()}
    for origin, group in groups.items():
        counts, number = grades[origin], group.num_rows
        judged = sum(counts[grade] for grade in GRADES)
        row = [origin, whole(number), whole(number - judged), decimal(pc.mean(group["quality"]).as_py())]
        row += [percent(counts[grade], judged) for grade in GRADES]
        cut = pc.sum(pc.equal(group["finish_reason"], "length")).as_py() or 0
        refused = pc.sum(pc.is_in(group["finish_reason"], pa.array(REFUSALS))).as_py() or 0
        shares = [percent(cut, number), percent(refused, number)]
        rows.append([*row, decimal(pc.mean(group["safety"]).as_py()), *shares])
    parts: dict[str, list[float]] = {
        f"quality {grade:g}": [100 * counts[grade] / groups[origin].num_rows for origin, counts in grades.items()]
        for grade in GRADES
    }
    parts["unrated"] = [100 - sum(shares) for shares in zip(*parts.values(), strict=True)]
    blocks: list[Block] = [
        Text(
            "The judge answers by the log-probability of fixed choices. A reply that it can't read is unrated, and "
            "neither wins nor loses. Cut off are replies that reached regenerate.max_new_tokens before their end. "
            "Refused are those that a server did not give, or kept back in part; they never win."
        ),
        Table("Ratings by origin of the reply", header, rows),
        Plot("Quality by origin of the reply", plots.stacked_bars(list(groups), parts, "% of replies")),
        _perplexities(groups),
        *spread_blocks(groups),
        _winners(run),
        *win_blocks(run, list(groups)),
    ]
    return Section("Ratings", blocks)


def _rated_replies(run: RunFolder) -> pa.Table | None:
    """One row a reply: origin, finish_reason, and its ratings."""
    folder = run.table("rate", ["replies", "ratings"])
    if folder is None:
        return None
    names = {"replies": ("origin", "finish_reason"), "ratings": ("safety", "quality", "bits_per_token", "perplexity")}
    pieces = []
    for batch in read_batches(folder, columns=list(names)):
        lists = {column: pc.list_flatten(batch.column(column)) for column in names}
        pieces.append(
            pa.table({name: pc.struct_field(lists[c], name) for c, fields in names.items() for name in fields})
        )
    return pa.concat_tables(pieces) if pieces else None


def _origins(rated: pa.Table) -> list[str]:
    found = pc.unique(rated["origin"]).to_pylist()
    return [o for o in ORIGINS if o in found] + sorted(set(found) - set(ORIGINS))


def _grade_counts(group: pa.Table) -> Counter[float | None]:
    return Counter(group["quality"].to_pylist())


def _perplexities(groups: dict[str, pa.Table]) -> Table:
    rows = []
    for origin, group in groups.items():
        bits, perplexity = (pc.drop_null(group[name]).to_numpy() for name in ("bits_per_token", "perplexity"))
        quartiles = np.quantile(perplexity, [0.25, 0.5, 0.75]) if len(perplexity) else [None] * 3
        mean = float(bits.mean()) if len(bits) else None
        rows.append([origin, whole(len(bits)), decimal(mean), *(decimal(value) for value in quartiles)])
    header = ["replies", "scored", "bits a token, mean", "perplexity, quartile 1", "median", "quartile 3"]
    return Table("Perplexity of a reply given its prompt; a model's own replies come out low", header, rows)


def _winners(run: RunFolder) -> Table:
    best, worst = (_by_origin(counts) for counts in wins(run))
    rows = [
        [o, whole(best[o]), percent(best[o], best.total()), whole(worst[o]), percent(worst[o], worst.total())]
        for o in sorted(best | worst, key=lambda o: (ORIGINS.index(o) if o in ORIGINS else len(ORIGINS), o))
    ]
    header = ["replies", "best, in the SFT set", "share", "worst, KTO negatives", "share"]
    return Table("Whose replies made the sets", header, rows)


def _by_origin(counts: Counter[tuple[str, str]]) -> Counter[str]:
    summed: Counter[str] = Counter()
    for (_, origin), count in counts.items():
        summed[origin] += count
    return summed


def sets_section(run: RunFolder) -> Section | None:
    """How large the training sets are, and what decided it."""
    notes = run.notes("align")
    if "sets" not in notes:
        return None
    sets, wanted = notes["sets"], run.recipe.align.positives_per_negative
    ratio = sets["kto_positive"] / sets["kto_negative"] if sets["kto_negative"] else None
    rows = [
        ["SFT rows", whole(sets["sft"])],
        ["KTO rows", whole(sets["kto"])],
        ["of these positive", whole(sets["kto_positive"])],
        ["of these negative", whole(sets["kto_negative"])],
        ["positives for each negative", decimal(ratio, 2)],
        ["instructions with a best reply", whole(notes.get("with_best"))],
        ["instructions with a best and a worse reply", whole(notes.get("with_worst"))],
        ["bits a token over which no reply wins", decimal(notes.get("max_bits_per_token"), 2)],
    ]
    words = f"The positives of the KTO set are the SFT set. The recipe asks for {wanted:g} positives for each negative."
    if ratio is None or ratio > 1.02 * wanted:
        words += " There were fewer worse replies than that takes, so the set has fewer negatives."
    return Section("Training sets", [Text(words), Table("Sizes", ["", "figure"], rows)])


def examples_section(run: RunFolder) -> Section | None:
    """A few instructions of the sets, chosen by a seeded hash, with all their replies."""
    columns = ["id", "source", "language", "category", "label", "prompt", "replies", "ratings", "best", "worst"]
    folder = run.table("align", columns)
    if folder is None:
        return None
    ids = [i for batch in read_batches(folder, columns=["id"]) for i in batch.column("id").to_pylist()]
    chosen = smallest(seeded_hashes(ids, run.recipe.seed, "report"), EXAMPLES)
    examples, start = [], 0
    for batch in read_batches(folder, columns=columns):
        rows = batch.filter(pa.array(chosen[start : start + batch.num_rows])).to_pylist()
        start += batch.num_rows
        examples += [_example(row) for row in rows]
    if not examples:
        return None
    words = f"{len(examples)} instructions of the sets, chosen by a hash of their ids and the seed, not by hand."
    return Section("Examples", [Text(words), *examples])


def _example(row: dict[str, Any]) -> Example:
    fates = {row["best"]: "best", row["worst"]: "worst"}
    replies = [
        Reply(reply["origin"], shortened(reply["text"], EXAMPLE_CHARACTERS), _rating(rating), fates.get(i, ""))
        for i, (reply, rating) in enumerate(zip(row["replies"], row["ratings"], strict=True))
    ]
    heading = f"{row['label']} ({row['source']}, {row['language']}, {row['category']})"
    return Example(heading, shortened(prompt_text(row["prompt"]), EXAMPLE_CHARACTERS), replies)


def _rating(rating: dict[str, Any]) -> str:
    quality, safety = (decimal(rating[name], 1) for name in ("quality", "safety"))
    return f"quality {quality}, safety {safety}, perplexity {decimal(rating['perplexity'])}"
