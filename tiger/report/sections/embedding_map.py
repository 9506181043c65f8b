"""A map of the vectors that were quantized, colored by the first code."""

from __future__ import annotations

import numpy as np

from tiger.report.figures import picture
from tiger.report.finished import FinishedRun
from tiger.report.markup import Html, figure

TITLE = "Map of the items"

_SHOWN = 1500  # items; t-SNE takes seconds for them


def render(run: FinishedRun) -> Html | None:
    """Return a t-SNE map of a sample of items."""
    items = run.items
    if items is None or items.vectors is None or len(items.codes) < 50:
        return None
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    random = np.random.default_rng(0)
    rows = np.sort(random.permutation(len(items.codes))[:_SHOWN])
    vectors = items.vectors[rows].astype(np.float32)
    reduced = PCA(min(30, *vectors.shape), random_state=0).fit_transform(vectors)
    places = TSNE(perplexity=min(30, len(rows) // 4), init="pca", max_iter=500, random_state=0).fit_transform(reduced)
    first = items.codes[rows, 0]
    # Codes whose items are near each other on the map get similar colors.
    centers = np.stack([places[first == code].mean(axis=0) for code in np.unique(first)])
    hue = np.argsort(np.argsort(np.arctan2(centers[:, 1], centers[:, 0]))) / max(1, len(centers))
    with picture("Map of items colored by first code", width=6.5, height=5.0) as drawn:
        (axes,) = drawn.axes
        color = hue[np.searchsorted(np.unique(first), first)]
        axes.scatter(places[:, 0], places[:, 1], c=color, cmap="hsv", s=9, alpha=0.75, linewidths=0, rasterized=True)
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        for side in axes.spines.values():
            side.set_visible(False)
    caption = (
        f"{len(rows):,} of {len(items.codes):,} items, t-SNE of the vectors that were quantized (text, and what is "
        f"bought together, if it is used). One color per first code ({len(centers)} codes): items of one color should "
        "be near each other."
    )
    return figure(drawn.svg, caption)
