"""Recommendations for many users: a table of histories is mapped over a pool of actors with the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tiger.core.artifacts import Artifact, Draft
from tiger.core.storage import SCRATCH
from tiger.data.histories import Histories
from tiger.models.decoding import DecodingConfig
from tiger.models.shard import RecommendShard
from tiger.on_ray.map import map_shards
from tiger.run import ResourcesConfig

_PART_USERS = 1024


def recommend_users(
    model: Artifact,
    histories: Histories,
    users: Sequence[int],
    user_histories: Sequence[npt.NDArray[np.int32]],
    draft: Draft,
    name: str,
    *,
    options: DecodingConfig,
    allowed_items: list[int] | None = None,
    with_and_without_seen: bool = False,
    scale: ResourcesConfig | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
    """Return the top items int64 [U, k] of each user, padded with -1; if asked for, also those without seen items.

    Args:
        model: model artifact.
        histories: all users' histories, for their source ids.
        users: user ids.
        user_histories: history of each of these users, item ids in time order.
        draft: artifact that is being written.
        name: folder for the results in the draft: user_id int32, items [k], scores [k] (and unseen_items,
            unseen_scores) of every user in `name/part-00000.parquet` and so on.
        options: how lists are made, and the actors that make them.
        allowed_items: a filter for all users; None: all items.
        with_and_without_seen: make lists with all items, and lists without those of the history.
        scale: GPUs of the run, and how long to wait for them.
    """
    table = pa.table(
        {
            "user_id": pa.array(users, pa.int32()),
            "source_id": [histories.source_ids[user] for user in users],
            "history": pa.array(user_histories, pa.list_(pa.int32())),
        }
    )
    scratch = draft.folder.child(SCRATCH)
    scratch.write_table(f"{name}.parquet", table, row_group_size=_PART_USERS)
    arguments: dict[str, Any] = {
        "model": model.folder.uri,
        "options": options.model_dump(mode="json"),
        "allowed_items": allowed_items,
        "with_and_without_seen": with_and_without_seen,
    }
    map_shards(
        scratch,
        f"{name}.parquet",
        table.column_names,
        draft.folder.child(name),
        RecommendShard,
        arguments,
        actors=options.resources,
        what=f"decode {name}",
        scale=scale,
    )
    found = draft.folder.read_table(name)

    def column(name: str) -> npt.NDArray[np.int64]:
        return np.asarray(found[name].combine_chunks().flatten()).reshape(len(users), options.k).astype(np.int64)

    return column("items"), column("unseen_items") if with_and_without_seen else None
