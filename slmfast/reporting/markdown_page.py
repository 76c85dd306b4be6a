"""A document as Markdown: the same texts, tables and examples; of a plot only its caption."""

import re
from collections.abc import Callable
from typing import Any

from slmfast.reporting.document import Block, Code, Document, Example, Plot, Section, Table, Text, printable

# What could begin markup, a link, an image or raw HTML.
_MARKUP = re.compile(r"([\\`*\[\]<>&|#])")


def render_markdown(document: Document) -> str:
    """The whole report as Markdown text."""
    parts = [f"# {_text(document.title)}", _text(document.subtitle)]
    if document.note:
        parts.append(f"> **{_text(document.note)}**")
    parts += [_section(section) for section in document.sections]
    return printable("\n\n".join(parts)) + "\n"


def _text(text: str) -> str:
    """One line of Markdown that shows `text` and nothing else."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))


def _section(section: Section) -> str:
    return "\n\n".join([f"## {_text(section.title)}", *(_RENDERERS[type(block)](block) for block in section.blocks)])


def _paragraph(block: Text) -> str:
    return _text(block.text)


def _table(block: Table) -> str:
    def line(cells: Any) -> str:
        return "| " + " | ".join(_text(cell) for cell in cells) + " |"

    rule = ["---" if i < block.text_columns else "---:" for i in range(len(block.header))]
    lines = [line(block.header), "| " + " | ".join(rule) + " |", *(line(row) for row in block.rows)]
    return f"{_text(block.caption)}\n\n" + "\n".join(lines)


def _plot(block: Plot) -> str:
    return f"*Plot in the HTML report: {_text(block.caption)}*"


def _code(block: Code) -> str:
    return f"{_text(block.caption)}\n\n{_fenced(block.text)}"


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _example(block: Example) -> str:
    parts = [f"### {_text(block.heading)}", _fenced(block.prompt)]
    for reply in block.replies:
        fate = f" **{_text(reply.fate)}**" if reply.fate else ""
        parts += [f"{_text(reply.origin)}:{fate} {_text(reply.rating)}", _fenced(reply.text)]
    return "\n\n".join(parts)


_RENDERERS: dict[type[Block], Callable[[Any], str]] = {
    Text: _paragraph,
    Table: _table,
    Plot: _plot,
    Code: _code,
    Example: _example,
}
