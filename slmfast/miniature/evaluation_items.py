"""The evaluation items of the world: held-out contents that stand neither in the raw files nor in training."""

import json
from pathlib import Path
from random import Random

from slmfast.miniature.skills import Item, draw_item
from slmfast.store import atomic_path

ITEMS_PER_TASK = 200
TASK_SKILLS = {
    "mini_arithmetic": ("add", "subtract", "gain", "lose"),
    "mini_code": ("code_print", "code_string", "code_expression"),
    "mini_compare": ("largest", "smallest"),
    "mini_lexicon": ("to_chinese", "to_english"),
    "mini_text": ("first_letter", "last_letter", "reverse", "letter_count", "repeat"),
}
MULTIPLE_CHOICE = ("mini_compare", "mini_lexicon")


def evaluation_items(task: str, seed: int, count: int = ITEMS_PER_TASK) -> list[Item]:
    """Held-out items of an evaluation task, no two with the same question; skills and languages take turns."""
    rng, items, seen = Random(f"{task} {seed}"), [], set()
    while len(items) < count:
        skill = TASK_SKILLS[task][len(items) // 2 % len(TASK_SKILLS[task])]
        item = draw_item(skill, ("en", "zh")[len(items) % 2], rng, held_out=True)
        if item.question not in seen:
            seen.add(item.question)
            items.append(item)
    return items


def write_evaluation(directory: Path, seed: int) -> None:
    """Writes <task>.jsonl for each task: question, answer, language, task; for a choice also choices and gold."""
    directory.mkdir(parents=True, exist_ok=True)
    for task in TASK_SKILLS:
        rng = Random(f"{task} {seed} choices")
        with atomic_path(directory / f"{task}.jsonl") as temporary:
            lines = [_line(task, item, rng) for item in evaluation_items(task, seed)]
            temporary.write_text("".join(lines), encoding="utf-8")


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
