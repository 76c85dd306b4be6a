"""How each skill can be asked: the templates of phrasings.yaml, whose slots a skill fills."""

from pathlib import Path

import yaml

UNSAFE_SKILLS = ("theft", "privacy", "damage")

# put before a question now and then
OPENINGS = {"en": ("Please answer. ", "A question: ", "Quick one: "), "zh": ("请回答：", "问题：", "题目：")}


def _load() -> dict[str, dict[str, tuple[str, ...]]]:
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    table = {
        skill: {language: tuple(templates) for language, templates in languages.items()}
        for skill, languages in yaml.safe_load(text).items()
    }
    forbidden = table.pop("forbidden")
    return table | dict.fromkeys(UNSAFE_SKILLS, forbidden)


PHRASINGS: dict[str, dict[str, tuple[str, ...]]] = _load()  # skill -> language -> templates


def questions(skill: str, language: str, part: tuple[float, float] = (0.0, 1.0)) -> tuple[str, ...]:
    """The templates of a skill in a language; `part` keeps those between two shares of the list, and the first always
    counts as the first part."""
    templates = PHRASINGS[skill][language]
    start, stop = (max(share > 0, round(len(templates) * share)) for share in part)
    return templates[start:stop]
