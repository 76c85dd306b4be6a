"""A document as one self-contained HTML page: no scripts, nothing loaded from anywhere, every text escaped."""

import hashlib
import re
from collections.abc import Callable
from html import escape
from typing import Any

from slmfast.reporting.document import Block, Code, Document, Example, Plot, Reply, Section, Table, Text, printable
from slmfast.reporting.page_style import CSS

# The browser itself is told to load nothing, should anything ever slip through. The empty icon keeps it from asking.
HEAD = f"""<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<style>
{CSS}
</style>"""


def render_html(document: Document) -> str:
    """The whole page as text."""
    links = "".join(f'<li><a href="#{s.anchor}">{_text(s.title)}</a></li>' for s in document.sections)
    note = f'<p class="note" role="note">{_text(document.note)}</p>\n' if document.note else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{HEAD}\n<title>{_text(document.title)}</title>\n</head>\n<body>\n'
        f'<header>\n<h1>{_text(document.title)}</h1>\n<p class="subtitle">{_text(document.subtitle)}</p>\n{note}'
        f"<nav><ul>{links}</ul></nav>\n</header>\n<main>\n"
        + "\n".join(_section(section) for section in document.sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _text(text: str) -> str:
    return escape(printable(text))


def _section(section: Section) -> str:
    blocks = "\n".join(_RENDERERS[type(block)](block) for block in section.blocks)
    return f'<section>\n<h2 id="{section.anchor}">{_text(section.title)}</h2>\n{blocks}\n</section>'


def _paragraph(block: Text) -> str:
    return f"<p>{_text(block.text)}</p>"


def _table(block: Table) -> str:
    def cells(row: Any, tag: str) -> str:
        words = [' class="words"' if i < block.text_columns else "" for i in range(len(row))]
        return "".join(f"<{tag}{kind}>{_text(cell)}</{tag}>" for cell, kind in zip(row, words, strict=True))

    rows = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in block.rows)
    return (
        f'<div class="scroll"><table>\n<caption>{_text(block.caption)}</caption>\n'
        f"<thead><tr>{cells(block.header, 'th')}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def _plot(block: Plot) -> str:
    # A page holds many drawings, and matplotlib gives the parts of all of them the same identifiers.
    own = "p" + hashlib.blake2b(block.caption.encode(), digest_size=6).hexdigest()
    svg = re.sub(r'\bid="', f'id="{own}-', block.svg)
    svg = svg.replace("url(#", f"url(#{own}-").replace('href="#', f'href="#{own}-')
    caption = _text(block.caption)
    return f'<figure role="img" aria-label="{caption}">\n{svg}\n<figcaption>{caption}</figcaption>\n</figure>'


def _code(block: Code) -> str:
    body = f"<pre>{_text(block.text)}</pre>"
    if block.folded:
        return f"<details><summary>{_text(block.caption)}</summary>\n{body}\n</details>"
    return f"<p>{_text(block.caption)}</p>\n{body}"


def _example(block: Example) -> str:
    replies = "\n".join(_reply(reply) for reply in block.replies)
    return f"<article>\n<h3>{_text(block.heading)}</h3>\n<pre>{_text(block.prompt)}</pre>\n{replies}\n</article>"


def _reply(reply: Reply) -> str:
    kind = escape(reply.fate.split(":")[0].split()[0]) if reply.fate else ""
    fate = f' <span class="fate {kind}">{_text(reply.fate)}</span>' if reply.fate else ""
    head = f'<strong>{_text(reply.origin)}</strong>{fate} <span class="rating">{_text(reply.rating)}</span>'
    return f'<div class="reply">{head}\n<pre>{_text(reply.text)}</pre></div>'


_RENDERERS: dict[type[Block], Callable[[Any], str]] = {
    Text: _paragraph,
    Table: _table,
    Plot: _plot,
    Code: _code,
    Example: _example,
}
