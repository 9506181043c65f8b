"""What any result is held against."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiger.catalog import Histories


def popularity(histories: Histories, n_items: int, k: int) -> npt.NDArray[np.int64]:
    """The `k` items with most interactions in the training parts, int64 [k]; of equals the lower id first."""
    inside = np.arange(len(histories.items)) < np.repeat(histories.train_end, np.diff(histories.offsets))
    counts = np.bincount(histories.items[inside], minlength=n_items)
    return np.lexsort((np.arange(n_items), -counts))[:k]
