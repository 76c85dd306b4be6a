"""The data stages on millions of synthetic records: collect, categorize, dedup and diversify, as a run does them.

    python bench/data_stages.py --records 5000000 --folder /some/disk [--threads 2]

Raw files of 300 to 800 bytes a record, Chinese and English, in three formats (BELLE's dialogues, Alpaca and Dolly, as
JSON lines) are written under the folder first, about one record in ten a slight change of an earlier one, a few broken.
Then the four stages run through slmfast.pipeline on the first `--threads` cores, hashes of inputs and outputs and
manifests included. Labels are given: what classify would have written, with one label of 5,000 for each record, is made
by this script between dedup and diversify, outside the clock, for no model of ours is measured here.

Printed are records a second of each stage, of all four together (raw records over the sum of the four), the peak of the
resident memory (pages of mapped files included) of this process and its children, and the largest size of the folder.
The last line is one JSON object; its `theirs` is the aim, 5M records in 4 minutes within 4 GiB. What was written goes
at the end, unless with --keep.
"""

import argparse
import itertools
import json
import math
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from result_table import Result, document, table

from slmfast import pipeline
from slmfast.engines.base import GENERATION_FIELDS
from slmfast.job import rebatch
from slmfast.recipe import Recipe, load_recipe
from slmfast.stages import classify
from slmfast.store import MANIFEST, digest, output_digests, shard_path, table_schema, write_json, write_table

AIM_RATE, AIM_GIB = 5_000_000 / 240, 4.0
NEAR, BROKEN = 0.1, 0.0005  # shares of near-duplicates and of malformed lines
LABELS = 5000
RECORDS_PER_FILE = 500_000
SOURCES = {"alpaca": "alpaca", "dolly": "dolly", "belle": "belle"}  # name: format, in order of priority
SHARES = (0.15, 0.15, 0.70)

ZH = (
    "请写一篇关于{}和{}的短文，不少于{}字。",
    "解释一下{}是什么，以及它与{}有什么区别。第{}题",
    "将下面的句子翻译成英文：{}的{}一共有{}个。",
    "给出{}条关于{}的建议，并说明{}的作用。",
    "{}有{}个苹果，吃了3个，又买了{}个，一共有多少个？",
    "根据以下文章回答问题：{}的{}在第{}段中是什么意思？",
    "如何在{}天内学会{}？请给{}一个计划。",
    "编写一个Python函数，计算{}和{}的平均值，输入{}个数。",
    "分析{}对{}的影响，列出{}个原因。",
    "{}的首都在哪里？它和{}相距{}公里吗？",
)
EN = (
    "Write a short story about {} and {} in about {} words.",
    "Explain the difference between {} and {} to a child of {} years.",
    "Give {} ideas for a party with {} and {}.",
    "What is the capital of {} and how far is it from {}? Answer in {} sentences.",
    "Summarize the following passage on {} and {} in {} words.",
    "Write a Python function that takes {} and returns {} after {} steps.",
    "How do I get from {} to {} within {} hours?",
    "Classify each of these as {} or {}: item {}.",
    "If {} costs 3 dollars and {} costs twice as much, how much do {} of them cost?",
    "Describe the history of {} and its relation to {} since {}.",
)
FUNCTION_WORDS = (
    "the of and to in a is that it was for on are with as they be at this from have or by one had not".split()
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder; 5M records take up to 15 GB in it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="leave the files where they are")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True)
    try:
        results = measured(folder, arguments.records, arguments.threads, arguments.seed)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)
    print(table(results))
    print(document("data_stages", arguments.threads, results))


def measured(folder: Path, records: int, threads: int, seed: int) -> list[Result]:
    """Writes the raw files, runs the stages and gives the rows of the table."""
    start = time.monotonic()
    size = write_raw(folder / "raw", records, seed)
    print(f"{records:,} raw records, {size / records:.0f} bytes each, in {time.monotonic() - start:.0f} s", flush=True)
    recipe = load_recipe(None, settings(folder, records, threads, seed))
    results, seconds = [], 0.0
    with Peak(folder) as peak:
        for name in ("collect", "categorize", "dedup", "diversify"):
            if name == "diversify":
                give_labels(folder / "dedup" / "records", folder / "classify")
            spent, rows = timed_stage(name, recipe, folder)
            seconds += spent
            results.append(Result(group="data", case=f"{name}, {rows:,} rows", ours=rows / spent, unit="rows/s"))
    rate, gib = records / seconds, peak.memory / 2**30
    aim = {"group": "data", "peer": "the aim"}
    results += [
        Result(**aim, case=f"all, {records:,} in {seconds:.1f} s", ours=rate, theirs=AIM_RATE, unit="records/s",
               ratio=rate / AIM_RATE),
        Result(**aim, case="peak memory", ours=gib, theirs=AIM_GIB, unit="GiB", ratio=gib / AIM_GIB,
               ratio_says="as much"),
        Result(group="data", case="largest folder", ours=peak.disk / 1e9, unit="GB"),
    ]  # fmt: skip
    return results


def settings(folder: Path, records: int, threads: int, seed: int) -> list[str]:
    """The recipe's settings: a tenth of the records is kept, as the paper keeps 500k of 5M."""
    sources = [{"name": n, "format": f, "path": f"{folder}/raw/{n}-*.jsonl"} for n, f in SOURCES.items()]
    return [
        f"collect.sources={json.dumps(sources)}",
        f"threads={threads}",
        f"seed={seed}",
        f"diversify.target={records // 10}",
    ]


def timed_stage(name: str, recipe: Recipe, folder: Path) -> tuple[float, int]:
    """Runs a stage as slmfast.pipeline does and gives its seconds, all included, and the rows that it was given."""
    job = pipeline.make_job(name, recipe, folder)
    start = time.monotonic()
    pipeline.run_stage(job)
    seconds = time.monotonic() - start
    counts = json.loads((job.folder / MANIFEST).read_text())["counts"]
    return seconds, counts["rows_in"]


# --- raw files


def write_raw(folder: Path, records: int, seed: int) -> int:
    """Writes the raw files and gives their bytes."""
    folder.mkdir()
    rng = random.Random(seed)
    speech = {"zh": Speech("zh", rng), "en": Speech("en", rng)}
    counts = [round(records * share) for share in SHARES[:-1]]
    for name, count in zip(SOURCES, [*counts, records - sum(counts)], strict=True):
        lines = raw_lines(name, count, speech, rng)
        for number in range(math.ceil(count / RECORDS_PER_FILE)):
            with (folder / f"{name}-{number:02d}.jsonl").open("w", encoding="utf-8") as file:
                for line in itertools.islice(lines, RECORDS_PER_FILE):
                    file.write(line + "\n")
    return sum(path.stat().st_size for path in folder.iterdir())


class Speech:
    """Texts of one language, from words that are drawn once."""

    def __init__(self, language: str, rng: random.Random) -> None:
        self.language, self.rng = language, rng
        self.zh = language == "zh"
        self.words = [self._word() for _ in range(20_000)]
        self.sentences = [self._sentence() for _ in range(20_000)]

    def _word(self) -> str:
        if self.zh:
            return "".join(chr(self.rng.randint(0x4E00, 0x6E00)) for _ in range(self.rng.choice([1, 2, 2, 2, 3])))
        return "".join(
            self.rng.choice("bcdfghklmnprstvw") + self.rng.choice("aeiou") for _ in range(self.rng.randint(1, 4))
        )

    def _sentence(self) -> str:
        if self.zh:
            return "的".join(self.rng.choices(self.words, k=self.rng.randint(5, 12))) + "。"
        words = (
            self.rng.choice(FUNCTION_WORDS if self.rng.random() < 0.4 else self.words)
            for _ in range(self.rng.randint(8, 18))
        )
        return " ".join(words).capitalize() + ". "

    def instruction(self) -> str:
        """A task, and for one record in four a passage that it is about."""
        first, second = self.rng.choices(self.words, k=2)
        text = self.rng.choice(ZH if self.zh else EN).format(first, second, self.rng.randint(2, 9999))
        return text + "\n" + self.text(3) if self.rng.random() < 0.25 else text

    def text(self, sentences: int) -> str:
        """Some sentences that were drawn before, in a new order."""
        return "".join(self.rng.choices(self.sentences, k=sentences)).strip()


def raw_lines(name: str, records: int, speech: dict[str, Speech], rng: random.Random) -> Iterator[str]:
    """The lines of a source."""
    earlier: list[tuple[str, str]] = []
    for _ in range(records):
        chance = rng.random()
        if chance < BROKEN:
            yield '{"instruction": "cut off'
            continue
        if chance < BROKEN + NEAR and earlier:
            language, instruction = rng.choice(earlier)
            instruction += "。" if language == "zh" else " Please."
        else:
            language = "zh" if rng.random() < 0.8 else "en"
            instruction = speech[language].instruction()
            earlier = [*earlier[-999:], (language, instruction)] if rng.random() < 0.05 else earlier
        yield json.dumps(_raw(name, instruction, speech[language], rng), ensure_ascii=False)


def _raw(name: str, instruction: str, speech: Speech, rng: random.Random) -> dict[str, Any]:
    reply = speech.text(rng.randint(2, 6) if speech.zh else rng.randint(2, 7))
    if name == "belle":
        turns = [instruction, reply]
        if rng.random() < 0.1:
            turns += [speech.instruction(), speech.text(2)]
        names = ("human", "assistant")
        return {
            "id": f"{rng.getrandbits(48):x}",
            "conversations": [{"from": names[i % 2], "value": t} for i, t in enumerate(turns)],
        }
    task, _, passage = instruction.partition("\n")
    if name == "dolly":
        return {
            "instruction": task,
            "context": passage,
            "response": reply,
            "category": rng.choice(["open_qa", "brainstorming"]),
        }
    return {"instruction": task, "input": passage, "output": reply}


# --- what classify would have written


def give_labels(source: Path, folder: Path) -> None:
    """Writes a finished classify stage: in units of its size, labels like 1 / rank, by the records' ids."""
    how = pa.scalar(dict.fromkeys(pa.struct(GENERATION_FIELDS).names), pa.struct(GENERATION_FIELDS))
    edges = np.cumsum(1 / np.arange(1, LABELS + 1))
    names = pa.array([f"Area {i // 50}-Kind {i}" for i in range(LABELS)])
    rows = 0
    for number, unit in enumerate(rebatch(source, load_recipe(None, []).classify.unit_rows)):
        ids = np.array([int(i[:8], 16) for i in unit.column("id").to_pylist()]) / 2**32
        labels = names.take(pa.array(np.searchsorted(edges, ids * edges[-1])))
        given = [labels, labels, pa.repeat(how, len(labels))]
        schema = pa.schema([*table_schema(source), *classify.COLUMNS])
        write_table(shard_path(folder / "records", number), pa.table([*unit.columns, *given], schema=schema))
        rows += unit.num_rows
    outputs = output_digests(folder)
    counts = {"rows_in": rows, "out": rows, "dropped": 0, "rejected": 0}
    given = {"stage": "classify", "key": "given", "counts": counts, "outputs": outputs, "digest": digest(outputs)}
    write_json(folder / MANIFEST, given)


# --- peaks


class Peak:
    """While open, the largest resident memory of this process and its children, and the largest size of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.memory, self.disk = folder, 0, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        beat = 0
        while not self._over.wait(0.1):
            self.memory = max(self.memory, sum(map(_resident, _family(os.getpid()))))
            if beat % 50 == 0:
                self.disk = max(self.disk, _vanishing(lambda: sum(
                    path.stat().st_blocks * 512 for path in self.folder.rglob("*") if path.is_file()
                )))  # fmt: skip
            beat += 1


def _family(process: int) -> list[int]:
    found = [process]
    for thread in Path(f"/proc/{process}/task").glob("*/children"):
        text = _vanishing(thread.read_text)
        for child in (text or "").split():
            found += _family(int(child))
    return found


def _resident(process: int) -> int:
    text = _vanishing(Path(f"/proc/{process}/statm").read_text)
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE") if text else 0


def _vanishing(read: Callable[[], Any]) -> Any:
    """What a read gives, or 0 where the file or process has just gone."""
    try:
        return read()
    except (FileNotFoundError, ProcessLookupError):
        return 0


if __name__ == "__main__":
    sys.exit(main())
