"""Pieces of HTML: tables, lists and numbers."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any


class Html(str):
    """Text that is HTML already."""


def escaped(value: Any) -> str:
    """Return a value as HTML: numbers with separators, text escaped, None as a dash."""
    if isinstance(value, Html):
        return value
    if value is None:
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


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]], first_column: str = "left") -> Html:
    """Return a table; the columns after the first are aligned right if their values are numbers."""
    body = []
    for row in rows:
        cells = []
        for column, value in enumerate(row):
            numeric = isinstance(value, (int, float)) or (isinstance(value, Html) and value.startswith("<b>"))
            style = ' class="number"' if numeric and (column or first_column != "left") else ""
            cells.append(f"<td{style}>{escaped(value)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escaped(name)}</th>" for name in heads)
    return Html(f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>')


def details(summary: str, content: str) -> Html:
    """Return content that is folded until it is opened."""
    return Html(f"<details><summary>{escaped(summary)}</summary>{content}</details>")


def figure(svg: str, caption: str) -> Html:
    """Return a figure with its caption."""
    return Html(f"<figure>{svg}<figcaption>{escaped(caption)}</figcaption></figure>")


def paragraph(text: str) -> Html:
    """Return a paragraph."""
    return Html(f"<p>{escaped(text)}</p>")


def seconds(value: float) -> str:
    """Return a duration, such as 3 min 07 s."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def method_name(name: str) -> str:
    """Return the name of a method as a reader knows it."""
    known = {"tiger": "TIGER", "sasrec": "SASRec", "markov_chain": "Markov chain", "popularity": "popularity",
             "nearest_neighbors": "nearest embeddings"}  # fmt: skip
    return known.get(name, name.replace("_", " "))
