"""What the catalog holds: counts, columns, lengths of histories, and how rarely items are bought."""

from __future__ import annotations

import numpy as np
from matplotlib.ticker import MaxNLocator

from tiger.report.figures import picture
from tiger.report.finished import FinishedRun
from tiger.report.markup import Html, figure, table

TITLE = "Data"


def render(run: FinishedRun) -> Html:
    """Return the profile of the catalog, and what was left out of it."""
    profile, histories = run.profile, run.catalog.histories
    counts = np.bincount(histories.items, minlength=run.catalog.n_items)
    with picture("Lengths of histories, and purchases per item", columns=2, height=2.7) as drawn:
        lengths, items = drawn.axes
        values = np.diff(histories.offsets)
        shown = values[values <= np.quantile(values, 0.99)]
        lengths.hist(shown, bins=[length - 0.5 for length in range(int(shown.min()), int(shown.max()) + 2)])
        lengths.set(title="Users by length of their history, without the longest 1 %", xlabel="items", ylabel="users")
        lengths.xaxis.set_major_locator(MaxNLocator(integer=True))
        items.plot(np.arange(1, len(counts) + 1), np.sort(counts)[::-1])
        items.set(title="Items by number of interactions", xlabel="rank of the item", ylabel="interactions")
        items.set(xscale="log", yscale="symlog", ylim=(0, None))
    size = [(name.replace("_", " "), profile[name]) for name in _COUNTS]
    dropped = [(f"dropped: {what}", count) for what, count in profile["dropped"].items()]
    rows = run.catalog.artifact.metrics["rows"]
    unreadable = [
        (f"rows of {name} that could not be read: {why}", count)
        for name, record in rows.items() for why, count in record.get("skipped", {}).items()
    ]  # fmt: skip
    columns = [(name, figures["distinct"], figures["missing"]) for name, figures in profile["columns"].items()]
    quantiles = [
        (name.replace("_", " "), *profile[name].values()) for name in ("history_length", "text_characters")
    ]  # fmt: skip
    return Html(
        figure(drawn.svg, "Counting says little about rarely bought items; for them the model relies on texts.")
        + '<div class="columns">'
        + table(["rows", "count"], [*size, *dropped, *unreadable])
        + table(["column", "distinct", "missing"], columns)
        + "</div>"
        + table(["quantile", *profile["history_length"]], quantiles)
    )


_COUNTS = ("items", "users", "interactions", "training_examples", "validation_users", "test_users")
