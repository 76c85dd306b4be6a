"""Near-duplicates of a prompt that ask for the same: other widths, case or spaces, a slip of the pen, a copy."""

from random import Random

from slmfast.miniature.skills import Item

_TO_FULL_WIDTH = {ord(c): ord(c) + 0xFEE0 for c in '0123456789?,:+-*=()."'}
_TO_HALF_WIDTH = {ord("？"): "?", ord("："): ":", ord("，"): ",", ord("！"): "!"}
_CASE_MATTERS = ("first_letter", "last_letter", "reverse", "repeat", "code_string", "letter_count")


def near_copy(item: Item, text: str, rng: Random) -> str | None:
    """A text that SimHash can take for the same, or the very same; None where the drawn kind does not suit the text.

    All kinds but the edits of long texts are equal after NFKC and lower-casing.
    """
    if item.context and rng.random() < 0.7:
        return _edited(text, len(item.context), item.language, rng)
    copy = rng.choice((_full_width, _half_width, _upper, _ideographic_space, str))(text)
    if copy != text and copy.casefold() == text.casefold() and item.skill in _CASE_MATTERS:
        return None
    return copy if copy != text or rng.random() < 0.5 else None


def _full_width(text: str) -> str:
    return text.translate(_TO_FULL_WIDTH)


def _half_width(text: str) -> str:
    return text.translate(_TO_HALF_WIDTH)


def _upper(text: str) -> str:
    return text.upper()


def _ideographic_space(text: str) -> str:
    return text.replace(" ", "　")


def _edited(text: str, context: int, language: str, rng: Random) -> str:
    """One to three slips in the story, far from the question: a letter doubled, changed or left out."""
    letters = "abcdefghijklmnopqrstuvwxyz" if language == "en" else "的了着在和是不有"
    characters = list(text)
    places = [i for i in range(context - 1) if characters[i].isalpha()]
    for place in rng.sample(places, rng.randint(1, 3)):
        characters[place] = rng.choice(("", characters[place] * 2, rng.choice(letters)))
    return "".join(characters)
