"""Held-out scores of a model of the miniature: its answers, its labels and its judgements.

Everything is measured on the weights as saved, through the engine that the pipeline itself uses.
"""

from pathlib import Path
from random import Random

import numpy as np

from slmfast import prompts
from slmfast.engines.local import LocalEngine
from slmfast.labels import parse_label
from slmfast.miniature import replies
from slmfast.miniature.evaluation_items import MULTIPLE_CHOICE, TASK_SKILLS, evaluation_items
from slmfast.miniature.skills import SKILLS, Item, draw_item

LONGEST_ANSWER = 16  # tokens


def task_scores(model: Path | str, *, count: int = 200, seed: int = 0, threads: int | None = None) -> dict[str, float]:
    """The share of `count` held-out items of each evaluation task that a model gets right."""
    engine = LocalEngine(model, threads=threads)
    return {task: _task_score(engine, task, evaluation_items(task, seed, count)) for task in TASK_SKILLS}


def _task_score(engine: LocalEngine, task: str, items: list[Item]) -> float:
    texts = [item.text for item in items]
    if task in MULTIPLE_CHOICE:
        scores = engine.perplexity(texts, [[item.answer, *item.choices] for item in items])
        bits = zip(scores["prompt_index"].to_pylist(), scores["bits"].to_pylist(), strict=True)
        likeliest: dict[int, list[float]] = {}
        for i, cost in bits:
            likeliest.setdefault(i, []).append(cost)
        return float(np.mean([int(np.argmin(costs)) == 0 for costs in likeliest.values()]))
    answers = engine.generate(texts, max_new_tokens=LONGEST_ANSWER)
    pairs = zip(items, answers, strict=True)
    return float(np.mean([replies.is_right(item.skill, item.answer, answer.text) for item, answer in pairs]))


def judge_scores(model: Path | str, *, count: int = 300, seed: int = 0, threads: int | None = None) -> dict[str, float]:
    """Label accuracy, and the shares of judgements that are right: quality (right or wrong reply), safety, label audit.

    Items are drawn as the raw files draw them, from held-out contents where a skill has any; of the replies judged
    half are right and half wrong.
    """
    engine, rng = LocalEngine(model, threads=threads), Random(f"judge {seed}")
    items = [_any_item(rng) for _ in range(count)]
    judged = [
        (item, item.answer if i % 2 else replies.wrong_reply(item, rng, _any_item(rng))) for i, item in enumerate(items)
    ]
    labels = [
        item.label if i % 2 else rng.choice([skill.label for skill in SKILLS.values()]) for i, item in enumerate(items)
    ]
    unsafe = [
        draw_item(rng.choice(("theft", "privacy", "damage")), rng.choice(("en", "zh")), rng) for _ in range(count // 4)
    ]
    asked = [*items, *unsafe]
    answered = judged + [(item, item.answer if i % 2 else _complying(item, rng)) for i, item in enumerate(unsafe)]
    return {
        "label": _label_accuracy(engine, items),
        "quality": _agreement(
            _decisions(
                engine,
                [prompts.quality_prompt(item.text, reply) for item, reply in judged],
                prompts.QUALITY_CHOICES,
                "1",
            ),
            [replies.is_right(item.skill, item.answer, reply) for item, reply in judged],
        ),
        "instruction_safety": _agreement(
            _decisions(engine, [prompts.instruction_safety_prompt(item.text) for item in asked], prompts.YES_NO, "yes"),
            [item.safe for item in asked],
        ),
        "reply_safety": _agreement(
            _decisions(
                engine,
                [prompts.reply_safety_prompt(item.text, reply) for item, reply in answered],
                prompts.YES_NO,
                "yes",
            ),
            [replies.is_safe(item.skill, reply) for item, reply in answered],
        ),
        "label_audit": _agreement(
            _decisions(
                engine,
                [prompts.label_audit_prompt(item.text, label) for item, label in zip(items, labels, strict=True)],
                prompts.YES_NO,
                "yes",
            ),
            [label == item.label for item, label in zip(items, labels, strict=True)],
        ),
    }


def _any_item(rng: Random) -> Item:
    skill = rng.choices(list(SKILLS), [skill.weight for skill in SKILLS.values()])[0]
    can_be_held_out = any(skill in skills for skills in TASK_SKILLS.values())
    return draw_item(skill, rng.choice(("en", "zh")), rng, held_out=can_be_held_out)


def _complying(item: Item, rng: Random) -> str:
    return rng.choice(replies.COMPLIANCE[item.language])


def _label_accuracy(engine: LocalEngine, items: list[Item]) -> float:
    answers = engine.generate([prompts.label_prompt(item.text) for item in items], max_new_tokens=LONGEST_ANSWER)
    pairs = zip(items, answers, strict=True)
    return float(np.mean([parse_label(answer.text) == item.label for item, answer in pairs]))


def _decisions(
    engine: LocalEngine, asked: list[list[dict[str, str]]], choices: tuple[str, ...], positive: str
) -> list[bool]:
    """For each prompt whether the likeliest choice is `positive`."""
    scores = engine.choose(asked, [choices] * len(asked))
    return [choices[int(np.argmax(row))] == positive for row in scores]


def _agreement(decided: list[bool], true: list[bool]) -> float:
    return float(np.mean(np.array(decided) == np.array(true)))
