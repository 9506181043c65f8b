"""Beam search next to scoring every item."""

from __future__ import annotations

from tiger.report.figures import interval_dots, picture, wilson
from tiger.report.finished import FinishedRun
from tiger.report.markup import Html, figure

TITLE = "Beam search and exact search"


def render(run: FinishedRun) -> Html | None:
    """Return Recall@10 by width of the beam; None if the model needs no search, or it was not compared."""
    found = dict(run.result.exact_search)
    users = int(found.pop("users", 0))
    if not users or not found:
        return None
    names = ["every item scored" if name == "exact" else f"beam of {name.partition('_')[2]}" for name in found]
    with picture("Recall@10 by beam", width=6, height=0.8 + 0.35 * len(names)) as drawn:
        interval_dots(drawn.axes[0], names, list(found.values()), [wilson(value, users) for value in found.values()])
        drawn.axes[0].set(title=f"recall@10 of {users:,} test users")
    return figure(drawn.svg, "If a beam is as good as scoring every item, a wider one gains nothing.")
