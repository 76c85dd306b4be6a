"""Which of 50 categories an instruction belongs to, by an ordered list of rules in YAML.

The source may decide by itself; else the first rule whose pattern is found decides, and a catch-all takes the rest.
An instruction says what it wants at its beginning, or at its end, after the text that it is about: patterns see the
first 300 and the last 120 characters, lower-cased and of one width, and nothing between them.
"""

import itertools
import re
import string
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import yaml

from slmfast import _native
from slmfast.arrow_texts import native_texts
from slmfast.errors import UserError
from slmfast.rule_literals import needs
from slmfast.yaml_text import load_yaml

NUMBER_OF_CATEGORIES = 50
HEAD_CHARACTERS = 300
TAIL_CHARACTERS = 120
CATCH_ALL_RULE = "catch-all"

# A few Han characters make a text Chinese here, however much there is of another language to be worked on.
_CHINESE = re.compile("[\u3400-\u9fff](?:[^\u3400-\u9fff]*[\u3400-\u9fff]){3}")
# Full-width letters, digits and operators -> ASCII; punctuation stays what it is, for patterns speak of it.
_NARROW = {ord(narrow) + 0xFEE0: narrow for narrow in string.ascii_letters + string.digits + "+-=*/%<>"}
_WIDE = re.compile(f"[{''.join(map(chr, _NARROW))}]")
_RULE_KEYS = {"id", "category", "pattern", "lang"}


class _Rule(NamedTuple):
    id: str
    category: str
    pattern: re.Pattern[str]
    lang: str | None  # zh: only Chinese texts; en: only texts that are not Chinese; None: all


class Categorizer:
    """The compiled rules of one rule file, by default the package's own.

    Attributes: `version` of the rules, `categories` in the file's order.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        """Raises UserError, naming file and rule, for rules that can't work."""
        file = resources.files("slmfast") / "data" / "categories.yaml" if path is None else Path(path)
        raw = _load(file)
        self.version: int = raw["version"]
        self.categories: list[str] = raw["categories"]
        self._catch_all = raw["catch_all"], CATCH_ALL_RULE
        self._sources = {name: (category, f"source:{name}") for name, category in raw.get("sources", {}).items()}
        rules = [_compile_rule(rule, file, set(self.categories)) for rule in raw["rules"]]
        _check_ids(rules, file)
        self._zh = _RuleList([rule for rule in rules if rule.lang != "en"])
        self._en = _RuleList([rule for rule in rules if rule.lang != "zh"])

    def categorize(self, source: str, text: str) -> tuple[str, str]:
        """The category of a prompt's text, and the id of the rule that gave it."""
        return self.categorize_all([source], [text])[0]

    def categorize_all(self, sources: Sequence[str], texts: Sequence[str]) -> list[tuple[str, str]]:
        """What `categorize` says of each of many texts, at a fraction of its cost."""
        answers = [self._sources.get(source, self._catch_all) for source in sources]
        asked: dict[bool, list[tuple[int, str]]] = {False: [], True: []}
        for i, (source, text) in enumerate(zip(sources, texts, strict=True)):
            if source not in self._sources:
                window = _window(text)
                chinese = not window.isascii() and _CHINESE.search(window) is not None
                asked[chinese].append((i, window))
        for rules, rows in ((self._zh, asked[True]), (self._en, asked[False])):
            for (i, _), answer in zip(rows, rules.first([window for _, window in rows]), strict=True):
                answers[i] = answer or self._catch_all
        return answers


class _RuleList:
    """The rules for one kind of text. A literal filter finds those that may match, which are few: a search of all of
    them takes ten times as long."""

    def __init__(self, rules: list[_Rule]) -> None:
        self._searches = [(rule.pattern.search, (rule.category, rule.id)) for rule in rules]
        alternatives = [needs(rule.pattern.pattern, re.MULTILINE) for rule in rules]
        self._filter = _native.LiteralFilter([[[_utf8(clause) for clause in a] for a in rule] for rule in alternatives])

    def first(self, windows: list[str]) -> Iterable[tuple[str, str] | None]:
        """For each text the answer of the first rule that matches, or None."""
        column = pa.array(_utf8(windows), pa.large_binary()).view(pa.large_string())
        offsets, numbers = self._filter.candidates(native_texts(pa.chunked_array([column])))
        bounds, candidates = offsets.tolist(), numbers.tolist()
        for window, (begin, end) in zip(windows, itertools.pairwise(bounds), strict=True):
            yield self._first(window, candidates[begin:end])

    def _first(self, window: str, candidates: list[int]) -> tuple[str, str] | None:
        for number in candidates:
            search, answer = self._searches[number]
            if search(window):
                return answer
        return None


def _utf8(texts: Iterable[str]) -> list[bytes]:
    return [text.encode("utf-8", "surrogatepass") for text in texts]


def _window(text: str) -> str:
    if len(text) > HEAD_CHARACTERS + TAIL_CHARACTERS:
        text = f"{text[:HEAD_CHARACTERS]}…{text[-TAIL_CHARACTERS:]}"
    return (text.translate(_NARROW) if not text.isascii() and _WIDE.search(text) else text).lower()


def _load(file: Any) -> dict[str, Any]:
    try:
        raw = load_yaml(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no rule file at {file}: correct categorize.rules, or leave it out") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"rule file {file} is not readable YAML: {' '.join(str(error).split())}") from error
    required = {"version", "categories", "catch_all", "rules"}
    if not isinstance(raw, dict) or not required <= set(raw) <= required | {"sources"}:
        raise UserError(f"rule file {file}: give version, categories, catch_all, rules and perhaps sources")
    _check_shapes(raw, file)
    return raw


def _check_shapes(raw: dict[str, Any], file: Any) -> None:
    if not isinstance(raw["version"], int) or isinstance(raw["version"], bool):
        raise UserError(f"rule file {file}: version {raw['version']!r} is not a whole number: give one, and raise it")
    names = raw["categories"]
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"rule file {file}: categories must be a list of names")
    if len(names) != NUMBER_OF_CATEGORIES or len(set(names)) != len(names):
        raise UserError(f"rule file {file}: {len(set(names))} different categories: give {NUMBER_OF_CATEGORIES}")
    if raw["catch_all"] not in names:
        raise UserError(f"rule file {file}: catch_all {raw['catch_all']!r} is not among the categories: add it there")
    sources = raw.get("sources", {})
    if not isinstance(sources, dict):
        raise UserError(f"rule file {file}: sources must map the names of sources to categories")
    for name, category in sources.items():
        if category not in names:
            raise UserError(f"rule file {file}: source {name}: no category {category!r}: add it to categories")
    if not isinstance(raw["rules"], list):
        raise UserError(f"rule file {file}: rules must be a list")


def _compile_rule(rule: Any, file: Any, categories: set[str]) -> _Rule:
    if not isinstance(rule, dict) or not {"id", "category", "pattern"} <= set(rule) <= _RULE_KEYS:
        name = rule.get("id", rule) if isinstance(rule, dict) else rule
        raise UserError(f"rule file {file}: rule {name!r}: give id, category, pattern and perhaps lang, nothing else")
    where = f"rule file {file}: rule {rule['id']!r}"
    if not all(isinstance(rule[name], str) for name in ("id", "category", "pattern")):
        raise UserError(f"{where}: id, category and pattern must be text: put them in quotes")
    if rule["category"] not in categories:
        raise UserError(f"{where}: no category {rule['category']!r}: add it to categories")
    if rule.get("lang") not in (None, "zh", "en"):
        raise UserError(f"{where}: lang {rule['lang']!r} is not known: use zh or en, or leave it out")
    try:
        pattern = re.compile(rule["pattern"], re.MULTILINE)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{where}: the pattern is no regular expression: {error}") from error
    if pattern.search(""):
        raise UserError(f"{where}: the pattern matches any text: no later rule would ever be tried")
    return _Rule(rule["id"], rule["category"], pattern, rule.get("lang"))


def _check_ids(rules: list[_Rule], file: Any) -> None:
    seen: set[str] = set()
    for rule in rules:
        if rule.id in seen or rule.id == CATCH_ALL_RULE or rule.id.startswith("source:"):
            raise UserError(f"rule file {file}: rule {rule.id!r}: the id is taken: give the rule one of its own")
        seen.add(rule.id)
