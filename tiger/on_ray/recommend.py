"""Recommendations for many users: a table of histories is mapped over a pool of actors with the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tiger.core.artifacts import Artifact, Draft
from tiger.core.storage import SCRATCH
from tiger.data.histories import Histories
from tiger.models.recommender import RecommendShard
from tiger.on_ray.map import ActorPool, map_shards
from tiger.run import ResourcesConfig

_PART_USERS = 1024


def recommend_users(
    model: Artifact,
    histories: Histories,
    users: Sequence[int],
    taken: Sequence[npt.NDArray[np.int32]],
    draft: Draft,
    name: str,
    *,
    k: int,
    beam: int,
    history: Literal["allowed", "excluded", "both"] = "allowed",
    options: dict[str, Any] | None = None,
    max_actors: int | None = None,
    scale: ResourcesConfig | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
    """Return the top k items int64 [U, k] of each user, padded with -1; with `both`, also those without seen items.

    Args:
        model: model artifact.
        histories: all users' histories, for their source ids.
        users: user ids.
        taken: history of each of these users, item ids in time order.
        draft: artifact that is being written.
        name: folder for the results in the draft: user_id int32, items [k], scores [k] (and masked_items,
            masked_scores) of every user in `name/part-00000.parquet` and so on.
        k: items per user.
        beam: width of the beam search.
        history: whether the lists may contain items of the history.
        options: see `RecommendShard`.
        max_actors: maximum number of actors; None: as many as the cluster can hold.
        scale: GPUs of the run, and how long to wait for them.
    """
    table = pa.table(
        {
            "user_id": pa.array(users, pa.int32()),
            "source_id": [histories.source_ids[user] for user in users],
            "history": pa.array(taken, pa.list_(pa.int32())),
        }
    )
    scratch = draft.folder.child(SCRATCH)
    scratch.write_table(f"{name}.parquet", table, row_group_size=_PART_USERS)
    map_shards(
        scratch,
        f"{name}.parquet",
        table.column_names,
        draft.folder.child(name),
        RecommendShard,
        {"model": model.folder.uri, "k": k, "beam": beam, "history": history, "options": options},
        actors=ActorPool(maximum=max_actors),
        what=f"decode {name}",
        scale=scale,
    )
    found = draft.folder.read_table(name)

    def column(name: str) -> npt.NDArray[np.int64]:
        return np.asarray(found[name].combine_chunks().flatten()).reshape(len(users), k).astype(np.int64)

    return column("items"), column("masked_items") if history == "both" else None
