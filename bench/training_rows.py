"""The rows that are trained on: real prompts and replies of real lengths, as the alignment stage writes them.

For KTO every prompt has a desirable reply, its own, and an undesirable one, the reply of another row that is nearest to
it in length; the order is the alignment stage's, which keeps the rows of a prompt apart. For SFT a prompt has its own.
"""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scoring_texts import LONGEST, Drawer

from slmfast.alignment import shuffled_apart
from slmfast.records import MESSAGE

ANY = (1, LONGEST)  # tokens of a prompt; with its reply it has at most LONGEST


@dataclass(frozen=True)
class Rows:
    """One training set: what both sides read."""

    source: str
    table: pa.Table
    """`prompt` and `completion`, lists of messages; for KTO `label`."""
    lengths: list[tuple[int, int]]
    """Tokens of every row's prompt and of its reply."""

    def described(self) -> str:
        """How long they are: means, in tokens."""
        prompt, reply = (sum(of) / len(self.lengths) for of in zip(*self.lengths, strict=True))
        return f"{self.source}, prompts of {prompt:.0f} tokens and replies of {reply:.0f}"

    def first(self, count: int) -> "Rows":
        """So many of them."""
        return Rows(self.source, self.table.slice(0, count), self.lengths[:count])

    def write(self, path: Path) -> None:
        """As Parquet in TRL's format."""
        pq.write_table(self.table, path)


def draw_rows(drawer: Drawer, method: str, count: int, seed: int) -> Rows:
    """So many rows.

    Raises:
        UserError: there are not so many.
    """
    replies = 2 if method == "kto" else 1
    texts = drawer.draw(-(-count // replies), replies, ANY)
    numbers = [(prompt, reply) for prompt in range(len(texts.prompts)) for reply in range(replies)]
    hashes = np.array([Random(f"{seed} {number}").getrandbits(63) for number in numbers])
    order = [numbers[i] for i in shuffled_apart([prompt for prompt, _ in numbers], hashes)][:count]
    columns: dict[str, Any] = {
        "prompt": pa.array([_said("user", texts.prompts[p]) for p, _ in order], pa.list_(MESSAGE)),
        "completion": pa.array([_said("assistant", texts.replies[p][r].strip()) for p, r in order], pa.list_(MESSAGE)),
    }
    if method == "kto":
        columns["label"] = pa.array([r == 0 for _, r in order], pa.bool_())
    lengths = [(len(texts.pairs[p][r].context), len(texts.pairs[p][r].continuation)) for p, r in order]
    return Rows(texts.source, pa.table(columns), lengths)


def _said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]
