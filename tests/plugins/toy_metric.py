"""An example of a metric: a function of the targets' ranks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def hit_in_first_place(ranks: npt.NDArray[np.int64], cutoff: int) -> npt.NDArray[np.float64]:
    """Return 1 for users whose target comes first, whatever the cutoff.

    Args:
        ranks: int64 [U], rank of each user's target from 1; 0 if it is not in the list.
        cutoff: length of the lists.
    """
    return (ranks == 1).astype(np.float64)
