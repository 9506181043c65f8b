"""Rows of different lengths as one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PAD = -1
"""Stands for no item where rows are shorter than the tensor."""


def pad_right(rows: Sequence[npt.NDArray[Any]]) -> Tensor:
    """Return rows of items as int64 [B, longest], filled up with PAD behind."""
    longest = max(map(len, rows))
    padded = np.full((len(rows), longest), PAD, np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded)
