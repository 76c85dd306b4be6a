"""Drawings by matplotlib as inline SVG. Colours are the page's own variables, so that they follow light and dark.

The browser sets the texts in its own fonts, which know Chinese. Room for names is measured here by their width in
columns, since matplotlib would measure characters that its font doesn't hold as small boxes.
"""

import io
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from slmfast.reporting.document import printable

WIDTH = 5.7  # inches: 410 px, which a phone shows almost in full size
NAME_COLUMNS = 28  # a longer name is cut
INCHES_A_COLUMN = 0.083  # of a name at FONT_SIZE
FONT_SIZE = 11
LEGEND_MARK = 0.4  # inches of a legend's entry beside its name
SMOOTHED_POINTS = 60  # a longer curve gets a moving average over it

# Stand-ins for the page's colours in what matplotlib writes.
INK, LINE = "#0a0b01", "#0a0b02"
SERIES = [f"#0a0b1{i}" for i in range(6)]
_COLOURS = {INK: "currentColor", LINE: "var(--line)"} | {colour: f"var(--c{i})" for i, colour in enumerate(SERIES)}

_STYLE: dict[str, Any] = {
    "font.size": FONT_SIZE,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.unicode_minus": False,
    "figure.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "slmfast",
}


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str) -> str:
    """Lines of y over whole x by name. A long line is drawn faint, with its moving average over it."""
    with rc_context(_STYLE):
        figure = _figure(2.9)
        axes = figure.add_subplot()
        for colour, (name, (x, y)) in zip(SERIES[1:] + SERIES[:1], series.items(), strict=False):
            faint = len(y) > SMOOTHED_POINTS
            marker = "." if len(y) == 1 else None
            axes.plot(x, y, color=colour, linewidth=1.6, alpha=0.35 if faint else 1.0, marker=marker)
            if faint:
                width = len(y) // 20
                axes.plot(x[width - 1 :], np.convolve(y, np.full(width, 1 / width), "valid"), color=colour)
            axes.plot([], [], color=colour, label=printable(name))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        _legend(figure, axes, len(series))
        return _svg(figure)


def bands(
    series: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    ticks: Mapping[float, str] | None = None,
) -> str:
    """Lines of y over x by name, (x, y, error), each with a band of one error to both sides.

    Args:
        ticks: the places of a logarithmic x axis with their names, each marked on the lines; plain and unmarked if not
            given.
    """
    with rc_context(_STYLE):
        figure = _figure(2.9)
        axes = figure.add_subplot()
        for i, (name, (x, y, error)) in enumerate(series.items()):
            colour = SERIES[(i + 1) % len(SERIES)]
            middle, half = np.asarray(y, dtype=np.float64), np.asarray(error, dtype=np.float64)
            axes.fill_between(x, middle - half, middle + half, color=colour, alpha=0.22, linewidth=0)
            axes.plot(x, middle, color=colour, linewidth=1.6, marker="o" if ticks else None, markersize=4)
            axes.plot([], [], color=colour, label=printable(name))
        if ticks:
            axes.set_xscale("log")
            axes.set_xticks(list(ticks), list(ticks.values()))
            axes.minorticks_off()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _legend(figure, axes, len(series))
        return _svg(figure)


def bars(
    names: Sequence[str],
    series: Mapping[str, Sequence[float]],
    x_label: str,
    errors: Mapping[str, Sequence[float]] | None = None,
    colours: Sequence[int] = range(len(SERIES)),
) -> str:
    """Horizontal bars: for each name, from the top, one bar of every series, with its error to both sides if given.

    Args:
        errors: one for each value; NaN draws none.
        colours: of the series, numbers of the page's.
    """
    with rc_context(_STYLE):
        thickness = 0.8 / len(series)
        figure, axes = _named_rows(names, 0.17 * len(series) + 0.12)
        for i, (label, values) in enumerate(series.items()):
            places = np.arange(len(names)) - 0.4 + thickness * (i + 0.5)
            colour = SERIES[colours[i]]
            axes.barh(places, values, thickness * 0.92, color=colour, label=label)
            if errors is not None:
                axes.errorbar(values, places, xerr=errors[label], fmt="none", ecolor=INK, elinewidth=1.1, capsize=2)
        axes.set_xlabel(x_label)
        _legend(figure, axes, len(series))
        return _svg(figure)


def stacked_bars(names: Sequence[str], parts: Mapping[str, Sequence[float]], x_label: str) -> str:
    """Horizontal bars that are made of parts, one bar for each name."""
    with rc_context(_STYLE):
        figure, axes = _named_rows(names, 0.36)
        left = np.zeros(len(names))
        for colour, (label, values) in zip([SERIES[3], SERIES[5], SERIES[2], SERIES[0]], parts.items(), strict=False):
            axes.barh(np.arange(len(names)), values, 0.62, left=left, color=colour, label=label)
            left += values
        axes.set_xlabel(x_label)
        _legend(figure, axes, len(parts))
        return _svg(figure)


def points(names: Sequence[str], series: Mapping[str, Sequence[tuple[float, float]]], x_label: str) -> str:
    """One row a name with a point of every series, (value, error), the error as a bar to both sides."""
    with rc_context(_STYLE):
        figure, axes = _named_rows(names, 0.14 * len(series) + 0.14)
        for i, (label, values) in enumerate(series.items()):
            places = np.arange(len(names)) + 0.7 * ((i + 0.5) / len(series) - 0.5)
            middles, errors = np.array(values, dtype=np.float64).reshape(-1, 2).T
            colour = SERIES[i % len(SERIES)]
            axes.errorbar(middles, places, xerr=errors, fmt="o", markersize=4, color=colour, capsize=2, label=label)
        axes.set_xlabel(x_label)
        _legend(figure, axes, len(series))
        return _svg(figure)


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _named_rows(names: Sequence[str], row_height: float) -> tuple[Figure, Axes]:
    """A figure whose y axis is a list of names, the first on top, with room for all of them."""
    labels = [_cut(printable(name)) for name in names]
    room = max(map(_columns, labels), default=0) * INCHES_A_COLUMN + 0.15
    height = 1.0 + row_height * len(names)
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasSVG(figure)
    bottom = 0.52 / height
    axes = figure.add_axes((room / WIDTH, bottom, 1 - (room + 0.2) / WIDTH, 1 - 0.38 / height - bottom))
    axes.set_yticks(range(len(names)), labels)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    return figure, axes


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _cut(name: str) -> str:
    name = " ".join(name.split())
    if _columns(name) <= NAME_COLUMNS:
        return name
    while _columns(name) >= NAME_COLUMNS:
        name = name[:-1]
    return name + "…"


def _legend(figure: Figure, axes: Axes, count: int) -> None:
    if count > 1:
        constrained = figure.get_layout_engine() is not None
        options = {"loc": "outside upper left"} if constrained else {"loc": "upper left", "bbox_to_anchor": (0.0, 1.0)}
        handles, labels = axes.get_legend_handles_labels()
        columns = int(WIDTH / (max(map(_columns, labels)) * INCHES_A_COLUMN + LEGEND_MARK))
        options |= {"ncols": max(1, min(count, columns)), "columnspacing": 1.2, "handlelength": 1.3}
        figure.legend(handles, labels, borderaxespad=0.2, **options)


_FONT = re.compile(r"font: ([\d.]+)px [^;\"]*")


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element for the inside of a page."""
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser has fonts of its own
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    head, body = file.getvalue().partition("<svg")[2].strip().split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', head).group()  # without width and height, the page decides the size
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL).replace("xlink:href", "href")
    body = _FONT.sub(r"font-size: \1px; font-family: inherit", body)
    for stand_in, colour in _COLOURS.items():
        body = body.replace(stand_in, colour)
    return f"<svg {view_box}>{body}"
