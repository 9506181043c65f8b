"""Figures as SVG for an HTML page: matplotlib, with colors that follow the page's light or dark mode.

Ink, muted ink and grid lines are drawn in three colors that no data have; in the SVG they become variables of the page.
Text stays text, so that it is set in the page's font, can be searched, and is small.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID = "#010203", "#010204", "#010205"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}

COLORS = ("#2f7fd0", "#e0812c", "#2ea36a", "#a066d3", "#c9507e", "#8a8f98", "#b59a1d", "#1fa5a5")
"""Colors of methods and levels: legible on white and on near-black."""

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLORS),
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "image.cmap": "viridis",
}


class Picture:
    """A figure with its axes, and the SVG after it was drawn."""

    def __init__(self, figure: Figure, axes: list[Axes]) -> None:
        self.figure, self.axes, self.svg = figure, axes, ""


@contextmanager
def picture(
    label: str, rows: int = 1, columns: int = 1, width: float = 9.0, height: float = 3.0, **layout: Any
) -> Iterator[Picture]:
    """Open a figure to draw on; when the block ends, `svg` is set.

    Args:
        label: what the figure shows, for readers who do not see it; also makes its ids unique in the page.
        rows: rows of axes.
        columns: columns of axes.
        width: in inches; the page scales it down.
        height: in inches.
        **layout: further arguments of `Figure.subplots`.
    """
    style: Any = {**_STYLE, "svg.hashsalt": label}
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        drawn = Picture(figure, list(np.ravel(figure.subplots(rows, columns, **layout))))
        yield drawn
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", dpi=150, transparent=True, metadata={"Date": None, "Creator": None})
    drawn.svg = _for_page(buffer.getvalue().decode(), label)


def _for_page(svg: str, label: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)  # the page's font
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escaped}" ', 1)


def standalone(svg: str) -> str:
    """Return a figure as a file of its own: with colors for light and dark mode in place of the page's."""
    light, dark = "--ink:#1c2128;--muted:#59636e;--grid:#d9dee3", "--ink:#e6edf3;--muted:#9aa4af;--grid:#30363d"
    style = f"<style>svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    begin = svg.index(">", svg.index("<svg ")) + 1
    return f"{svg[:begin]}{style}{svg[begin:]}"


def interval_dots(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    colors: Sequence[str] | None = None,
) -> None:
    """Draw one row per method: its value as a dot and its interval as a line; the first method on top.

    Args:
        axes: where to draw.
        names: one per method.
        values: one per method.
        intervals: ends of the interval of each value.
        colors: one per method; None: the first method stands out from gray ones.
    """
    colors = colors or (COLORS[0], *[COLORS[5]] * (len(names) - 1))
    for row, (value, (low, high), color) in enumerate(zip(values, intervals, colors, strict=True)):
        axes.plot([low, high], [row, row], color=color, linewidth=3, solid_capstyle="butt", alpha=0.55)
        axes.plot([value], [row], "o", color=color, markersize=7)
        axes.annotate(f"{value:.4f}", (high, row), xytext=(6, 0), textcoords="offset points", va="center", color=INK)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.margins(x=0.15)
    axes.grid(axis="y", visible=False)


def wilson(fraction: float, count: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a fraction of `count` users."""
    z = 1.96
    center = (fraction + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(fraction * (1 - fraction) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return float(max(0.0, center - half)), float(min(1.0, center + half))
