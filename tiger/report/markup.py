"""Pieces of HTML: tables, lists and numbers."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any


class Html(str):
    """Text that is HTML already."""


class Number(Html):
    """A number with its sign or unit, as HTML; tables align it as they do numbers."""


def escaped(value: Any) -> str:
    """Return a value as HTML: numbers with separators, text escaped, None and NaN as a dash."""
    if isinstance(value, Html):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "&ndash;"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value.is_integer() or abs(value) >= 10_000:
            return f"{value:,.0f}"
        return f"{value:.4f}" if 0.001 <= abs(value) < 1 else f"{value:.4g}"
    return html.escape(str(value))


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> Html:
    """Return a table; the columns after the first are aligned right, with their heads, if they have numbers."""
    given = [list(row) for row in rows]
    styles = [
        ' class="number"' if column and any(isinstance(row[column], (int, float, Number)) for row in given) else ""
        for column in range(len(heads))
    ]
    head = "".join(f"<th{style}>{escaped(name)}</th>" for name, style in zip(heads, styles, strict=True))
    body = [
        f"<tr>{''.join(f'<td{style}>{escaped(value)}</td>' for value, style in zip(row, styles, strict=True))}</tr>"
        for row in given
    ]
    return Html(f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>')


def details(summary: str, content: str) -> Html:
    """Return content that is folded until it is opened."""
    return Html(f"<details><summary>{escaped(summary)}</summary>{content}</details>")


def figure(svg: str, caption: str) -> Html:
    """Return a figure with its caption."""
    return Html(f"<figure>{svg}<figcaption>{escaped(caption)}</figcaption></figure>")


def paragraph(text: str) -> Html:
    """Return a paragraph; text between backticks is code."""
    content = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped(text))
    return Html(f"<p>{content}</p>")


def seconds(value: float) -> str:
    """Return a duration, such as 3 min 07 s."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def stage_name(kind: str) -> str:
    """Return the kind of an artifact as a reader knows it."""
    return "semantic IDs" if kind == "semantic_ids" else kind.replace("_", " ")


def method_name(name: str) -> str:
    """Return the name of a method as a reader knows it."""
    known = {"tiger": "TIGER", "sasrec": "SASRec", "markov_chain": "Markov chain", "popularity": "popularity",
             "nearest_neighbors": "nearest embeddings"}  # fmt: skip
    return known.get(name, name.replace("_", " "))
