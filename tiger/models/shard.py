"""Recommendations for one part of a table of users: what an actor of a pool runs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from tiger.core.config import build
from tiger.data.history_blocks import slices
from tiger.data.item_names import ItemNames, take_lists
from tiger.metrics.lists import sum_lists
from tiger.models.decoding import DecodingConfig
from tiger.models.recommender import Recommendations, Recommender

TABLE, LINES, SUMS = "recommendations", "json_lines", "scratch/sums"
"""Folders of the outputs of `RecommendShard`."""


class RecommendShard:
    """Recommends to one part of a table: user_id, source_id, history -> user_id, user, by_popularity, items, ..."""

    def __init__(
        self,
        model: str,
        options: dict[str, Any],
        fields: list[str],
        json_lines: bool = False,
        allowed_items: npt.NDArray[np.bool_] | None = None,
        semantic_ids: str | None = None,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            model: folder of the model artifact.
            options: values of a `DecodingConfig`.
            fields: further columns: ids, titles, scores.
            json_lines: whether to write the lists as JSON lines, too.
            allowed_items: a filter for all users, bool [items]; None: all items.
            semantic_ids: folder of the semantic IDs of an append; None: the model's own.
            device: where to compute; None as for `Recommender.load`.
        """
        place = None if device is None else str(device)
        self.recommender = Recommender.load(model, place, semantic_ids=semantic_ids)
        assert self.recommender.catalog is not None
        self.names = ItemNames(self.recommender.catalog.items_folder)
        self.options = build(DecodingConfig, options)
        self.fields, self.json_lines, self.allowed_items = fields, json_lines, allowed_items

    def __call__(self, part: pa.Table) -> dict[str, pa.Table | bytes]:
        """Return the recommendations to the users of a part, and the sums of their lists."""
        found = self.recommender.recommend(
            slices(part["history"]),
            self.options,
            users=part["source_id"].to_pylist(),
            allowed_items=self.allowed_items,
        )
        table = self._table(part, found)
        sums = sum_lists(found.items, self.recommender.num_items, self.options.k)
        outputs: dict[str, pa.Table | bytes] = {SUMS: sums, TABLE: table}
        if self.json_lines:
            outputs[LINES] = self._lines(part["source_id"].to_pylist(), found)
        return outputs

    def _table(self, part: pa.Table, found: Recommendations) -> pa.Table:
        columns = {
            "user_id": part["user_id"],
            "user": part["source_id"],
            "by_popularity": pa.array(found.by_popularity),
            "items": fixed_lists(found.items.astype(np.int32)),
        }
        if "ids" in self.fields:
            columns["ids"] = take_lists(self.names.ids, found.items)
        if "titles" in self.fields:
            columns["titles"] = take_lists(self.names.titles, found.items)
        if "scores" in self.fields:
            columns["scores"] = fixed_lists(found.scores)
        return pa.table(columns)

    def _lines(self, users: list[str], found: Recommendations) -> bytes:
        """Return one JSON object per user: id, and items with titles and scores, best first."""
        ids, titles = (take_lists(column, found.items).to_pylist() for column in (self.names.ids, self.names.titles))
        lines = []
        for row, user in enumerate(users):
            ranked = zip(ids[row], titles[row], found.scores[row].tolist(), strict=False)
            items = [{"item": item, "title": title, "score": round(score, 4)} for item, title, score in ranked]
            lines.append(json.dumps({"user": user, "items": items}, ensure_ascii=False))
        return ("\n".join(lines) + "\n").encode()


def fixed_lists(values: npt.NDArray[Any]) -> pa.FixedSizeListArray:
    """Return an array [U, K] as a column of lists of K values."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
