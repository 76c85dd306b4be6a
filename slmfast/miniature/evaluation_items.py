"""The evaluation items of the world: held-out contents that stand neither in the raw files nor in training."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

from slmfast.miniature.skills import Item, draw_item
from slmfast.store import atomic_path

ITEMS_PER_TASK = 200
DEVELOPMENT = 1 << 20  # is added to the seed of the test's items
TASK_SKILLS = {
    "mini_arithmetic": ("add", "subtract", "gain", "lose"),
    "mini_code": ("code_print", "code_string", "code_expression"),
    "mini_compare": ("largest", "smallest"),
    "mini_lexicon": ("to_chinese", "to_english"),
    "mini_text": ("first_letter", "last_letter", "reverse", "letter_count", "repeat"),
}
MULTIPLE_CHOICE = ("mini_compare", "mini_lexicon")


def evaluation_items(task: str, seed: int, count: int = ITEMS_PER_TASK, apart_from: Sequence[Item] = ()) -> list[Item]:
    """Held-out items of an evaluation task, no two with the same question; skills and languages take turns.

    Args:
        apart_from: items whose questions must not come.
    """
    rng, items, seen = Random(f"{task} {seed}"), [], {item.question for item in apart_from}
    while len(items) < count:
        skill = TASK_SKILLS[task][len(items) // 2 % len(TASK_SKILLS[task])]
        item = draw_item(skill, ("en", "zh")[len(items) % 2], rng, held_out=True)
        if item.question not in seen:
            seen.add(item.question)
            items.append(item)
    return items


def write_evaluation(directory: Path, seed: int) -> None:
    """Writes eval/<task>.jsonl for each task, the test, and dev/<task>.jsonl, as many other items to choose by.

    A line has question, answer, language, task, and for a choice also choices and gold.
    """
    for task in TASK_SKILLS:
        test = evaluation_items(task, seed)
        development = evaluation_items(task, seed + DEVELOPMENT, apart_from=test)
        for split, items in (("eval", test), ("dev", development)):
            rng = Random(f"{task} {seed} choices")
            (directory / split).mkdir(parents=True, exist_ok=True)
            with atomic_path(directory / split / f"{task}.jsonl") as temporary:
                temporary.write_text("".join(_line(task, item, rng) for item in items), encoding="utf-8")


def _line(task: str, item: Item, rng: Random) -> str:
    row: dict[str, object] = {
        "question": item.question,
        "answer": item.answer,
        "language": item.language,
        "task": item.skill,
    }
    if task in MULTIPLE_CHOICE:
        choices = rng.sample([item.answer, *item.choices], 1 + len(item.choices))
        row |= {"choices": choices, "gold": choices.index(item.answer)}
    return json.dumps(row, ensure_ascii=False) + "\n"
