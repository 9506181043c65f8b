"""The report of a run, and of two runs next to each other: one HTML file each, without scripts or further files.

A section is a module of `tiger.report.sections` with `TITLE` and `render(run)`, and an entry of `SECTIONS`. It returns
None if the run has nothing for it; the page names the sections that were left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import tiger
from tiger.report import comparison
from tiger.report.finished import FinishedRun
from tiger.report.markup import escaped
from tiger.report.sections import (
    beam_search,
    codes,
    costs,
    data,
    embedding_map,
    examples,
    groups,
    health,
    lineage,
    prefix_tree,
    results,
    summary,
    training,
)

SECTIONS: tuple[ModuleType, ...] = (
    summary, results, groups, examples, data, health, training, codes, embedding_map, prefix_tree, beam_search, costs,
    lineage,
)  # fmt: skip
"""The sections in the order of the page; a new one is a module and an entry."""

_STYLE = Path(__file__).with_name("style.css")


def render(run: FinishedRun) -> str:
    """Return the page of one run."""
    parts, left_out = [], []
    for section in SECTIONS:
        content = section.render(run)
        if content is None:
            left_out.append(section.TITLE)
        else:
            parts.append((section.TITLE, content))
    note = f"<p>Left out, because this run has nothing for it: {escaped(', '.join(left_out))}.</p>" if left_out else ""
    return _page(f"Report of {run.name}", run.evaluation.home.parent.uri, parts, note)


def render_comparison(first: FinishedRun, second: FinishedRun) -> str:
    """Return the page of two runs."""
    title = f"{first.name} and {second.name}"
    where = f"A: {first.evaluation.home.uri}, B: {second.evaluation.home.uri}"
    return _page(title, where, comparison.sections(first, second), "")


def _page(title: str, where: str, parts: Sequence[tuple[str, str]], note: str) -> str:
    names = [name for name, _ in parts]
    links = "".join(f'<a href="#{_anchor(name)}">{escaped(name)}</a>' for name in names)
    body = "".join(
        f'<section id="{_anchor(name)}"><h2>{escaped(name)}</h2>{content}</section>' for name, content in parts
    )
    made = time.strftime("%Y-%m-%d", time.gmtime())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escaped(title)}</title><style>{_STYLE.read_text('utf-8')}</style></head><body>"
        f"<header><h1>{escaped(title)}</h1>"
        f"<p>{escaped(where)} &middot; TIGER on Ray {tiger.__version__} &middot; {made}</p>"
        f"<nav>{links}</nav></header><main>{body}{note}</main></body></html>\n"
    )


def _anchor(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())
