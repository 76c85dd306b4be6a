"""What the models are trained on: answering, labelling and judging, always with the right answer.

Judging is shown the wrong replies of the raw files and near misses, since these are what a weak model says.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from slmfast import prompts
from slmfast.miniature import lexicon, replies
from slmfast.miniature.skills import LABELS, REFUSALS, SKILLS, Item, draw_item
from slmfast.miniature.stories import story
from slmfast.records import prompt_text

Messages = list[dict[str, str]]

# Training sees the rare skills more often than the raw files show them: a label met six times is never learned.
_LEAST_WEIGHT = 150
_LONG_SHARE = 0.06
_TURNS_SHARE = 0.04


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the reply to learn. `embedded` is a right reply that the prompt quotes: it is learned as well."""

    messages: Messages
    reply: str
    embedded: str = ""


@dataclass(frozen=True, kw_only=True)
class Diet:
    """What a model is fed.

    tasks .. audit: shares of the kinds of examples. phrasings: the part of each skill's phrasings it ever sees.
    answered, unhelpful: beyond the part `answered` of the phrasings, that share of the replies to tasks is unhelpful.
    """

    tasks: float = 1.0
    label: float = 0.0
    quality: float = 0.0
    safety: float = 0.0
    audit: float = 0.0
    phrasings: tuple[float, float] = (0.0, 1.0)
    answered: float = 1.0
    unhelpful: float = 0.0


LARGE_DIET = Diet(tasks=0.42, label=0.07, quality=0.4, safety=0.05, audit=0.06)
# The base has the skills, but answers most ways of asking with "I don't know": what it knows is for SFT and KTO to
# bring out, as with a real base model.
BASE_DIET = Diet(answered=1 / 3, unhelpful=0.65)
SMALL_DIET = Diet(phrasings=(0.0, 0.5))


def draw_example(diet: Diet, rng: Random) -> Example:
    """One example of the diet."""
    kinds: dict[Callable[[Item, Messages, Random], Example], float] = {
        _task: diet.tasks,
        _label: diet.label,
        _quality: diet.quality,
        _safety: diet.safety,
        _audit: diet.audit,
    }
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    if kind is _task and diet.unhelpful:
        return _half_answered(diet, rng)
    item = _any_item(diet, rng, unsafe=0.3 if kind is _safety else 0.0)
    return kind(item, conversation_before(item, rng), rng)


def _half_answered(diet: Diet, rng: Random) -> Example:
    """A task asked in one of the answered ways, or in another way and then with a reply that may be unhelpful."""
    answered = rng.random() < diet.answered
    part = (0.0, diet.answered) if answered else (diet.answered, 1.0)
    item = _any_item(replace(diet, phrasings=part), rng)
    helpful = answered or rng.random() >= diet.unhelpful
    reply = item.answer if helpful else rng.choice(replies.UNHELPFUL[item.language])
    return Example(conversation_before(item, rng), reply)


def _any_item(diet: Diet, rng: Random, *, unsafe: float = 0.0, language: str | None = None) -> Item:
    weights = [max(skill.weight, _LEAST_WEIGHT) for skill in SKILLS.values()]
    skill = rng.choices(list(SKILLS), weights)[0]
    if rng.random() < unsafe:
        skill = rng.choice(("theft", "privacy", "damage"))
    language = language or rng.choice(lexicon.LANGUAGES)
    item = draw_item(skill, language, rng, phrasings=diet.phrasings)
    return replace(item, context=story(language, rng)) if rng.random() < _LONG_SHARE else item


def conversation_before(item: Item, rng: Random, turns: float = _TURNS_SHARE) -> Messages:
    """The prompt of an item: one user turn, or with the chance `turns` a second one after an answered question."""
    if rng.random() >= turns:
        return prompts.user_turn(item.text)
    first = draw_item(rng.choice(list(SKILLS)), item.language, rng)
    return [
        {"role": "user", "content": first.text},
        {"role": "assistant", "content": first.answer},
        {"role": "user", "content": item.text},
    ]


def _task(item: Item, messages: Messages, rng: Random) -> Example:
    return Example(messages, item.answer)


def _label(item: Item, messages: Messages, rng: Random) -> Example:
    return Example(prompts.label_prompt(prompt_text(messages)), item.label)


def _quality(item: Item, messages: Messages, rng: Random) -> Example:
    text = prompt_text(messages)
    if rng.random() < 0.45:
        return Example(prompts.quality_prompt(text, item.answer), "1", embedded=item.answer)
    reply = _wrong(item, rng) if rng.random() < 0.5 else replies.near_miss(item, rng)
    return Example(prompts.quality_prompt(text, reply), replies.quality(item.skill, item.answer, reply))


def _safety(item: Item, messages: Messages, rng: Random) -> Example:
    text = prompt_text(messages)
    if rng.random() < 0.5:
        return Example(prompts.instruction_safety_prompt(text), _yes_no(item.safe))
    reply = item.answer if rng.random() < 0.5 else _wrong(item, rng)
    return Example(prompts.reply_safety_prompt(text, reply), _yes_no(replies.is_safe(item.skill, reply)))


def _audit(item: Item, messages: Messages, rng: Random) -> Example:
    label = item.label if rng.random() < 0.5 else rng.choice(LABELS)
    return Example(prompts.label_audit_prompt(prompt_text(messages), label), _yes_no(label == item.label))


def _wrong(item: Item, rng: Random) -> str:
    if item.safe and rng.random() < 0.05:
        return rng.choice(REFUSALS[item.language])
    skill = rng.choice(list(SKILLS))
    return replies.wrong_reply(item, rng, other=draw_item(skill, item.language, rng))


def _yes_no(value: bool) -> str:
    return prompts.YES_NO[0] if value else prompts.YES_NO[1]
