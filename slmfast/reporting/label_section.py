"""The labels: how even they are, which there are, what the judge thought of them, and how they fit the rules."""

from collections import Counter, defaultdict

import numpy as np

from slmfast.reporting import plots
from slmfast.reporting.document import Block, Code, Plot, Section, Table, Text, decimal, percent, whole
from slmfast.reporting.run_folder import RunFolder
from slmfast.sampling import entropy

TOP = 20  # rows of a table, bars of a drawing
TREE_PRIMARY, TREE_SECONDARY = 60, 15  # branches of the tree, and of a branch, that are written out
_SELECTION = {  # by diversify.selection
    "exact": "They are balanced by water-filling: rare labels keep all they have, common ones share what is left.",
    "random": "They are balanced at random: a record of a common label is accepted with the probability that leaves "
    "equally many of each such label on average.",
}
Labels = list[tuple[str, list[int]]]  # (label, [before, after]), the most frequent first


def labels_section(run: RunFolder) -> Section | None:
    """How even the labels were before and after the balancing, and what they are."""
    notes = run.notes("diversify")
    if "labels" not in notes:
        return None
    labels: Labels = sorted(notes["labels"].items(), key=lambda item: (-item[1][0], item[0]))
    before, after = ([counts[i] for _, counts in labels] for i in (0, 1))
    rows = [
        ["instructions", whole(sum(before)), whole(sum(after))],
        ["labels with instructions", *(whole(sum(count > 0 for count in counts)) for counts in (before, after))],
        ["instructions of the largest label", whole(max(before, default=0)), whole(max(after, default=0))],
        ["entropy (bits)", *(decimal(value) for value in notes["entropy_bits"])],
        ["Gini coefficient", *(decimal(value) for value in notes["gini"])],
    ]
    top = labels[:TOP]
    names = [label for label, _ in top]
    series = {"before": [counts[0] for _, counts in top], "after": [counts[1] for _, counts in top]}
    shown = f"the {len(top)} most frequent of {len(labels):,} labels" if len(labels) > len(top) else "all labels"
    selection = run.recipe.diversify.selection
    blocks: list[Block] = [
        Text(f"A higher entropy and a lower Gini coefficient mean more even labels. {_SELECTION[selection]}"),
        Table("Labels before and after diversify", ["", "before", "after"], rows),
        *_rare(run, labels),
    ]
    if top:
        blocks.append(Plot(f"Instructions by label, {shown}", plots.bars(names, series, "instructions")))
        blocks += _tree(labels)
    return Section("Labels", [*blocks, *_ends(run), *_audit(run), *_agreement(run)])


def _rare(run: RunFolder, labels: Labels) -> list[Block]:
    least = run.recipe.diversify.min_label_count
    rare = [before for _, (before, _) in labels if before < least]
    if not rare:
        return []
    words = (
        f"Rare labels, of fewer than {least:,} instructions, went (diversify.min_label_count): {len(rare):,} of "
        f"{len(labels):,}, with {sum(rare):,} instructions in all. Over fewer labels the entropy may be lower though "
        "those that stay are more even."
    )
    return [Text(words)]


def _tree(labels: Labels) -> list[Block]:
    """Primary categories as a table, and the whole tree, as far as it is readable, as folded text."""
    branches: dict[str, Labels] = defaultdict(list)
    for label, counts in labels:
        primary, _, secondary = label.partition("-")
        branches[primary].append((secondary, counts))
    sums = {name: [sum(c[i] for _, c in leaves) for i in (0, 1)] for name, leaves in branches.items()}
    order = sorted(branches, key=lambda name: (-sums[name][0], name))
    rows = [[name, whole(len(branches[name])), *map(whole, sums[name])] for name in order[:TOP]]
    if len(order) > TOP:
        rest = order[TOP:]
        totals = [sum(sums[name][i] for name in rest) for i in (0, 1)]
        rows.append([f"{len(rest):,} more", whole(sum(len(branches[name]) for name in rest)), *map(whole, totals)])
    lines = []
    for name in order[:TREE_PRIMARY]:
        lines.append(f"{name}  {sums[name][0]:,} > {sums[name][1]:,}")
        leaves = branches[name]
        lines += [f"    {leaf}  {first:,} > {last:,}" for leaf, (first, last) in leaves[:TREE_SECONDARY]]
        if len(leaves) > TREE_SECONDARY:
            lines.append(f"    ... {len(leaves) - TREE_SECONDARY:,} more")
    if len(order) > TREE_PRIMARY:
        lines.append(f"... {len(order) - TREE_PRIMARY:,} more primary categories")
    header = ["primary category", "labels", "instructions before", "after"]
    caption = "The label tree: primary and secondary categories, instructions before > after"
    return [Table("Primary categories of the labels", header, rows), Code(caption, "\n".join(lines), folded=True)]


def _ends(run: RunFolder) -> list[Block]:
    """How the model's replies ended that the labels were read from, where not all of them ended by themselves."""
    ends = run.notes("classify").get("label_ends", {})
    other = sum(ends.values()) - ends.get("stop", 0)
    if not other:
        return []
    cut = ends.get("length", 0)
    words = (
        f"Of {sum(ends.values()):,} labels {cut:,} were read from replies that were cut off at classify.max_new_tokens "
        f"and {other - cut:,} from ones that a server kept back in part."
    )
    return [Text(words)]


def _audit(run: RunFolder) -> list[Block]:
    notes = run.notes("diversify").get("audit")
    if notes is None:
        return [Text("No label audit: diversify.audit is not set.")]
    judged = notes["agreed"] + notes["denied"]
    words = (
        f"Label audit: the judge was asked about {notes['sampled']:,} records of {notes['labels']:,} labels and found "
        f"{percent(notes['agreed'], judged)} of the labels right ({notes['unreadable']:,} unreadable). "
        f"{_went(len(notes['failed']), notes['threshold'])} "
        "diversify/audit.csv has the sample, with a column for people."
    )
    failed = sorted(notes["failed"].items(), key=lambda item: (-item[1][0], item[0]))
    rows = [[label, whole(size), whole(yes), whole(no)] for label, (size, yes, no) in failed[:TOP]]
    header = ["label", "instructions", "found right", "found wrong"]
    caption = "Labels that failed the audit" + (f", the {TOP} largest" if len(failed) > TOP else "")
    return [Text(words), *([Table(caption, header, rows)] if rows else [])]


def _went(failed: int, threshold: float) -> str:
    if not failed:
        return f"No label went for it (diversify.audit_threshold is {threshold:g})."
    return f"{failed:,} label{'s' if failed > 1 else ''} of which it found less than {percent(threshold)} right went."


def _agreement(run: RunFolder) -> list[Block]:
    """How the model's primary categories go with the rules' categories: two looks at the same instructions."""
    pairs: Counter[tuple[str, str]] = Counter()
    for (category, label), count in run.count_together("classify", ("category", "label")).items():
        pairs[category, label.partition("-")[0]] += count
    if not pairs:
        return []
    by_category: dict[str, Counter[str]] = defaultdict(Counter)
    for (category, primary), count in pairs.items():
        by_category[category][primary] += count
    order = sorted(by_category, key=lambda name: (-by_category[name].total(), name))
    rows = []
    for name in order[:TOP]:
        counts = by_category[name]
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        shares = ", ".join(f"{primary} {percent(count, counts.total())}" for primary, count in ranked[:3])
        rows.append([name, shares, whole(counts.total()), percent(ranked[0][1], counts.total())])
    purity, information = agreement(pairs)
    words = (
        "Agreement of rule category and label: if each rule category stood for its most frequent primary category, "
        f"{percent(purity)} of the instructions would have the model's. Their normalised mutual information is "
        f"{decimal(information)}: 0 where one tells nothing of the other, 1 where each gives the other."
    )
    header = ["rule category", "primary categories of its labels", "instructions", "the first one's share"]
    title = f"Rule categories and labels, the {len(rows)} largest of {len(order):,} categories"
    return [Text(words), Table(title, header, rows, 2)]


def agreement(pairs: Counter[tuple[str, str]]) -> tuple[float, float]:
    """(purity, normalised mutual information) of counted pairs; the latter over the mean of the two entropies."""
    firsts, seconds = (sorted({pair[i] for pair in pairs}) for i in (0, 1))
    table = np.zeros((len(firsts), len(seconds)))
    for (first, second), count in pairs.items():
        table[firsts.index(first), seconds.index(second)] = count
    purity = float(table.max(axis=1).sum() / table.sum())
    rows, columns = entropy(table.sum(axis=1)), entropy(table.sum(axis=0))
    mean = (rows + columns) / 2
    return purity, float((rows + columns - entropy(table.ravel())) / mean) if mean else 1.0
