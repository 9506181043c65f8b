"""Recommend to the users of a file with a model that needs no training, by a worker that takes its time."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import tiger.on_ray.recommend
from tests.paths import CONFIGS
from tests.raw_tables import write_events, write_items
from tiger.core.artifacts import Artifact
from tiger.core.config import load
from tiger.data import user_tables
from tiger.models.shard import RecommendShard
from tiger.pipeline.prepare import prepare
from tiger.pipeline.recommend import recommend
from tiger.pipeline.train import train_model
from tiger.run import RunConfig

USERS, SHARD_USERS = 1000, 100


class SlowShard(RecommendShard):
    """Recommends after a rest; its process is killed at the third part, once."""

    def __call__(self, part: pa.Table) -> dict[str, pa.Table | bytes]:
        died = Path(self.recommender.catalog.artifact.home.path, "../died")
        if part["user_id"][0].as_py() == 2 * SHARD_USERS and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)
        return super().__call__(part)


def write_histories(path: Path) -> dict[str, list[str]]:
    """Write events of users, some of unknown items, in random order; return what each user has of the catalog."""
    rng = np.random.default_rng(5)
    rows = [
        (f"new{user}", f"i{item}", place) for user in range(USERS) for place, item in enumerate(rng.permutation(33)[:6])
    ]
    shuffled = [rows[row] for row in rng.permutation(len(rows))]
    columns = dict(zip(("user_id", "item_id", "timestamp"), zip(*shuffled, strict=True), strict=True))
    pq.write_table(pa.table(columns), path)
    histories: dict[str, list[str]] = {f"new{user}": [] for user in range(USERS)}
    for user, item, _ in rows:
        if int(item[1:]) < 30:
            histories[user].append(item)
    return histories


def recommend_slowly(folder: Path) -> Artifact:
    """Recommend to the users of `folder/histories.parquet`, in shards of `SHARD_USERS`."""
    user_tables.SHARD_USERS = SHARD_USERS
    tiger.on_ray.recommend.RecommendShard = SlowShard
    items, events = write_items(folder / "items.parquet"), write_events(folder / "events.parquet", "a", 1)
    histories = json.dumps([str(folder / "histories.parquet")])
    overrides = [
        f"root={folder}/runs", "data.kind=tables", f"data.items={json.dumps([str(items)])}",
        f"data.interactions={json.dumps([str(events)])}", "data.time_unit=order", 'catalog.text_fields=["title"]',
        "catalog.k_core=0", "model.kind=popularity", f"recommend.histories={histories}",
        'recommend.fields=["ids"]', "recommend.json_lines=true", "decoding.resources.max_workers=1",
    ]  # fmt: skip
    run = load(RunConfig, None, overrides, CONFIGS)
    return recommend(run, train_model(run, prepare(run)))
