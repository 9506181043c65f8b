"""How evenly the codes of every level are used."""

from __future__ import annotations

import numpy as np

from tiger.report.figures import picture
from tiger.report.finished import FinishedRun
from tiger.report.markup import Html, figure, table
from tiger.report.semantic_ids import figures

TITLE = "Semantic IDs"

_COLUMNS = 32  # codes per row of a heat map
_MEANINGS = {
    "usage": "codes used / codes",
    "perplexity": "codes in effective use (perplexity)",
    "gini": "Gini coefficient of code frequencies",
    "unique": "distinct prefixes / items",
    "overlap": "nearest neighbors with the same prefix",
    "category_agreement": "pairs with the same prefix that share a category",
}


def render(run: FinishedRun) -> Html | None:
    """Return a heat map of items per code for every level, and metrics by level."""
    items = run.items
    if items is None:
        return None
    levels = items.codes.shape[1]
    rows = max(-(-size // _COLUMNS) for size in items.sizes)
    with picture("Items per code, by level", columns=levels, height=1.0 + 0.22 * min(rows, 16)) as drawn:
        for level, axes in enumerate(drawn.axes):
            size = items.sizes[level]
            columns = min(_COLUMNS, max(8, int(np.ceil(np.sqrt(size)))))
            counts = np.bincount(items.codes[:, level], minlength=size).astype(float)
            cells = np.full(-(-size // columns) * columns, np.nan)
            cells[:size] = counts
            image = axes.imshow(cells.reshape(-1, columns), aspect="auto", vmin=0, interpolation="nearest")
            drawn.figure.colorbar(image, ax=axes, label="items", shrink=0.9)
            axes.set(title=f"Level {level + 1}: {size} codes", xticks=[], yticks=[])
            axes.grid(visible=False)
    found = figures(items)
    table_rows = [
        (meaning, *(found[f"{name}@{level}"] for level in range(1, levels + 1)))
        for name, meaning in _MEANINGS.items()
        if f"{name}@1" in found
    ]
    rest = [
        (name.replace("_", " "), value)
        for name, value in found.items()
        if "@" not in name
    ]  # fmt: skip
    caption = "One cell per code, row by row in the order of code numbers; dark cells are codes that few items have."
    return Html(
        figure(drawn.svg, caption)
        + '<div class="columns">'
        + table(["by level", *(f"level {level}" for level in range(1, levels + 1))], table_rows)
        + table(["of all levels", "value"], rest)
        + "</div>"
    )
