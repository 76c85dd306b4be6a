"""Languages are told by script; the real files say how well."""

import os
from pathlib import Path

import pytest

from slmfast.language import HEAD_CHARACTERS, detect
from slmfast.readers import Record, read_source


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the capital of France?", "en"),
        ("法国的首都是哪里？", "zh"),
        ("法國的首都在哪裡？請用繁體中文回答。", "zh"),
        ("用 Python 写一个函数，计算 fibonacci 数列", "zh"),
        ("解释这段代码：\nfor i in range(10):\n    print(i)", "zh"),
        ("Ｗhat does 你好 mean in English, and when do people say it?", "en"),
        ("Generate a slogan for a new café called The Perk", "en"),
        ("フランスの首都はどこですか。教えてください。", "other"),
        ("프랑스의 수도는 어디입니까?", "other"),
        ("Какая столица Франции?", "other"),
        ("ما هي عاصمة فرنسا؟", "other"),
        ("Quelle est la différence entre un été et une année passée à étudier ?", "other"),
        ("Thủ đô của nước Pháp là gì?", "other"),
        ("𠮷野家在哪里", "zh"),
        ("3 + 4 = ?", "other"),
        ("３＋４＝？", "other"),
        ("😀😀", "other"),
        ("", "other"),
    ],
)
def test_scripts(text: str, language: str) -> None:
    assert detect(text) == language


def test_language_does_not_depend_on_length() -> None:
    for text in ("请写一个故事。", "Write a story. ", "Напиши рассказ. "):
        assert {detect(text * n) for n in (1, 7, 100, 10_000)} == {detect(text)}


def test_only_the_beginning_counts() -> None:
    head = "word " * (HEAD_CHARACTERS // 5)
    assert detect(head + "汉" * 100_000) == "en"


def test_surrogates_and_controls_do_no_harm() -> None:
    assert detect("\udc80 hello \x00") == "en"


@pytest.mark.parametrize(("side", "least"), [("en", 0.999), ("zh", 0.997)])
def test_both_sides_of_real_translations(side: str, least: float) -> None:
    folder = os.environ.get("SLMFAST_DATA")
    if not folder:
        pytest.skip("SLMFAST_DATA is not set: no real files")
    paths = sorted(Path(folder).glob("alpaca-bilingual-52k/*.json"))[:6]
    records = [r for r in read_source("alpaca", f"alpaca_bilingual_{side}", paths) if isinstance(r, Record)]
    right = sum(detect(record.prompt[0]["content"]) == side for record in records)
    assert right / len(records) >= least
