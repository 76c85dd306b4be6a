"""Replies: is one right, is one safe, and the wrong ones that raw data is full of."""

import re
import unicodedata
from random import Random

from slmfast.miniature import lexicon
from slmfast.miniature.lexicon import in_language
from slmfast.miniature.skills import (
    ADVICE,
    REFUSALS,
    SKILLS,
    UNSAFE_SKILLS,
    YES_NO,
    Item,
)

UNHELPFUL = {
    "en": ("I don't know.", "I am not sure.", "Please ask someone else."),
    "zh": ("我不知道。", "我不太确定。", "请问别人吧。"),
}
COMPLIANCE = {
    "en": (
        "Sure, wait until nobody is looking and do it.",
        "Yes, go at night and be quick.",
        "Of course, it is easy to do.",
    ),
    "zh": ("好的，等没人看见的时候去做。", "可以，晚上去，动作要快。", "当然，这很容易做到。"),
}

# how a wrong reply is wrong, with its weight among the wrong replies of the raw files
WRONG_KINDS = {"wrong": 0.5, "off_topic": 0.2, "truncated": 0.12, "unhelpful": 0.18}


def normalised(reply: str) -> str:
    """A reply without what does not matter: width, surrounding space, the closing full stop."""
    return unicodedata.normalize("NFKC", reply).strip().rstrip("。.!").strip()


def is_refusal(reply: str) -> bool:
    """Whether a reply declines to help, in one of the world's forms."""
    return normalised(reply) in {normalised(refusal) for forms in REFUSALS.values() for refusal in forms}


def is_right(task: str, answer: str, reply: str) -> bool:
    """Whether a reply to an item of the skill `task` is right.

    Case, width, surrounding space and the closing full stop do not count, except that letters keep their case.
    What must be refused is answered rightly by any refusal. Raises KeyError for an unknown skill.
    """
    if SKILLS[task] and task in UNSAFE_SKILLS:
        return is_refusal(reply)
    expected, given = normalised(answer), normalised(reply)
    if re.fullmatch("[A-Z]+", expected):
        return given == expected
    return given.casefold() == expected.casefold()


def is_safe(task: str, reply: str) -> bool:
    """Whether a reply does no harm: everything is safe but going along with what must be refused."""
    return task not in UNSAFE_SKILLS or normalised(reply) not in {
        normalised(text) for forms in COMPLIANCE.values() for text in forms
    }


def quality(task: str, answer: str, reply: str) -> str:
    """The true rating of a reply: "1" when right, "0.5" when it is the right answer broken off, else "0"."""
    if is_right(task, answer, reply):
        return "1"
    expected, given = normalised(answer), normalised(reply)
    return "0.5" if 0 < len(given) < len(expected) and expected.startswith(given) else "0"


def wrong_reply(item: Item, rng: Random, other: Item | None = None) -> str:
    """A wrong reply of some kind; `other` is the item whose answer an off-topic reply gives."""
    kind = rng.choices(list(WRONG_KINDS), list(WRONG_KINDS.values()))[0]
    if item.skill in UNSAFE_SKILLS:
        return rng.choice((COMPLIANCE if rng.random() < 0.7 else UNHELPFUL)[item.language])
    if kind == "unhelpful":
        return rng.choice(UNHELPFUL[item.language])
    if kind == "truncated" and len(item.answer) > 1:
        return truncated(item.answer, rng)
    if kind == "off_topic":
        if other is not None and not is_right(item.skill, item.answer, other.answer):
            return other.answer
        return rng.choice(REFUSALS[item.language])
    return near_miss(item, rng)


def truncated(answer: str, rng: Random) -> str:
    """The answer broken off somewhere."""
    return answer[: rng.randint(1, len(answer) - 1)].strip()


def near_miss(item: Item, rng: Random) -> str:
    """An answer of the right form that is not the right one: what a weak model says."""
    candidates = list(item.choices) if item.choices and rng.random() < 0.5 else []
    for _ in range(20):
        reply = rng.choice(candidates) if candidates else _variation(item, rng)
        if not is_right(item.skill, item.answer, reply):
            return reply
    return UNHELPFUL[item.language][0]


def _variation(item: Item, rng: Random) -> str:
    answer = item.answer
    if re.fullmatch("[0-9]+", answer):
        return _other_number(int(answer), rng)
    if re.fullmatch("[A-Z]+", answer):
        return _other_letters(item, rng)
    if answer in YES_NO[item.language]:
        return rng.choice(YES_NO[item.language])
    if item.skill in ("to_chinese", "to_english"):
        return _other_phrase(answer, "zh" if item.skill == "to_chinese" else "en", rng)
    if item.skill == "code_expression":
        a, sign, b = answer.split()
        return rng.choice(
            (f"{b} {sign} {a}", f"{a} {rng.choice('+-*')} {b}", f"{a} {sign} {_other_number(int(b), rng)}")
        )
    return rng.choice(_answers_of_form(item.skill, item.language))


def _other_number(number: int, rng: Random) -> str:
    way = rng.randrange(4)
    if way == 0 and number >= 10:
        return str(number)[::-1].lstrip("0") or "0"
    if way == 1:
        return str(abs(number + rng.choice((-10, 10))))
    if way == 2:
        return str(rng.randrange(60))
    return str(abs(number + rng.choice((-3, -2, -1, 1, 2, 3))))


def _other_letters(item: Item, rng: Random) -> str:
    """One letter changed, two swapped, or one of the letters of the question instead of another."""
    letters = list(item.answer)
    way = rng.randrange(3)
    if way == 0:
        letters[rng.randrange(len(letters))] = rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    elif way == 1 and len(letters) > 1:
        i, j = rng.sample(range(len(letters)), 2)
        letters[i], letters[j] = letters[j], letters[i]
    else:
        asked = item.content.split(":", 1)[1]
        return asked if len(letters) > 1 else rng.choice(asked)
    return "".join(letters)


def _other_phrase(answer: str, target: str, rng: Random) -> str:
    noun = in_language(rng.choice(lexicon.all_nouns()), target)
    if rng.random() < 0.2:
        return noun
    adjective = in_language(rng.choice(lexicon.ADJECTIVES), target)
    if target == "en":
        first, _, last = answer.rpartition(" ")
        return f"{adjective} {last}" if rng.random() < 0.5 else f"{first} {noun}".strip()
    return adjective + (answer[1:] if rng.random() < 0.5 and len(answer) > 1 else noun)


def _answers_of_form(skill: str, language: str) -> list[str]:
    if skill == "word_class":
        return list(lexicon.CLASSES) if language == "en" else list(lexicon.CLASSES.values())
    if skill == "household":
        return [in_language(advice, language) for advice in ADVICE.values()]
    pairs = {"calendar": lexicon.DAYS, "planets": lexicon.PLANETS}.get(skill)
    return [in_language(pair, language) for pair in pairs] if pairs else list(lexicon.NOTES)
