"""The tree of semantic IDs, with the words that tell its branches apart."""

from __future__ import annotations

from tiger.report.finished import FinishedRun
from tiger.report.markup import Html, paragraph
from tiger.report.semantic_ids import prefix_tree

TITLE = "What the codes mean"

_BRANCHES, _INNER, _TITLES = 40, 8, 3


def render(run: FinishedRun) -> Html | None:
    """Return the largest branches of the tree, to be opened."""
    if run.items is None:
        return None
    text = (
        "Each line is a prefix of codes: the number of items that share it, the words that occur more often in their "
        "titles than in others, and their most frequent category. Open a line for the codes below it. "
        "`tiger explore RUN --page tree.html` writes the whole tree."
    )
    widest = [_BRANCHES] + [_INNER] * (run.items.codes.shape[1] - 1)
    return Html(paragraph(text) + f'<div class="tree">{prefix_tree(run.items, examples=_TITLES, widest=widest)}</div>')
