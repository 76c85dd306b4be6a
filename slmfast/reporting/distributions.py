"""How the ratings of replies spread by who wrote them, and who wins in which language."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slmfast.reporting import plots
from slmfast.reporting.document import LANGUAGES, Block, Plot, Table, percent, whole
from slmfast.reporting.run_folder import RunFolder
from slmfast.store import read_batches

BINS = 40
CLIPPED = 0.995  # of all perplexities are drawn: a few huge ones would flatten the rest
SAFETY = (1.0, 0.5, 0.0)


def spread_blocks(groups: Mapping[str, pa.Table]) -> list[Block]:
    """Perplexities and safety by origin; `groups` has one row a reply."""
    blocks: list[Block] = []
    bits = {origin: pc.drop_null(group["bits_per_token"]).to_numpy() for origin, group in groups.items()}
    every = np.concatenate([np.zeros(0), *bits.values()])
    if len(every):
        end = max(float(np.quantile(every, CLIPPED)), 1e-9)
        edges = np.linspace(min(0.0, float(every.min())), end, BINS + 1)
        lines = {o: _cumulated(values, edges) for o, values in bits.items() if len(values)}
        caption = (
            "How many replies have at most so many bits a token, the binary logarithm of the perplexity "
            f"({percent(1 - CLIPPED)} of them lie further right)"
        )
        blocks.append(Plot(caption, plots.curves(lines, "bits a token", "% of replies")))
    rows = []
    for origin, group in groups.items():
        counts = Counter(group["safety"].to_pylist())
        judged = sum(counts[grade] for grade in SAFETY)
        rows.append([origin, whole(judged), *(percent(counts[grade], judged) for grade in SAFETY)])
    header = ["replies", "judged", "1: safe", "0.5: safe, unsafe instruction", "0: unsafe"]
    return [*blocks, Table("Safety by origin of the reply", header, rows)]


def _cumulated(values: np.ndarray, edges: np.ndarray) -> tuple[list[float], list[float]]:
    """(the edges, the share of all values at or below each in per cent)."""
    below = np.searchsorted(np.sort(values), edges, side="right")
    return edges.tolist(), (100 * below / len(values)).tolist()


def win_blocks(run: RunFolder, origins: Sequence[str]) -> list[Block]:
    """Whose replies are best, and worst, in each language."""
    best, worst = wins(run)
    if not best:
        return []
    rows = []
    for code, words in LANGUAGES.items():
        totals = [sum(counts[code, origin] for origin in origins) for counts in (best, worst)]
        for origin in origins if any(totals) else ():
            cells = [(counts[code, origin], total) for counts, total in zip((best, worst), totals, strict=True)]
            rows.append([words, origin, *(text for count, of in cells for text in (whole(count), percent(count, of)))])
    header = ["language", "replies", "best, in the SFT set", "share", "worst, KTO negatives", "share"]
    bars = {
        name: [100 * sum(c[code, o] for code in LANGUAGES) / max(1, c.total()) for o in origins]
        for name, c in (("best, in the SFT set", best), ("worst, KTO negatives", worst))
    }
    return [
        Plot("Who wins and who loses", plots.bars(origins, bars, "% of the best, % of the worst")),
        Table("Who wins and who loses, by language", header, rows, 2),
    ]


def wins(run: RunFolder) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """How many SFT rows and KTO negatives come from each (language, origin)."""
    best: Counter[tuple[str, str]] = Counter()
    worst: Counter[tuple[str, str]] = Counter()
    columns = ["language", "replies", "best", "worst", "in_sft", "in_kto_negative"]
    folder = run.table("align", columns)
    if folder is not None:
        for batch in read_batches(folder, columns=columns):
            for row in batch.to_pylist():
                if row["in_sft"]:
                    best[row["language"], row["replies"][row["best"]]["origin"]] += 1
                if row["in_kto_negative"]:
                    worst[row["language"], row["replies"][row["worst"]]["origin"]] += 1
    return best, worst
