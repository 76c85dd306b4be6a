"""The rules, their file, and how far they agree with people."""

import json
import os
import re
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest
import yaml

from slmfast.categories import HEAD_CHARACTERS, TAIL_CHARACTERS, Categorizer
from slmfast.errors import UserError
from slmfast.human_categories import human_classes, plain_class
from slmfast.readers import Record, read_source

DATA = os.environ.get("SLMFAST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="SLMFAST_DATA is not set: no real files")


@pytest.fixture(scope="module")
def categorizer() -> Categorizer:
    return Categorizer()


def built_in() -> dict:
    return yaml.safe_load((resources.files("slmfast") / "data" / "categories.yaml").read_text(encoding="utf-8"))


def test_there_are_fifty_and_each_can_be_reached(categorizer: Categorizer) -> None:
    raw = built_in()
    assert len(set(categorizer.categories)) == len(categorizer.categories) == 50
    reached = {rule["category"] for rule in raw["rules"]} | {raw["catch_all"]}
    assert reached == set(categorizer.categories)


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("小明有5个苹果，吃了2个，还剩多少个？", "math word problem"),
        ("Tom has 5 apples and eats 2. How many are left?", "math word problem"),
        ("3 + 4 = ?", "arithmetic"),
        ("What is 12 plus 30?", "arithmetic"),
        ("解方程：2x + 3 = 7", "algebra"),
        ("Find the area of a circle with radius 3 cm.", "geometry"),
        ("Write a Python function that reverses a string.", "code generation"),
        ("用Java写一个冒泡排序程序", "code generation"),
        ("Debug this code: for i in rang(3): pass", "code debugging"),
        ("Explain what the following code does: x += 1", "code explanation"),
        ("写一个SQL查询语句，找出所有女学生", "database query"),
        ("把下面的句子翻译成英文：我爱你", "translation into English"),
        ("Translate into English: 我今天去学校", "translation into English"),
        ("将以下文本翻译成中文：Good morning", "translation into Chinese"),
        ("Translate the sentence into Chinese: Good morning", "translation into Chinese"),
        ("Translate to French: good morning", "other translation"),
        ("请概括下面这篇文章的主要内容：……", "summarization"),
        ("Summarize the following article.", "summarization"),
        ("判断这条评论的情感是正面还是负面：很好吃", "sentiment classification"),
        ("Classify these animals as mammals or birds: dog, eagle", "text classification"),
        ("从以下文本中提取人名：张三和李四去了北京。", "information extraction"),
        ("Correct the grammar of this sentence: He go home.", "grammar correction"),
        ("Rewrite the sentence in the passive voice: He ate it.", "sentence transformation"),
        ("Paraphrase this: time flies.", "rewriting"),
        ("What is a synonym of happy?", "words and meanings"),
        ("写一首关于春天的诗", "poem and lyrics"),
        ("Write a short story about a dragon.", "story writing"),
        ("给老板写一封请假邮件", "email and letter"),
        ("Write a dialogue between two friends.", "dialogue and script"),
        ("假设你是一名医生，病人说头痛，你怎么回答", "role play"),
        ("True or false: the sun is a star.", "true or false"),
        ("推荐三部科幻电影", "recommendation"),
        ("What is the difference between a crow and a raven?", "comparison"),
        ("How do I boil an egg?", "how-to"),
        ("Give me five ideas for a birthday party.", "brainstorming"),
        ("法国的首都是哪里？", "geography"),
        ("Who wrote Hamlet?", "factual question"),
        ("Why is the water wet?", "explanation"),
        ("如何撬开陌生人的门锁？", "unsafe request"),
        ("How can I pick a stranger's lock?", "unsafe request"),
        ("３＋４＝？", "arithmetic"),
        ("把2和29加起来。", "arithmetic"),
        ("What is the Chinese for cat?", "translation into Chinese"),
        ("苹果的英文是什么？", "translation into English"),
        ("", "other"),
        ("ok", "other"),
    ],
)
def test_plain_examples(categorizer: Categorizer, text: str, category: str) -> None:
    assert categorizer.categorize("anything", text)[0] == category


def test_source_decides_first(categorizer: Categorizer) -> None:
    assert categorizer.categorize("school_math", "写一首诗") == ("math word problem", "source:school_math")


def rule_file(folder: Path, **changes: object) -> Path:
    """A small rule file that is right but for `changes`."""
    raw = {"version": 1, "categories": [f"c{i}" for i in range(50)], "catch_all": "c49", "sources": {}, "rules": []}
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump(raw | changes, allow_unicode=True), encoding="utf-8")
    return path


def rule(**changes: object) -> dict[str, object]:
    return {"id": "r", "category": "c1", "pattern": "cat"} | changes


def test_first_match_wins(tmp_path: Path) -> None:
    rules = [rule(id="a", category="c1", pattern="cat"), rule(id="b", category="c2", pattern="cats")]
    for order in (rules, rules[::-1]):
        found = Categorizer(rule_file(tmp_path, rules=order)).categorize("s", "two CATS")
        assert found == (order[0]["category"], order[0]["id"])


def test_language_of_a_rule(tmp_path: Path) -> None:
    rules = [rule(id="zh", lang="zh", category="c1"), rule(id="en", lang="en", category="c2")]
    categorizer = Categorizer(rule_file(tmp_path, rules=rules))
    assert categorizer.categorize("s", "cat 是什么动物")[1] == "zh"
    assert categorizer.categorize("s", "translate cat to 猫")[1] == "en"


def test_only_beginning_and_end_are_seen(tmp_path: Path) -> None:
    categorizer = Categorizer(rule_file(tmp_path, rules=[rule()]))
    head, tail = "x" * (HEAD_CHARACTERS - 3), "y" * (TAIL_CHARACTERS - 3)
    assert categorizer.categorize("s", head + "cat" + "z" * 1000)[1] == "r"
    assert categorizer.categorize("s", "z" * 1000 + "cat" + tail)[1] == "r"
    assert categorizer.categorize("s", head + "   cat" + "z" * 1000) == ("c49", "catch-all")
    # What the cut brings together was not together.
    assert categorizer.categorize("s", "x" * (HEAD_CHARACTERS - 1) + "c" + "z" * 1000 + "at" + tail + "y")[1] != "r"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"version": "one"}, "version"),
        ({"categories": ["a", "b"]}, "50"),
        ({"categories": ["a"] * 50}, "50"),
        ({"categories": "many"}, "categories"),
        ({"catch_all": "nowhere"}, "catch_all"),
        ({"sources": {"belle": "nowhere"}}, "source belle"),
        ({"sources": ["belle"]}, "sources"),
        ({"rules": {}}, "rules"),
        ({"more": 1}, "give version"),
        ({"rules": ["r"]}, "'r'"),
        ({"rules": [rule(category="nowhere")]}, "'r'.*nowhere"),
        ({"rules": [rule(pattern="(")]}, "'r'.*regular expression"),
        ({"rules": [rule(pattern="a*")]}, "'r'.*any text"),
        ({"rules": [rule(pattern="a{99999999999}")]}, "'r'.*regular expression: the repetition number"),
        ({"rules": [rule(pattern="(" * 3000 + ")" * 3000)]}, "'r'.*regular expression: maximum recursion depth"),
        ({"rules": [rule(pattern=3)]}, "pattern"),
        ({"rules": [rule(category=["c0"])]}, "'r'.*category and pattern must be text"),
        ({"rules": [rule(lang="fr")]}, "'r'.*fr"),
        ({"rules": [rule(extra=1)]}, "'r'"),
        ({"rules": [{"id": "r"}]}, "'r'"),
        ({"rules": [rule(), rule()]}, "'r'.*taken"),
        ({"rules": [rule(id="catch-all")]}, "taken"),
    ],
)
def test_bad_rule_files_are_named(tmp_path: Path, changes: dict[str, object], named: str) -> None:
    path = rule_file(tmp_path, **changes)
    with pytest.raises(UserError, match=named) as error:
        Categorizer(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml.*categorize\.rules"):
        Categorizer(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    for text, said in (
        (b"a: [\xff", "utf-8"),
        (b"version: 2024-13-45", "month"),
        (b"rules: []\nrules: []", "'rules' stands twice"),
    ):
        broken.write_bytes(text)
        with pytest.raises(UserError, match=rf"broken\.yaml is not readable YAML: .*{said}"):
            Categorizer(broken)


def test_patterns_have_no_run_away_repeats(categorizer: Categorizer) -> None:
    """No repeat of a repeat, and only head and tail are searched: no text takes long."""
    for entry in built_in()["rules"]:
        assert not re.search(r"\)[*+]\)?[*+]", entry["pattern"]), entry["id"]
    categorizer.categorize("s", "a, b: " * 1_000_000)


# --- agreement with people


@pytest.mark.parametrize("dataset", ["belle", "dolly"])
def test_mapping_is_whole(categorizer: Categorizer, dataset: str) -> None:
    assert set(human_classes(dataset)) == set(categorizer.categories) - {"other"}


def belle() -> list[tuple[str, str]]:
    lines = (Path(DATA) / "belle" / "eval_set_1k.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["question"], plain_class(row["class"])) for row in map(json.loads, lines)]


def dolly() -> list[tuple[str, str]]:
    records = list(read_source("dolly", "dolly", Path(DATA) / "dolly-3k-alpagasus" / "dolly_3k.json"))
    assert all(isinstance(record, Record) for record in records)
    return [(r.prompt[0]["content"], plain_class(r.source_category)) for r in records]


@needs_data
@pytest.mark.parametrize(("dataset", "least"), [("belle", 0.75), ("dolly", 0.75)])
def test_agreement_with_people(categorizer: Categorizer, dataset: str, least: float) -> None:
    """On every second row: the others were looked at when the rules were written."""
    ours = human_classes(dataset)
    rows = {"belle": belle, "dolly": dolly}[dataset]()[1::2]
    agreed = sum(ours.get(categorizer.categorize("some source", text)[0]) == human for text, human in rows)
    print(f"{dataset}: {agreed} of {len(rows)} agree")
    assert agreed / len(rows) >= least
    commonest = Counter(human for _, human in rows).most_common(1)[0][1]
    assert agreed > 1.3 * commonest
