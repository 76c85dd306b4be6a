"""How the rules' categories agree with people's, for the sources whose records carry a category that people gave."""

from collections import Counter, defaultdict

from slmfast.human_categories import dataset_of, human_classes, plain_class
from slmfast.reporting.document import NOTHING, Block, Section, Table, Text, percent, whole
from slmfast.reporting.run_folder import RunFolder

COLUMNS = ("source", "source_category", "category")
NO_CLASS = "none"  # of a category that stands for no class, such as "other"
Confusion = Counter[tuple[str, str]]  # by (people's class, the class that our category stands for)


def categories_section(run: RunFolder) -> Section | None:
    """A confusion table for each source whose classes are all BELLE's or all Dolly's; None where there is none."""
    by_source: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for (source, human, ours), count in run.count_together("categorize", COLUMNS).items():
        if human is not None:
            by_source[source][plain_class(human), ours] += count
    tables: list[Block] = []
    for source, pairs in sorted(by_source.items()):
        dataset = dataset_of(human for human, _ in pairs)
        if dataset is not None:
            tables.append(_table(source, dataset, confusion(dataset, pairs)))
    if not tables:
        return None
    words = (
        "Rows are the classes that people gave, columns those that the rules' categories stand for by "
        "slmfast/data/human_categories.yaml; the diagonal agrees. Records without a category from people don't count. "
        "The rules were written with half of BELLE's evaluation set and of a sample of Dolly at hand."
    )
    return Section("Rule categories beside people's", [Text(words), *tables])


def confusion(dataset: str, pairs: Counter[tuple[str, str]]) -> Confusion:
    """Counted pairs of a class that people gave and a category of ours, the category as the class it stands for."""
    classes, found = human_classes(dataset), Confusion()
    for (human, ours), count in pairs.items():
        found[human, classes.get(ours, NO_CLASS)] += count
    return found


def _table(source: str, dataset: str, found: Confusion) -> Table:
    names = [name for name in dict.fromkeys(human_classes(dataset).values()) if any(name in pair for pair in found)]
    columns = [*names, *([NO_CLASS] if any(ours == NO_CLASS for _, ours in found) else [])]
    rows = []
    for human in names:
        total = sum(found[human, ours] for ours in columns)
        if total:
            cells = [whole(found[human, ours]) if found[human, ours] else NOTHING for ours in columns]
            rows.append([human, whole(total), percent(found[human, human], total), *cells])
    agreed = sum(count for (human, ours), count in found.items() if human == ours)
    caption = f"{source}: {agreed:,} of {found.total():,} records agree, {percent(agreed, found.total())}"
    return Table(caption, ["people's class", "records", "agree", *columns], rows)
