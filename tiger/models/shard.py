"""Recommendations for one part of a table of histories: what an actor of a pool runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from tiger.core.config import build
from tiger.models.decoding import DecodingConfig
from tiger.models.recommender import Recommendations, Recommender


class RecommendShard:
    """Recommends to one part of a table: user_id, source_id, history -> user_id, items, scores.

    With `with_and_without_seen` there are also unseen_items and unseen_scores, without the items of the history.
    """

    def __init__(
        self,
        model: str,
        options: dict[str, Any],
        allowed_items: list[int] | None = None,
        with_and_without_seen: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            model: folder of the model artifact.
            options: values of a `DecodingConfig`.
            allowed_items: a filter for all users; None: all items.
            with_and_without_seen: whether to make both kinds of lists.
            device: where to compute; None as for `Recommender.load`.
        """
        self.recommender = Recommender.load(model, None if device is None else str(device))
        self.options = build(DecodingConfig, options)
        self.allowed_items, self.both = allowed_items, with_and_without_seen

    def __call__(self, part: pa.Table) -> pa.Table:
        """Return the recommendations to the users of a part."""
        histories, users = [np.array(history) for history in part["history"].to_pylist()], part["source_id"].to_pylist()
        if self.both:
            found, unseen = self.recommender.recommend_with_and_without_seen(
                histories, self.options, users=users, allowed_items=self.allowed_items
            )
            columns = self._columns(found, "") | self._columns(unseen, "unseen_")
        else:
            found = self.recommender.recommend(histories, self.options, users=users, allowed_items=self.allowed_items)
            columns = self._columns(found, "")
        return pa.table({"user_id": part["user_id"], **columns})

    def _columns(self, found: Recommendations, prefix: str) -> dict[str, pa.Array]:
        flat = {"items": pa.array(found.items.ravel().astype(np.int32)), "scores": pa.array(found.scores.ravel())}
        return {
            f"{prefix}{name}": pa.FixedSizeListArray.from_arrays(values, self.options.k)
            for name, values in flat.items()
        }
