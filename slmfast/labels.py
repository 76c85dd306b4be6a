"""What a labelling model said -> one label "Primary-Secondary" in one spelling, or None.

The first line that holds anything counts. It is split at its first hyphen or dash, whatever its width; both parts lose
quotes, bullets, numbers and names of fields, and take one width (NFKC), one capitalisation and, through an alias file,
one name.
"""

import functools
import re
import unicodedata
from importlib import resources
from pathlib import Path

import yaml

from slmfast.errors import UserError
from slmfast.yaml_text import load_yaml

MAX_PART_WORDS = 6  # more is a sentence
MAX_PART_CHARACTERS = 60
MAX_REPLY_CHARACTERS = 2000  # of a reply are looked at

# Unicode's dash punctuation, and what is taken for a dash: minus, hyphen bullet, box-drawing lines.
_DASHES = "\\-\u058a\u2010-\u2015\u2043\u2212\u2500\u2501\u2e3a\u2e3b\u301c\u3030\ufe31\ufe32\ufe58\ufe63\uff0d"
_SPLIT = re.compile(f"[{_DASHES}]+")
_INVISIBLE = re.compile(r"[\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufe0f\ufeff]")
_BULLET = re.compile(rf"^(?:[\s*#>•·●{_DASHES}]+|\(?\d{{1,2}}[.)、:](?!\d)\s*)+")
_SIDE = (
    r"(?:(?:primary|secondary|first|second|main|sub)[\s-]*(?:level\s*)?(?:category|class|label)"
    r"|[一二]级(?:分类|类别|标签))"
)
_FIELD = re.compile(
    rf"^(?:{_SIDE}(?:\s*[{_DASHES}/]+\s*{_SIDE})?|(?:(?:the|output|final|classification|category)\s+)*"
    r"(?:label|category|classification|answer|output)|(?:二级)?(?:分类)?标签|类别|分类|答案|输出)\s*(?:is\b\s*:?|[:=]|是)\s*",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(rf"{_SIDE}|category|label|标签|类别|分类", re.IGNORECASE)
_REFUSAL = re.compile(
    r"(?:sorry|unfortunately|as an ai|i'm|(?:i|we) (?:can|can't|cannot|am|will|do|don't|must|would|apologi[sz]e))\b"
    r"|抱歉|对不起|无法|我",
    re.IGNORECASE,
)
_BEFORE = re.compile(r"^[\W_]+")
_AFTER = re.compile(rf"[\s{_DASHES}\"'`*_“”‘’「」『』《》〈〉【】\[\]{{}}()<>.,;:!?。、|/\\~]+$")
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")


class LabelParser:
    """Parses label replies under one alias file, by default the package's own."""

    def __init__(self, aliases: str | Path | None = None) -> None:
        """Raises UserError for an alias file that can't be read or has another shape."""
        raw = _load_aliases(aliases)
        self._words = {word.casefold(): word for word in raw["words"]}
        self._parts = {_key(alias): name for alias, name in raw["parts"].items()}

    def parse(self, reply: str) -> str | None:
        """The label "Primary-Secondary" that a reply gives, or None where it gives none."""
        line = _first_line(reply)
        if line is None:
            return None
        sides = _SPLIT.split(_strip_field(line), maxsplit=1)
        if len(sides) != 2:
            return None
        primary, secondary = (self._clean(side) for side in sides)
        if primary is None or secondary is None or _REFUSAL.match(primary):
            return None
        return f"{primary}-{secondary}"

    def _clean(self, side: str) -> str | None:
        text = " ".join(_AFTER.sub("", _strip_field(side)).split())
        if not _WORD.search(text) or _PLACEHOLDER.fullmatch(text):
            return None
        if len(text) > MAX_PART_CHARACTERS or len(text.split()) > MAX_PART_WORDS:
            return None
        return self._parts.get(_key(text)) or self._capitalise(text)

    def _capitalise(self, text: str) -> str:
        def spell(match: re.Match[str]) -> str:
            word = match[0]
            known = self._words.get(word.casefold())
            if known is None or (known.islower() and match.start() == 0):
                return word.capitalize()
            return known

        return _WORD.sub(spell, text)


def parse_label(reply: str) -> str | None:
    """The label "Primary-Secondary" of a labelling model's reply, or None where it can't be read."""
    return _default_parser().parse(reply)


@functools.cache
def _default_parser() -> LabelParser:
    return LabelParser()


def _first_line(reply: str) -> str | None:
    text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", reply[:MAX_REPLY_CHARACTERS]))
    return next((line.strip() for line in text.splitlines() if _WORD.search(line)), None)


def _strip_field(text: str) -> str:
    """Takes off what a model puts before its answer: bullets, numbers, quotes, and the name of the field."""
    while True:
        stripped = _FIELD.sub("", _BEFORE.sub("", _BULLET.sub("", text)))
        if stripped == text:
            return text
        text = stripped


def _key(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _load_aliases(path: str | Path | None) -> dict:
    file = resources.files("slmfast") / "data" / "label_aliases.yaml" if path is None else Path(path)
    try:
        raw = load_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"alias file {file} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict) or set(raw) != {"version", "words", "parts"} or raw["version"] != 1:
        raise UserError(f"alias file {file}: give version: 1, words (a list) and parts (a mapping), nothing else")
    strings = isinstance(raw["words"], list) and isinstance(raw["parts"], dict)
    if not strings or not all(isinstance(x, str) for x in [*raw["words"], *raw["parts"], *raw["parts"].values()]):
        raise UserError(f"alias file {file}: words is a list of strings, parts a mapping of strings to strings")
    return raw
