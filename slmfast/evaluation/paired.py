"""How far two models lie apart, by the items that both have answered.

Two scores of the same items vary together, so a difference is taken item by item and its error found by drawing items
anew (the paired bootstrap: Efron and Tibshirani 1993; Koehn 2004, "Statistical significance tests for machine
translation evaluation").
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slmfast.errors import UserError

SAMPLES = 10_000  # of the bootstrap
INTERVAL = 0.95


class Paired(NamedTuple):
    """The mean of A's items less that of B's."""

    difference: float
    stderr: float  # the standard deviation over the bootstrap's samples
    low: float  # the interval that holds 95 % of these
    high: float
    n: int  # items


def paired_difference(items_a: pa.Table, items_b: pa.Table, seed: int = 0, *, samples: int = SAMPLES) -> Paired:
    """The difference of two models' scores on one task with its standard error and 95 % interval.

    Args:
        items_a, items_b: one row an item, with the columns `item` and `value` and, where a task has several, `subset`;
            in any order.
        seed: of the bootstrap.
        samples: how many times as many items are drawn anew.

    Raises:
        UserError: the tables hold no items, or not the same ones.
    """
    a, b = _values(items_a), _values(items_b)
    if a.keys() != b.keys():
        differ = sorted(map(str, a.keys() ^ b.keys()))[0]
        raise UserError(f"two models have not answered the same items: only one has {differ}; evaluate both anew")
    if not a:
        raise UserError("there are no items to compare: evaluate the models first")
    steps = np.array([a[key] - b[key] for key in sorted(a)])
    # Drawing n of n items with repetition gives each distinct step a multinomial count.
    distinct, counts = np.unique(steps, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(steps), counts / len(steps), size=samples)
    means = drawn @ distinct / len(steps)
    low, high = np.quantile(means, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2])
    return Paired(float(steps.mean()), float(means.std(ddof=1)), float(low), float(high), len(steps))


def paired_differences(items: Mapping[str, pa.Table], seed: int = 0) -> list[dict[str, object]]:
    """Every later model less every earlier one on each task: model, less, task, and the fields of `Paired`.

    Args:
        items: of each model one row an item, with a column `task` beside those of `paired_difference`.
    """
    names = list(items)
    rows = []
    for task in dict.fromkeys(task for table in items.values() for task in table["task"].to_pylist()):
        own = {name: table.filter(pc.equal(table["task"], task)) for name, table in items.items()}
        for later in range(len(names)):
            for earlier in range(later):
                found = paired_difference(own[names[later]], own[names[earlier]], seed)
                rows.append({"model": names[later], "less": names[earlier], "task": task, **found._asdict()})
    return rows


def format_differences(rows: list[dict[str, object]]) -> str:
    """The differences in points of a hundred, a row each, with their standard errors and 95 % intervals."""
    lines = [f"{'difference':<24}{'task':<16}{'points':>8}{'±':>6}{'95 % interval':>18}"]
    for row in rows:
        points, error, low, high = (100 * float(row[name]) for name in ("difference", "stderr", "low", "high"))
        pair = f"{row['model']} - {row['less']}"
        lines.append(f"{pair:<24}{row['task']:<16}{points:>+8.1f}{error:>6.1f}{f'{low:+.1f} to {high:+.1f}':>18}")
    return "\n".join(lines)


def _values(items: pa.Table) -> dict[tuple[str, int], float]:
    columns = {name: items[name].to_pylist() for name in ("item", "value")}
    subsets = items["subset"].to_pylist() if "subset" in items.column_names else [""] * len(items)
    return {(s or "", i): v for s, i, v in zip(subsets, columns["item"], columns["value"], strict=True)}
