"""A report before it has a form: sections of texts, tables, plots and examples. The pages escape all that is in it."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

NOTHING = "–"  # in a cell without a figure
LANGUAGES = {"zh": "Chinese", "en": "English", "other": "other"}  # as records name them, and in words

# What HTML may not hold at all, not even escaped: controls but for tab and newline, lone surrogates, non-characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells. The first `text_columns` columns are words, the others are figures."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1

    def __post_init__(self) -> None:
        odd = [row for row in self.rows if len(row) != len(self.header)]
        if odd:
            raise ValueError(f"table {self.caption!r} has {len(self.header)} columns but a row {odd[0]!r}")


@dataclass(frozen=True)
class Plot:
    """A drawing as an SVG element (see plots.py), the one thing that a page takes over unescaped.

    The caption tells a document's drawings apart, so no two have the same.
    """

    caption: str
    svg: str


@dataclass(frozen=True)
class Code:
    """Text that is shown as it is, letter for letter; a long one is folded under its caption."""

    caption: str
    text: str
    folded: bool = False


@dataclass(frozen=True)
class Reply:
    """One reply of an example: who wrote it, what it was rated, and what became of it."""

    origin: str
    text: str
    rating: str
    fate: str = ""


@dataclass(frozen=True)
class Example:
    """One instruction with its replies."""

    heading: str
    prompt: str
    replies: Sequence[Reply]


Block = Text | Table | Plot | Code | Example


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """The heading as an identifier."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    subtitle: str
    note: str | None  # stands above all figures
    sections: Sequence[Section] = field(default_factory=list)


def whole(value: int | None) -> str:
    """A count with thousands separated."""
    return NOTHING if value is None else f"{value:,}"


def decimal(value: float | None, digits: int = 3) -> str:
    """A figure with a fixed number of decimals, never -0.000; what is missing or not finite is a dash."""
    return NOTHING if value is None or not math.isfinite(value) else f"{round(value, digits) + 0.0:.{digits}f}"


def percent(part: float | None, total: float = 1.0) -> str:
    """A share of a total in per cent."""
    return NOTHING if part is None or not total else f"{100 * part / total:.1f} %"


def with_error(value: float | None, error: float | None, *, signed: bool = False) -> str:
    """A figure and its standard error, three decimals each."""
    text = decimal(value)
    if signed and value is not None and text != NOTHING:
        text = f"{round(value, 3) + 0.0:+.3f}"
    return text if error is None or text == NOTHING or not math.isfinite(error) else f"{text} ± {error:.3f}"


def printable(text: str) -> str:
    """The text with plain line ends, and a replacement character for each character that no page can show."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n").replace("\r", "\n"))


def shortened(text: str, limit: int) -> str:
    """The beginning of a long text, with a word on how much was left out."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]} … ({len(text) - limit:,} more characters)"
