"""What a pattern can't match without: against re itself, on the built-in rules and on random patterns and texts."""

import itertools
import random
import re
from importlib import resources

import numpy as np
import pyarrow as pa
import pytest
import yaml

from slmfast import _native
from slmfast.arrow_texts import native_texts
from slmfast.categories import Categorizer
from slmfast.rule_literals import needs


def met(alternatives, text):
    return any(all(any(literal in text for literal in clause) for clause in a) for a in alternatives)


def pattern(rng, depth=0):
    """A random pattern of all that needs knows of, and of some things that it does not."""
    kinds = ["text", "set", "any", "not", "digit", "zero"] + ["group", "branch", "repeat", "ahead", "blind"] * (
        depth < 3
    )
    kind = rng.choice(kinds)
    inner = "".join(pattern(rng, depth + 1) for _ in range(rng.randint(1, 3))) if depth < 3 else "a"
    if kind == "text":
        return "".join(rng.choice("ab写成") for _ in range(rng.randint(1, 3)))
    if kind == "repeat":
        return f"(?:{inner}){rng.choice(['?', '*', '+', '{2}', '{1,3}', '{3,}', '{0,9}', '+?', '??', '{2}+'])}"
    if kind == "branch":
        return f"(?:{'|'.join(pattern(rng, depth + 1) for _ in range(rng.randint(2, 4)))}|{inner})"
    return {
        "set": rng.choice(["[ab]", "[a-c写]", "[^a]", "[\\da]", "[^\\d]", "[\\w]"]),
        "any": ".",
        "not": "[^\n]{0,3}",
        "digit": "\\d",
        "zero": rng.choice(["\\b", "^", "$", "(?<!b)", "(?!a)", "(?<=a)"]),
        "group": rng.choice([f"({inner})", f"(?:{inner})", f"(?>{inner})"]),
        "ahead": rng.choice([f"(?!{inner})", f"(?={inner})"]),
        "blind": f"(?i:{inner})",
    }[kind]


def test_no_match_without_what_is_needed():
    rng = random.Random(5)
    matched = asked = 0
    for _ in range(3000):
        source = "|".join(pattern(rng) for _ in range(rng.randint(1, 3)))
        search, alternatives = re.compile(source, re.MULTILINE).search, needs(source, re.MULTILINE)
        asked += all(alternatives)
        for _ in range(20):
            text = "".join(rng.choice("aabbABc写成1٣ \n") for _ in range(rng.randint(0, 9)))
            if search(text):
                matched += 1
                assert met(alternatives, text), (source, text)
    assert matched > 5000 and asked > 300  # neither is the law empty, nor do most patterns ask for nothing


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("写(?:一)?诗|歌", [[{"写诗", "写一诗"}], [{"歌"}]]),
        (r"\b(?:write|pen)\b[^\n]{0,60}\b(?:essay|words?)\b", [[{"write", "pen"}, {"essay", "word"}]]),
        ("x(?:aa|b)y", [[{"xaay"}], [{"xby"}]]),
        ("(?i)write", [[]]),
        ("a|b*", [[{"a"}], []]),
        ("_{3,}", [[{"___"}]]),
        (r"(a)\1", [[{"a"}]]),
        ("(?:ab|c[^d]ef)g*", [[{"ab"}], [{"c"}, {"ef"}]]),
        (
            "1(?:ab|c[^d]ef)2[xy]z?3",
            [[{"1ab2x3", "1ab2xz3", "1ab2y3", "1ab2yz3"}], [{"1c"}, {"ef2x3", "ef2xz3", "ef2y3", "ef2yz3"}]],
        ),
    ],
)
def test_needs_as_one_would_read_them(source, expected):
    assert [[set(clause) for clause in a] for a in needs(source)] == expected


def candidates(rules, texts):
    alternatives = [[[[s.encode() for s in clause] for clause in a] for a in rule] for rule in rules]
    column = native_texts(pa.chunked_array([pa.array(texts, pa.string())]))
    offsets, numbers = _native.LiteralFilter(alternatives).candidates(column)
    return [numbers[begin:end].tolist() for begin, end in itertools.pairwise(offsets)]


def test_filter_finds_just_the_rules_whose_needs_are_met():
    rng = random.Random(8)
    word = lambda: "".join(rng.choice("abc写") for _ in range(rng.randint(1, 4)))  # noqa: E731
    some = lambda make, least, most: [make() for _ in range(rng.randint(least, most))]  # noqa: E731
    found = 0
    for _ in range(300):
        rules = some(lambda: some(lambda: some(lambda: some(word, 1, 3), 0, 3), 0, 3), 0, 6)
        texts = ["", *some(lambda: "".join(some(word, 0, 6)), 1, 8)]
        expected = [[i for i, rule in enumerate(rules) if met(rule, text)] for text in texts]
        assert candidates(rules, texts) == expected
        found += sum(map(len, expected))
    assert found > 500


def test_filter_refuses_what_says_nothing():
    for bad in ([[[[b""]]]], [[[[]]]]):
        with pytest.raises(ValueError, match="literal"):
            _native.LiteralFilter(bad)
    with pytest.raises(TypeError):
        _native.LiteralFilter([[["a"]]])


def test_nearly_all_rules_can_be_told_by_literals():
    rules = yaml.safe_load((resources.files("slmfast") / "data" / "categories.yaml").read_text(encoding="utf-8"))[
        "rules"
    ]
    blind = [rule["id"] for rule in rules if not all(needs(rule["pattern"], re.MULTILINE))]
    assert not blind, "rules that every text has to be searched for"


def test_categorizer_gives_the_first_rule_that_a_plain_search_finds():
    """Against all rules in order, on texts put together from the rules' own literals."""
    raw = yaml.safe_load((resources.files("slmfast") / "data" / "categories.yaml").read_text(encoding="utf-8"))
    literals = sorted(
        {s for rule in raw["rules"] for a in needs(rule["pattern"]) for c in a for s in c if len(c) < 300}
    )
    rng = np.random.default_rng(3)
    texts = ["".join(rng.choice([*literals, " ", " the ", "，", "\n", "7"], rng.integers(1, 12))) for _ in range(1500)]
    texts += ["\udc80写", "ＷＲＩＴＥ ａｎ essay", ""]
    chinese = re.compile("[\u3400-\u9fff](?:[^\u3400-\u9fff]*[\u3400-\u9fff]){3}")
    answers = Categorizer().categorize_all(["s"] * len(texts), texts)
    wide = {ord(c) + 0xFEE0: c for c in map(chr, range(33, 127)) if c.isalnum() or c in "+-=*/%<>"}
    for text, answer in zip(texts, answers, strict=True):
        seen = (text if len(text) <= 420 else f"{text[:300]}…{text[-120:]}").translate(wide).lower()
        skipped = "en" if chinese.search(seen) else "zh"
        rules = (r for r in raw["rules"] if r.get("lang") != skipped and re.search(r["pattern"], seen, re.MULTILINE))
        found = next(rules, {"category": raw["catch_all"], "id": "catch-all"})
        assert answer == (found["category"], found["id"]), text
