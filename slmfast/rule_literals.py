"""Which literals a regular expression can't match without, so that most texts need not be searched for it.

A pattern's needs are alternatives, one of which must hold; an alternative is clauses, all of which must hold; a clause
is literals, one of which must occur in the text. Needs are necessary and seldom sufficient: where they are met, the
pattern still has to be searched for. What is not understood needs nothing.
"""

import functools
import re
import re._constants as op  # the only view of a parsed pattern that there is
import re._parser
import sys
from collections.abc import Iterable
from typing import Any

Clause = frozenset[str]
Alternative = list[Clause]

_MOST_STRINGS = 256  # of a part of a pattern that is written out
_MOST_CHARACTERS = 24  # of a set of characters that is written out
_MOST_COPIES = 8  # of a part that is repeated
_BLIND_FLAGS = re.IGNORECASE | re.LOCALE  # a literal then stands for more than itself
_ZERO_WIDTH = (op.AT, op.ASSERT, op.ASSERT_NOT)
_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT)


def needs(pattern: str, flags: int = 0) -> list[Alternative]:
    """The needs of a pattern: at least one alternative. Raises re.error for what is no pattern."""
    parsed = re._parser.parse(pattern, flags)
    if parsed.state.flags & _BLIND_FLAGS:
        return [[]]
    parts = list(parsed)
    branches = [i for i, (kind, _) in enumerate(parts) if kind is op.BRANCH]
    if len(branches) != 1:
        return [_clauses(parts)]
    at = branches[0]
    return [_clauses([*parts[:at], *alternative, *parts[at + 1 :]]) for alternative in parts[at][1][1]]


def _clauses(parts: Iterable[Any]) -> Alternative:
    """What a sequence needs. Neighbours that can be written out are joined, any other part has needs of its own."""
    found: list[Clause] = []
    run = frozenset([""])
    for part in parts:
        strings = _strings(part)
        if strings is None or len(run) * len(strings) > _MOST_STRINGS:
            found += _clause(run)
            run = frozenset([""])
        if strings is None:
            found += _inner(part)
        else:
            run = _product(run, strings)
    return found + _clause(run)


def _clause(strings: frozenset[str]) -> list[Clause]:
    """The clause that one of these strings occurs: none where one of them is empty, and so in every text."""
    if "" in strings:
        return []
    return [frozenset(s for s in strings if not any(s[i:j] in strings for i, j in _inside(len(s))))]


@functools.cache
def _inside(length: int) -> list[tuple[int, int]]:
    """Where the proper parts of a string begin and end."""
    return [(i, j) for i in range(length) for j in range(i + 1, length + 1) if j - i < length]


def _inner(part: tuple[Any, Any]) -> list[Clause]:
    """What a part needs that can't be written out."""
    kind, value = part
    if kind is op.BRANCH:
        best = [max(_clauses(alternative), key=_telling, default=None) for alternative in value[1]]
        return [] if None in best else _clause(frozenset().union(*best))
    if kind in _REPEATS:
        least, _, repeated = value
        return _clauses([*repeated] * min(least, _MOST_COPIES))
    if kind is op.IN and (op.CATEGORY, op.CATEGORY_DIGIT) in value:
        rest = _strings((op.IN, [item for item in value if item != (op.CATEGORY, op.CATEGORY_DIGIT)]))
        return [] if rest is None else [_digits() | rest]
    return _clauses(group) if (group := _group(part)) is not None else []


def _telling(clause: Clause) -> tuple[int, int]:
    return min(map(len, clause)), -len(clause)


def _strings(part: tuple[Any, Any]) -> frozenset[str] | None:
    """All strings that a part may match; None where they are too many, or not known."""
    kind, value = part
    if kind is op.LITERAL:
        return frozenset([chr(value)])
    if kind in _ZERO_WIDTH:
        return frozenset([""])
    if kind is op.IN:
        return _characters(value)
    if kind is op.BRANCH:
        return _union(map(_sequence, value[1]))
    if kind in _REPEATS:
        least, most, repeated = value
        if most > _MOST_COPIES:
            return None
        return _union(_sequence([*repeated] * copies) for copies in range(least, most + 1))
    return _sequence(group) if (group := _group(part)) is not None else None


def _group(part: tuple[Any, Any]) -> Any:
    """The parts of a group under flags that change no literal's meaning."""
    kind, value = part
    if kind is op.SUBPATTERN:
        _, added, _, inner = value
        return None if added & _BLIND_FLAGS else inner
    return value if kind is op.ATOMIC_GROUP else None


def _characters(items: list[tuple[Any, Any]]) -> frozenset[str] | None:
    found: set[str] = set()
    for kind, value in items:
        if kind is op.LITERAL:
            found.add(chr(value))
        elif kind is op.RANGE and value[1] - value[0] < _MOST_CHARACTERS:
            found.update(map(chr, range(value[0], value[1] + 1)))
        else:
            return None
    return frozenset(found) if len(found) <= _MOST_CHARACTERS else None


def _sequence(parts: Iterable[Any]) -> frozenset[str] | None:
    run = frozenset([""])
    for part in parts:
        strings = _strings(part)
        if strings is None or len(run) * len(strings) > _MOST_STRINGS:
            return None
        run = _product(run, strings)
    return run


def _union(sets: Iterable[frozenset[str] | None]) -> frozenset[str] | None:
    found: set[str] = set()
    for strings in sets:
        if strings is None or len(found) + len(strings) > _MOST_STRINGS:
            return None
        found |= strings
    return frozenset(found)


def _product(first: frozenset[str], second: frozenset[str]) -> frozenset[str]:
    return frozenset(a + b for a in first for b in second)


@functools.cache
def _digits() -> Clause:
    return frozenset(c for c in map(chr, range(sys.maxunicode + 1)) if c.isdecimal())
