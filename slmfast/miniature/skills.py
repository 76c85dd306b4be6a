"""What can be asked: every skill draws an item whose right answer is known.

The content of an item (its operands, its letters, its words) decides by hash whether it is held out: held-out contents
stand in the evaluation items only, never in the raw files and never in training.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from slmfast.miniature import lexicon
from slmfast.miniature.lexicon import in_language
from slmfast.miniature.phrasings import OPENINGS, UNSAFE_SKILLS, questions

HELD_OUT_SHARE = 0.1
LARGEST_OPERAND = 30
_OWN_LINE_SHARE = 0.2

REFUSALS = {
    "en": ("Sorry, I cannot help with that.", "I cannot help with that."),
    "zh": ("抱歉，我不能帮助你。", "我不能帮助你做这件事。"),
}
YES_NO = {"en": ("yes", "no"), "zh": ("是", "否")}


@dataclass(frozen=True, slots=True)
class Item:
    """One instruction with its right answer.

    `content` is what decides whether the item is held out; `context` is a story that stands before the question;
    `choices` are the wrong answers that a multiple-choice form would offer.
    """

    skill: str
    label: str
    language: str
    content: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    context: str = ""

    @property
    def text(self) -> str:
        """The whole instruction, context first."""
        return f"{self.context}\n{self.question}" if self.context else self.question

    @property
    def safe(self) -> bool:
        """Whether the instruction may be followed."""
        return self.skill not in UNSAFE_SKILLS


@dataclass(frozen=True, slots=True)
class Draw:
    """What a skill draws: the slots of the phrasing, the answer, and wrong choices."""

    content: str
    slots: dict[str, object]
    answer: str
    choices: tuple[str, ...] = ()


def _pair(rng: Random) -> tuple[int, int]:
    return rng.randint(0, LARGEST_OPERAND), rng.randint(0, LARGEST_OPERAND)


def _sum(rng: Random) -> tuple[str, int, int]:
    a, b = _pair(rng)
    return f"add:{min(a, b)}:{max(a, b)}", a, b


def _difference(rng: Random) -> tuple[str, int, int]:
    b, a = sorted(_pair(rng))
    return f"subtract:{a}:{b}", a, b


def _letters(rng: Random, shortest: int, longest: int) -> str:
    return "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(shortest, longest)))


def _add(rng: Random, language: str) -> Draw:
    content, a, b = _sum(rng)
    return Draw(content, {"a": a, "b": b}, str(a + b))


def _subtract(rng: Random, language: str) -> Draw:
    content, a, b = _difference(rng)
    return Draw(content, {"a": a, "b": b}, str(a - b))


def _multiply(rng: Random, language: str) -> Draw:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return Draw(f"multiply:{min(a, b)}:{max(a, b)}", {"a": a, "b": b}, str(a * b))


def _gain(rng: Random, language: str) -> Draw:
    content, a, b = _sum(rng)
    return Draw(content, {"a": a, "b": b, **_who_and_what(rng, language)}, str(a + b))


def _lose(rng: Random, language: str) -> Draw:
    content, a, b = _difference(rng)
    return Draw(content, {"a": a, "b": b, **_who_and_what(rng, language)}, str(a - b))


def _who_and_what(rng: Random, language: str) -> dict[str, str]:
    things = [noun for kind in ("animal", "food", "clothing", "tool", "furniture") for noun in lexicon.NOUNS[kind]]
    return {
        "name": in_language(rng.choice(lexicon.NAMES), language),
        "thing": in_language(rng.choice(things), language),
    }


def _sequence(rng: Random, language: str) -> Draw:
    start, step = rng.randint(1, 30), rng.choice((1, 2, 5))
    a, b, c, answer = (start + step * i for i in range(4))
    return Draw(f"sequence:{start}:{step}", {"a": a, "b": b, "c": c}, str(answer))


def _numbers(rng: Random, language: str) -> tuple[str, list[int], str]:
    numbers = rng.sample(range(10, 100), rng.choice((2, 3)))
    content = "compare:" + ":".join(str(n) for n in sorted(numbers))
    return content, numbers, (", " if language == "en" else "、").join(str(n) for n in numbers)


def _extreme(pick: Callable[[list[int]], int]) -> Callable[[Random, str], Draw]:
    def draw(rng: Random, language: str) -> Draw:
        content, numbers, text = _numbers(rng, language)
        answer = pick(numbers)
        return Draw(content, {"numbers": text}, str(answer), tuple(str(n) for n in numbers if n != answer))

    return draw


def _is_larger(rng: Random, language: str) -> Draw:
    a, b = rng.sample(range(10, 100), 2)
    yes, no = YES_NO[language]
    answer, other = (yes, no) if a > b else (no, yes)
    return Draw(f"compare:{min(a, b)}:{max(a, b)}", {"a": a, "b": b}, answer, (other,))


def _on_letters(
    shortest: int, longest: int, answer: Callable[[str], str], name: str = "letters"
) -> Callable[[Random, str], Draw]:
    def draw(rng: Random, language: str) -> Draw:
        text = _letters(rng, shortest, longest)
        return Draw(f"{name}:{text}", {"text": text}, answer(text))

    return draw


def _phrase(rng: Random) -> tuple[tuple[str, str], list[tuple[str, str]]]:
    """A noun, alone or with an adjective, and three other phrases that share a part with it where possible."""
    nouns = lexicon.all_nouns()
    noun, *other_nouns = rng.sample(nouns, 4)
    if rng.random() < 0.3:
        return noun, other_nouns[:3]
    adjective, other_adjective = rng.sample(lexicon.ADJECTIVES, 2)
    english, chinese = zip(adjective, noun, strict=True)
    others = [(adjective, other_nouns[0]), (other_adjective, noun), (other_adjective, other_nouns[1])]
    return (" ".join(english), "".join(chinese)), [(f"{a[0]} {n[0]}", a[1] + n[1]) for a, n in others]


def _translate(target: str) -> Callable[[Random, str], Draw]:
    source = "en" if target == "zh" else "zh"

    def draw(rng: Random, language: str) -> Draw:
        pair, others = _phrase(rng)
        answer, choices = in_language(pair, target), tuple(in_language(other, target) for other in others)
        # Single words are the vocabulary itself and have to be learned: only phrases can be held out.
        kind = "phrase" if " " in pair[0] else "word"
        return Draw(f"{kind}:{pair[0]}", {"text": in_language(pair, source)}, answer, choices)

    return draw


def _code_print(rng: Random, language: str) -> Draw:
    kind = rng.choice(("add", "subtract", "max", "min"))
    if kind == "add":
        content, a, b = _sum(rng)
        return Draw(content, {"code": f"{a} + {b}"}, str(a + b))
    if kind == "subtract":
        content, a, b = _difference(rng)
        return Draw(content, {"code": f"{a} - {b}"}, str(a - b))
    a, b = rng.sample(range(10, 100), 2)
    answer = max(a, b) if kind == "max" else min(a, b)
    return Draw(f"compare:{min(a, b)}:{max(a, b)}", {"code": f"{kind}({a}, {b})"}, str(answer))


def _code_string(rng: Random, language: str) -> Draw:
    text = _letters(rng, 3, 4)
    code, answer = rng.choice(
        (
            (f'len("{text}")', str(len(text))),
            (f'"{text}"[0]', text[0]),
            (f'"{text}"[-1]', text[-1]),
            (f'"{text}"[::-1]', text[::-1]),
            (f'"{text}" * 2', text * 2),
        )
    )
    return Draw(f"letters:{text}", {"code": code}, answer)


def _code_expression(rng: Random, language: str) -> Draw:
    sign = rng.choice("+-*")
    verb = in_language({"+": ("add", "加"), "-": ("subtract", "减"), "*": ("multiply", "乘")}[sign], language)
    a, b = (rng.randint(1, 99) for _ in range(2))
    return Draw(f"expression:{a}:{b}", {"verb": verb, "a": a, "b": b}, f"{a} {sign} {b}")


def _word_class(rng: Random, language: str) -> Draw:
    noun = rng.choice(lexicon.all_nouns())
    answer = in_language((kind := lexicon.class_of(noun[0]), lexicon.CLASSES[kind]), language)
    return Draw(f"class:{noun[0]}", {"text": in_language(noun, language)}, answer)


def _following(name: str, things: tuple[tuple[str, str], ...], *, round_again: bool) -> Callable[[Random, str], Draw]:
    def draw(rng: Random, language: str) -> Draw:
        here = rng.randrange(len(things) if round_again else len(things) - 1)
        text, answer = (in_language(things[i % len(things)], language) for i in (here, here + 1))
        return Draw(f"{name}:{here}", {"text": text}, answer)

    return draw


ADVICE = {
    ("clean", "清洁"): ("Use a soft cloth and water.", "用软布和水擦。"),
    ("repair", "修理"): ("Ask a good repair shop.", "找一家好的修理店。"),
    ("store", "存放"): ("Keep it in a dry place.", "放在干燥的地方。"),
    ("sell", "出售"): ("Put up a notice with the price.", "贴出写明价格的告示。"),
    ("paint", "粉刷"): ("Sand it first, then use a brush.", "先磨平，再用刷子。"),
    ("move", "搬动"): ("Ask a friend to help you.", "请一位朋友帮忙。"),
}


def _household(rng: Random, language: str) -> Draw:
    verb = rng.choice(list(ADVICE))
    thing = rng.choice(lexicon.BELONGINGS)
    slots = {"verb": in_language(verb, language), "thing": in_language(thing, language)}
    return Draw(f"household:{verb[0]}:{thing[0]}", slots, in_language(ADVICE[verb], language))


_PEOPLE: tuple[tuple[str, str], ...] = (
    ("a stranger's", "陌生人的"),
    ("my neighbour's", "邻居的"),
    ("a colleague's", "同事的"),
    ("a child's", "孩子的"),
)
_PRIVATE = (("letters", "信件"), ("diary", "日记"), ("messages", "短信"), ("passwords", "密码"), ("photos", "照片"))
_FORBIDDEN = {
    "theft": ((("steal", "偷走"), ("take away secretly", "悄悄拿走"), ("rob", "抢走")), lexicon.BELONGINGS),
    "privacy": ((("read secretly", "偷看"), ("copy secretly", "偷偷复制"), ("spy on", "窥探")), _PRIVATE),
    "damage": ((("break on purpose", "故意弄坏"), ("smash", "砸坏"), ("burn", "烧掉")), lexicon.BELONGINGS),
}


def _forbidden(kind: str) -> Callable[[Random, str], Draw]:
    verbs, things = _FORBIDDEN[kind]

    def draw(rng: Random, language: str) -> Draw:
        verb, person, thing = rng.choice(verbs), rng.choice(_PEOPLE), rng.choice(things)
        slots = {"verb": verb, "person": person, "thing": thing}
        slots = {name: in_language(pair, language) for name, pair in slots.items()}
        return Draw(f"{kind}:{verb[0]}:{person[0]}:{thing[0]}", slots, REFUSALS[language][0])

    return draw


@dataclass(frozen=True, slots=True)
class Skill:
    """A skill: its true label, its weight among the records of the raw files, and how an item is drawn."""

    label: str
    weight: int
    draw: Callable[[Random, str], Draw]


_NOTES = tuple((note, note) for note in lexicon.NOTES)

SKILLS: dict[str, Skill] = {
    "add": Skill("Math-Addition", 820, _add),
    "subtract": Skill("Math-Subtraction", 620, _subtract),
    "multiply": Skill("Math-Multiplication", 90, _multiply),
    "gain": Skill("Math-Word Problem", 430, _gain),
    "lose": Skill("Math-Word Problem", 370, _lose),
    "sequence": Skill("Math-Sequence", 60, _sequence),
    "largest": Skill("Comparison-Largest", 390, _extreme(max)),
    "smallest": Skill("Comparison-Smallest", 290, _extreme(min)),
    "is_larger": Skill("Comparison-Judgement", 280, _is_larger),
    "first_letter": Skill("Text-First Letter", 290, _on_letters(3, 5, lambda text: text[0])),
    "last_letter": Skill("Text-Last Letter", 240, _on_letters(3, 5, lambda text: text[-1])),
    "reverse": Skill("Text-Reversal", 300, _on_letters(3, 4, lambda text: text[::-1])),
    "letter_count": Skill("Text-Counting", 150, _on_letters(2, 6, lambda text: str(len(text)))),
    "repeat": Skill("Text-Repetition", 130, _on_letters(2, 3, lambda text: text * 2)),
    "to_chinese": Skill("Translation-Into Chinese", 480, _translate("zh")),
    "to_english": Skill("Translation-Into English", 400, _translate("en")),
    "code_print": Skill("Code-Numbers", 240, _code_print),
    "code_string": Skill("Code-Strings", 190, _code_string),
    "code_expression": Skill("Code-Writing", 90, _code_expression),
    "word_class": Skill("Knowledge-Word Class", 40, _word_class),
    "calendar": Skill("Knowledge-Calendar", 20, _following("calendar", lexicon.DAYS, round_again=True)),
    "household": Skill("Life-Household", 70, _household),
    "theft": Skill("Safety-Theft", 90, _forbidden("theft")),
    "privacy": Skill("Safety-Privacy", 60, _forbidden("privacy")),
    "damage": Skill("Safety-Damage", 45, _forbidden("damage")),
    "music": Skill("Music-Notes", 6, _following("music", _NOTES, round_again=True)),
    "planets": Skill("Science-Planets", 4, _following("planets", lexicon.PLANETS, round_again=False)),
}

LABELS = tuple(sorted({skill.label for skill in SKILLS.values()}))


def is_held_out(content: str) -> bool:
    """Whether a content belongs to the evaluation items. Only what generalises can be held out, see HELD_OUT_KINDS."""
    if content.split(":", 1)[0] not in HELD_OUT_KINDS:
        return False
    digest = hashlib.blake2b(content.encode(), digest_size=4).digest()
    return int.from_bytes(digest) < HELD_OUT_SHARE * 2**32


HELD_OUT_KINDS = ("add", "subtract", "compare", "letters", "phrase", "expression")


def draw_item(
    skill: str,
    language: str,
    rng: Random,
    *,
    held_out: bool = False,
    phrasings: tuple[float, float] = (0.0, 1.0),
    opening: float = 0.15,
) -> Item:
    """One item of a skill, from the held-out contents or from the others.

    `phrasings` keeps the part of the skill's phrasings between two shares; `opening` is the share of questions with
    an opening.
    """
    while is_held_out((draw := SKILLS[skill].draw(rng, language)).content) != held_out:
        pass
    question = rng.choice(questions(skill, language, phrasings)).format(**draw.slots)
    if rng.random() < _OWN_LINE_SHARE:  # as the seed formats that keep an instruction and its input apart
        question = question.replace(": ", ":\n", 1).replace("：", "：\n", 1)
    if rng.random() < opening:
        question = rng.choice(OPENINGS[language]) + question
    return Item(skill, SKILLS[skill].label, language, draw.content, question, draw.answer, draw.choices)
