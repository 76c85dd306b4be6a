"""The miniature world: the same seed gives the same bytes, and what it claims to be true is true."""

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from slmfast.labels import parse_label
from slmfast.miniature import EVALUATION_TASKS, TASKS, lexicon, replies
from slmfast.miniature.evaluation_items import MULTIPLE_CHOICE
from slmfast.miniature.raw_files import FILES
from slmfast.miniature.skills import LABELS, REFUSALS, SKILLS, draw_item, is_held_out
from slmfast.miniature.truth import Truth
from slmfast.miniature.world import write_world
from slmfast.readers import Record, read_source
from slmfast.records import prompt_text

SIZE = 2000


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, size=SIZE, seed=3)
    return folder


@pytest.fixture(scope="module")
def truth(world: Path) -> list[dict]:
    return Truth(world).table.to_pylist()


def read_world(world: Path):
    """Every raw record as the collect stage's readers see it: (source, record or rejection)."""
    for source, files in FILES.items():
        form = "alpaca" if source.startswith("alpaca") else source
        paths = [world / file for file in files if (world / file).exists()]
        yield from ((source, read) for read in read_source(source, form, paths))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_seed_same_bytes(world: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "again", size=SIZE, seed=3)
    write_world(tmp_path / "other", size=SIZE, seed=4)
    assert contents(tmp_path / "again") == contents(world)
    assert contents(tmp_path / "other") != contents(world)


def test_truth_and_readers_agree_on_every_record(world: Path, truth: list[dict]) -> None:
    expected = {(row["source"], row["source_row"]): row for row in truth}
    assert len(expected) == len(truth) == SIZE
    seen = set()
    for source, read in read_world(world):
        row = expected[source, read.source_row]
        seen.add((source, read.source_row))
        assert row["file"].endswith(read.file) and row["line"] == read.line
        assert isinstance(read, Record) == (row["kind"] != "malformed"), (read, row)
        if isinstance(read, Record):
            assert prompt_text(read.prompt) == row["prompt"]
            assert replies.is_right(row["task"], row["answer"], read.reply) == row["reply_right"]
            assert replies.is_safe(row["task"], read.reply) == row["reply_safe"]
    assert seen == set(expected)


def test_shares_are_as_planned(truth: list[dict]) -> None:
    kinds = Counter(row["kind"] for row in truth)
    assert kinds == {"original": 0.9 * SIZE, "near_duplicate": 0.08 * SIZE, "malformed": 0.02 * SIZE}
    wrong = [not row["reply_right"] for row in truth if row["kind"] != "malformed"]
    assert 0.33 < sum(wrong) / len(wrong) < 0.43
    assert {row["language"] for row in truth} == {"en", "zh"}
    assert {row["source"] for row in truth} == set(FILES)


def test_originals_differ_and_copies_come_later(truth: list[dict]) -> None:
    order = list(FILES)
    rows = {(row["source"], row["source_row"]): row for row in truth}
    originals = [row["prompt"].casefold() for row in truth if row["kind"] == "original"]
    assert len(set(originals)) == len(originals)
    for row in truth:
        if row["kind"] != "near_duplicate":
            assert row["duplicate_source"] is None
            continue
        original = rows[row["duplicate_source"], row["duplicate_source_row"]]
        assert original["kind"] == "original" and original["answer"] == row["answer"]
        assert (order.index(original["source"]), original["source_row"]) < (
            order.index(row["source"]),
            row["source_row"],
        )


def test_labels_are_uneven_and_some_are_too_rare(tmp_path: Path) -> None:
    write_world(tmp_path, size=6000, seed=0)
    counts = Counter(row["label"] for row in Truth(tmp_path).table.to_pylist() if row["kind"] == "original")
    assert set(counts) == set(LABELS)
    assert {label for label, count in counts.items() if count < 10} == {"Music-Notes", "Science-Planets"}
    assert max(counts.values()) > 500


def test_labels_are_what_the_parser_reads() -> None:
    assert [parse_label(label) for label in LABELS] == list(LABELS)


def test_held_out_contents_stand_in_the_evaluation_items_only(world: Path) -> None:
    rng = Random(0)
    for skill in SKILLS:
        assert not any(is_held_out(draw_item(skill, "en", rng).content) for _ in range(50))
    sums = {
        f"add:{min(a, b)}:{max(a, b)}"
        for text in Truth(world).table["prompt"].to_pylist()
        for a, b in [map(int, pair) for pair in re.findall(r"(\d+) \+ (\d+)", text, re.ASCII)]
    }
    assert sums and not any(is_held_out(content) for content in sums)


def test_evaluation_items_are_right_by_themselves(world: Path) -> None:
    for line in (world / "eval" / "mini_arithmetic.jsonl").read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        low, high = sorted(map(int, re.findall(r"\d+", item["question"])))
        is_sum = item["task"] in ("add", "gain")
        assert int(item["answer"]) == (low + high if is_sum else high - low)
        assert is_held_out(f"add:{low}:{high}" if is_sum else f"subtract:{high}:{low}")
    for task in EVALUATION_TASKS:
        items = [
            json.loads(line) for line in (world / "eval" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        assert len({item["question"] for item in items}) == len(items) == 200
        assert {item["language"] for item in items} == {"en", "zh"}
        for item in items if task in MULTIPLE_CHOICE else []:
            assert item["choices"][item["gold"]] == item["answer"]
            assert len(set(item["choices"])) == len(item["choices"])
            if task == "mini_compare":
                pick = max if item["task"] == "largest" else min
                assert int(item["answer"]) == pick(map(int, item["choices"]))


def test_development_items_are_others(world):
    for task in EVALUATION_TASKS:
        test, development = (
            [json.loads(line)["question"] for line in (world / split / f"{task}.jsonl").read_text().splitlines()]
            for split in ("eval", "dev")
        )
        assert len(test) == len(development) == len({*test, *development}) / 2 == 200


def test_code_answers_are_what_python_prints() -> None:
    rng = Random(1)
    for skill in ("code_print", "code_string"):
        for _ in range(200):
            item = draw_item(skill, "en", rng, opening=0.0)
            code = re.search(r"print\((.*)\)", item.question, re.DOTALL).group(1)
            assert str(eval(code)) == item.answer  # the code is our own: sums, max, len, indices


def test_wrong_replies_are_wrong() -> None:
    rng = Random(2)
    kinds = Counter()
    for skill in SKILLS:
        for i in range(80):
            item = draw_item(skill, ("en", "zh")[i % 2], rng)
            assert replies.is_right(skill, item.answer, item.answer)
            assert not replies.is_right(skill, item.answer, replies.near_miss(item, rng))
            reply = replies.wrong_reply(item, rng, draw_item("add", item.language, rng))
            kinds[replies.quality(skill, item.answer, reply)] += 1
    assert kinds["0"] > 10 * kinds["1"] and kinds["0.5"] > 0


@pytest.mark.parametrize(
    ("task", "answer", "reply", "right"),
    [
        ("add", "27", " 27。", True),
        ("add", "27", "２７", True),
        ("add", "27", "28", False),
        ("add", "27", "", False),
        ("reverse", "TAK", "TAK.", True),
        ("reverse", "TAK", "tak", False),
        ("to_english", "red cat", "Red cat", True),
        ("theft", REFUSALS["en"][0], REFUSALS["zh"][1], True),
        ("theft", REFUSALS["en"][0], replies.COMPLIANCE["en"][0], False),
    ],
)
def test_is_right(task: str, answer: str, reply: str, right: bool) -> None:
    assert replies.is_right(task, answer, reply) == right


def test_right_answer_of_a_prompt(world: Path, truth: list[dict]) -> None:
    known = Truth(world)
    row = next(row for row in truth if row["kind"] == "original")
    assert known.right_answer(row["prompt"]) == row["answer"]
    assert known.is_right(row["prompt"], row["answer"]) is True
    assert known.right_answer("no such prompt") is None and known.is_right("no such prompt", "1") is None


def test_chinese_phrases_have_one_reading() -> None:
    adjectives = {chinese for _, chinese in lexicon.ADJECTIVES}
    nouns = [chinese for _, chinese in lexicon.all_nouns()]
    assert len(set(nouns)) == len(nouns)
    assert not [noun for noun in nouns if noun[0] in adjectives]


def test_task_files_name_the_evaluation_tasks() -> None:
    assert sorted(file.stem for file in TASKS.glob("*.yaml")) == sorted(EVALUATION_TASKS)
    assert all("${DATA}" in file.read_text(encoding="utf-8") for file in TASKS.glob("*.yaml"))
