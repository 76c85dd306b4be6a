"""Which records hold items of the benchmarks that the models will be scored on.

Two tests, both on tokens (see token_grams): a whole message that equals an item, and a run of 13 tokens that stands in
an item and in a message. An item is its question, with its choices A, B, C, D where it has some; equality also counts
for the question alone, and is the only test for an item of fewer than 13 tokens. A run that more than 10 items of one
benchmark share is the benchmark's own phrasing and no item's.

Source: 13-gram overlap and the limit of ten are those of GPT-3 (Brown et al. 2020, appendix C).
"""

import csv
import io
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from slmfast.errors import UserError
from slmfast.readers.containers import read_file
from slmfast.readers.json_stream import Broken, Malformed
from slmfast.token_grams import Tokens, chunks, gram_hashes, hash_tokens, text_hashes, tokens

BENCHMARKS = ("mmlu", "cmmlu", "ceval", "humaneval", "gsm8k")  # what the method is scored on
GRAM = 13  # tokens
MOST_ITEMS = 10  # of one benchmark that may share a gram
EXACT, OVERLAP = "the whole item", f"{GRAM} tokens in a row"

CONTAMINATION_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # of the record
        pa.field("part", pa.string(), nullable=False),  # prompt, best reply or worst reply
        pa.field("benchmark", pa.string(), nullable=False),
        pa.field("item", pa.string(), nullable=False),  # file and line
        pa.field("how", pa.string(), nullable=False),
        pa.field("share", pa.float64(), nullable=False),  # of the item's grams
        pa.field("passage", pa.string(), nullable=False),
        pa.field("in_sets", pa.bool_(), nullable=False),  # whether the record gives a row to the final sets
    ]
)
_QUESTIONS = ("question", "prompt")  # columns, in lower case
_CHOICES = (("a", "b", "c", "d"), ("choice0", "choice1", "choice2", "choice3"))
_FILTER_BITS = 26  # of a hash that the first look goes by: a table of 64 MiB


class Item(NamedTuple):
    """One question of a benchmark."""

    benchmark: str
    place: str  # file and line
    question: str
    whole: str  # with its choices


class Hit(NamedTuple):
    """One text that holds one benchmark's item; of several the item with the most shared grams, the first of equals."""

    text: int
    item: Item
    how: str  # EXACT or OVERLAP
    share: float  # of the item's own grams that stand in the text; 1 where EXACT
    passage: str  # the first shared run, its tokens joined by spaces


def read_items(benchmarks: Mapping[str, Sequence[Path]]) -> list[Item]:
    """All items of the benchmarks' files: CSV, JSON, JSON lines or Parquet, plain or packed, as collect reads them.

    Raises UserError for a file in which no question can be found.
    """
    items = []
    for name, paths in benchmarks.items():
        for path in paths:
            try:
                found = [_item(name, f"{path.name}:{line}", value) for line, value in _values(path)]
            except (Broken, OSError, UnicodeDecodeError, csv.Error) as error:
                raise UserError(f"recipe key align.benchmarks.{name}: {path} can't be read: {error}") from error
            if not found:
                raise UserError(f"recipe key align.benchmarks.{name}: {path} holds no item: correct the path")
            if None in found:
                line = found.index(None) + 1
                columns = "question (or prompt), and A, B, C, D or choice0 to choice3 or choices"
                raise UserError(
                    f"recipe key align.benchmarks.{name}: item {line} of {path} lacks the columns {columns}"
                )
            items += found
    return items


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    """The (line, value) pairs of a file; MMLU's own CSV files have no header."""
    if path.suffix == ".csv":
        yield from _csv_values(path)
        return
    for raw in read_file(path):
        yield raw.line, None if isinstance(raw.value, Malformed) else raw.value


def _csv_values(path: Path) -> Iterator[tuple[int, Any]]:
    rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
    header: list[str] | None = None
    line = 1
    for cells in rows:
        if header is None and any(cell.strip().lower() in _QUESTIONS for cell in cells):
            header = [cell.strip() for cell in cells]
        elif cells:
            header = header or ["question", "A", "B", "C", "D", "answer"]
            yield line, dict(zip(header, cells, strict=False))
        line = rows.line_num + 1


def _item(benchmark: str, place: str, value: Any) -> Item | None:
    if not isinstance(value, dict):
        return None
    fields = {str(key).lower(): field for key, field in value.items()}
    question = next((fields[key] for key in _QUESTIONS if isinstance(fields.get(key), str)), None)
    if question is None:
        return None
    choices = fields.get("choices")
    if not isinstance(choices, list):
        choices = next(([fields[key] for key in keys] for keys in _CHOICES if all(k in fields for k in keys)), [])
    lettered = [f"{letter}. {choice}" for letter, choice in zip("ABCDEFGHIJ", choices, strict=False)]
    return Item(benchmark, place, question, "\n".join([question, *lettered]))


class Finding(NamedTuple):
    """A hit in one part of a record."""

    record: int
    part: str
    hit: Hit

    @property
    def reason(self) -> str:
        """Why the record goes, where it does."""
        item = self.hit.item
        file, _, line = item.place.rpartition(":")
        return f"its {self.part} holds {self.hit.how} of benchmark {item.benchmark}, item {file} line {line}"


class Index:
    """The items of all benchmarks, ready for `find`."""

    def __init__(self, items: Sequence[Item]):
        self.items = items
        self._exact: dict[int, dict[str, int]] = {}  # by a text's hash the first such item of each benchmark
        grams, owners = [], []
        start = 0
        for chunk in chunks(item.whole for item in items):
            found = hash_tokens(chunk)
            hashes, places = gram_hashes(found, GRAM)
            grams.append(hashes)
            owners.append(found.texts[places] + start)
            self._add_exact(found, start)
            start += len(chunk)
        for start, chunk in _numbered(chunks(item.question for item in items)):
            self._add_exact(hash_tokens(chunk), start)
        none = np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)  # and not [], which would make floats of all
        self._index_grams(np.concatenate([none[0], *grams]), np.concatenate([none[1], *owners]))

    def _add_exact(self, found: Tokens, start: int) -> None:
        empty = np.diff(found.starts) == 0
        for i, value in enumerate(text_hashes(found).tolist()):
            if not empty[i]:
                self._exact.setdefault(value, {}).setdefault(self.items[start + i].benchmark, start + i)

    def _index_grams(self, hashes: np.ndarray, owners: np.ndarray) -> None:
        """Sorts the (gram, item) pairs, each once, without the grams that too many items of one benchmark share."""
        names = {name: code for code, name in enumerate(dict.fromkeys(item.benchmark for item in self.items))}
        codes = np.array([names[item.benchmark] for item in self.items], dtype=np.int64)
        order = np.lexsort((owners, hashes))
        hashes, owners = hashes[order], owners[order]
        new = _differs(hashes) | _differs(owners)
        hashes, owners = hashes[new], owners[new]
        of = codes[owners]
        order = np.lexsort((of, hashes))  # by gram and benchmark: stable, so the items stay in order
        hashes, owners, of = hashes[order], owners[order], of[order]
        group = np.cumsum(_differs(hashes) | _differs(of)) - 1
        rare = np.bincount(group, minlength=1)[group] <= MOST_ITEMS if len(group) else np.zeros(0, dtype=bool)
        self._hashes, self._owners = hashes[rare], owners[rare]
        self._grams_of = np.bincount(self._owners, minlength=len(self.items))
        self._filter = np.zeros(1 << _FILTER_BITS, dtype=bool)
        self._filter[self._hashes >> np.uint64(64 - _FILTER_BITS)] = True

    def search(self, records: Iterable[tuple[int, str, str]]) -> list[Finding]:
        """The hits in a stream of (record number, part, text), in its order."""
        numbers, parts, names = array("q"), array("b"), []

        def texts() -> Iterator[str]:
            for number, part, text in records:
                if part not in names:
                    names.append(part)
                numbers.append(number)
                parts.append(names.index(part))
                yield text

        return [Finding(numbers[hit.text], names[parts[hit.text]], hit) for hit in self.find(texts())]

    def find(self, texts: Iterable[str]) -> Iterator[Hit]:
        """The hits of a stream of texts, at most one for each text and benchmark, in the order of the texts."""
        for start, chunk in _numbered(chunks(texts)):
            found = hash_tokens(chunk)
            for hit in sorted(self._find(found, chunk), key=lambda hit: (hit.text, hit.item.benchmark)):
                yield hit._replace(text=start + hit.text)

    def _find(self, found: Tokens, texts: Sequence[str]) -> list[Hit]:
        hits: dict[tuple[int, str], Hit] = {}
        for text, shared in self._shared(found).items():
            words = tokens(texts[text])
            for item, places in self._best(shared):
                passage = words[places[0] : places[0] + GRAM]
                if _stands_in(passage, tokens(self.items[item].whole)):
                    share = len(places) / int(self._grams_of[item])
                    hit = Hit(text, self.items[item], OVERLAP, share, " ".join(passage))
                    hits[text, hit.item.benchmark] = hit
        for text, value in enumerate(text_hashes(found).tolist()):
            same = self._exact.get(value)
            if same is None or found.starts[text] == found.starts[text + 1]:
                continue
            words = tokens(texts[text])
            for item in (self.items[number] for number in same.values()):
                if words in (tokens(item.question), tokens(item.whole)):
                    hits[text, item.benchmark] = Hit(text, item, EXACT, 1.0, " ".join(words))
        return list(hits.values())

    def _shared(self, found: Tokens) -> dict[int, dict[int, list[int]]]:
        """For each text with shared grams: by item, the places in the text where each distinct gram first stands."""
        hashes, places = gram_hashes(found, GRAM)
        maybe = np.flatnonzero(self._filter[hashes >> np.uint64(64 - _FILTER_BITS)])
        left = np.searchsorted(self._hashes, hashes[maybe], side="left")
        right = np.searchsorted(self._hashes, hashes[maybe], side="right")
        shared: dict[int, dict[int, list[int]]] = {}
        seen: set[tuple[int, int]] = set()
        for k in np.flatnonzero(right > left):
            place = int(places[maybe[k]])
            text = int(found.texts[place])
            if (text, int(left[k])) in seen:
                continue
            seen.add((text, int(left[k])))
            for item in self._owners[left[k] : right[k]].tolist():
                shared.setdefault(text, {}).setdefault(item, []).append(place - int(found.starts[text]))
        return shared

    def _best(self, shared: dict[int, list[int]]) -> list[tuple[int, list[int]]]:
        """Of each benchmark the item with the most shared grams."""
        best: dict[str, int] = {}
        for item in sorted(shared, key=lambda item: (-len(shared[item]), item)):
            best.setdefault(self.items[item].benchmark, item)
        return [(item, shared[item]) for item in best.values()]


def finding_rows(found: Sequence[Finding], ids: Sequence[str], kept: np.ndarray) -> list[dict[str, Any]]:
    """Findings as rows of CONTAMINATION_SCHEMA; `ids` and `kept` (bool) are those of all records."""
    return [
        {"id": ids[record], "part": part, "benchmark": hit.item.benchmark, "item": hit.item.place, "how": hit.how}
        | {"share": hit.share, "passage": hit.passage, "in_sets": bool(kept[record])}
        for record, part, hit in found
    ]


def summary(items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """By benchmark: its items, the records that hold one, those that hold a whole one, and those in the final sets."""
    counts = {}
    for name, size in Counter(item.benchmark for item in items).items():
        own = [row for row in rows if row["benchmark"] == name]
        sets = {
            "records": {row["id"] for row in own},
            "exact": {row["id"] for row in own if row["how"] == EXACT},
            "in_sets": {row["id"] for row in own if row["in_sets"]},
        }
        counts[name] = {"items": size} | {key: len(ids) for key, ids in sets.items()}
    return counts


def _differs(values: np.ndarray) -> np.ndarray:
    """Whether each value is the first or another one than that before it, bool [n]."""
    new = np.ones(len(values), dtype=bool)
    new[1:] = values[1:] != values[:-1]
    return new


def _numbered(runs: Iterable[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Each run of texts with the number of its first text."""
    start = 0
    for run in runs:
        yield start, run
        start += len(run)


def _stands_in(passage: Sequence[str], words: Sequence[str]) -> bool:
    size = len(passage)
    return any(words[i : i + size] == passage for i in range(len(words) - size + 1))
