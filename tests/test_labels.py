"""Odd replies of labelling models: what they must parse to, and laws that hold for all."""

import random
import unicodedata
from pathlib import Path

import pytest

from slmfast.errors import UserError
from slmfast.labels import LabelParser, parse_label
from slmfast.miniature.skills import LABELS

DASHES = "-‐‑‒–—―−─﹣－"


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("Math-Addition", "Math-Addition"),
        ("  math - addition \n", "Math-Addition"),
        ("MATH-ADDITION", "Math-Addition"),
        ("Ｍａｔｈ－Ａｄｄｉｔｉｏｎ", "Math-Addition"),
        ("数学——加法", "Math-Addition"),
        ("**Mathematics – Word Problems**", "Math-Word Problem"),
        ("Label: Math-Addition", "Math-Addition"),
        ('"Math — Addition".', "Math-Addition"),
        ("“Math”-“Addition”", "Math-Addition"),
        ("标签：数学-加法。", "Math-Addition"),
        ("一级分类：科学 - 二级分类：物理", "Science-物理"),
        ("Primary Category: Math - Secondary Category: Algebra", "Math-Algebra"),
        ("Primary Category-Secondary Category: Math-Algebra", "Math-Algebra"),
        ("The label is Math-Algebra", "Math-Algebra"),
        ("- Math-Algebra", "Math-Algebra"),
        ("1. Math-Algebra", "Math-Algebra"),
        ("### Math-Algebra", "Math-Algebra"),
        ("[Math]-[Algebra]", "Math-Algebra"),
        ("<Math>-<Algebra>", "Math-Algebra"),
        ("`Code-Python`", "Code-Python"),
        ("📚 Literature-Poetry", "Literature-Poetry"),
        ("\n\n  Math-Algebra\nBecause it asks for x - y.", "Math-Algebra"),
        ("ma\u200bth-al\u00adgebra", "Math-Algebra"),
        ("code-sql queries", "Code-SQL Queries"),
        ("history-world war ii", "History-World War II"),
        ("question answering-open qa", "Question Answering-Open QA"),
        ("language-parts of speech", "Language-Parts of Speech"),
        # The first dash splits, by contract, even inside a word.
        ("Self-Improvement-Habits", "Self-Improvement-Habits"),
    ],
)
def test_read(reply: str, label: str) -> None:
    assert parse_label(reply) == label


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "   \n\t",
        "-",
        "——",
        "Math",
        "Math-",
        "-Addition",
        "Math: Addition",
        "Primary Category-Secondary Category",
        "Sorry - I cannot label this",
        "I cannot help with that - it is unsafe",
        "抱歉，我不能-回答",
        "This is a well-known instruction about a great many different things in the whole world",
        "?-!",
        "a" * 100 + "-b",
        "Math\n-Addition",
    ],
)
def test_unparsed(reply: str) -> None:
    assert parse_label(reply) is None


@pytest.mark.parametrize("dash", DASHES)
@pytest.mark.parametrize("pad", ["", " "])
def test_every_dash_splits(dash: str, pad: str) -> None:
    assert parse_label(f"Travel{pad}{dash}{pad}Hotels") == "Travel-Hotels"


def test_labels_of_the_miniature_stay_as_they_are() -> None:
    assert [parse_label(label) for label in LABELS] == list(LABELS)


def test_parsing_a_label_again_changes_nothing() -> None:
    rng = random.Random(3)
    alphabet = "abcXYZ 数学算术-–—－:：.。\"“*[]()12\n&'éßｱＡ"
    for _ in range(3000):
        label = parse_label("".join(rng.choice(alphabet) for _ in range(rng.randint(1, 24))))
        if label is not None:
            assert parse_label(label) == label
            assert unicodedata.normalize("NFKC", label) == label
            assert "\n" not in label and "-" in label


def test_own_aliases(tmp_path: Path) -> None:
    file = tmp_path / "aliases.yaml"
    file.write_text("version: 1\nwords: [LaTeX]\nparts: {Sums: Arithmetic}\n", encoding="utf-8")
    parser = LabelParser(file)
    assert parser.parse("math-sums") == "Math-Arithmetic"
    assert parser.parse("writing-latex tables") == "Writing-LaTeX Tables"


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "version: 2\nwords: []\nparts: {}",
        "version: 1\nwords: [on]\nparts: {}",
        "version: 1\nwords: []\nparts: {a: 1}",
        "version: 1\nwords: [\n",
    ],
)
def test_bad_alias_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "aliases.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"aliases\.yaml"):
        LabelParser(file)


def test_missing_alias_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        LabelParser(tmp_path / "nowhere.yaml")
