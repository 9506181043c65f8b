"""Users per second of `tiger recommend` next to a plain loop around the model, on the same users and cores.

    uv run python benchmarks/batch_recommend.py model=runs/model-1a2b3c4d [users=22363] [loop_users=4000]

The batch job reads the histories of all users from a Parquet file and writes ids and scores as Parquet. Its rate is
given with and without the start of Ray and of the actors, which load the model. The loop calls `Recommender.recommend`
in this process, first with all threads and then with one, on users of the same file. Both give equal lists.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tiger.core import logs
from tiger.core.artifacts import Artifact, open_artifact
from tiger.core.config import load
from tiger.core.progress import Progress
from tiger.data.history_blocks import read_blocks
from tiger.models.decoding import DecodingConfig
from tiger.models.recommender import Recommender
from tiger.on_ray import cluster
from tiger.pipeline.recommend import recommend
from tiger.run import CONFIGS, RunConfig


def write_histories(model: Artifact, path: Path, users: int) -> int:
    """Write the histories of the first users as one row per user; return the number of users."""
    catalog = model.inputs["catalog"].folder
    ids = catalog.read_table("items.parquet", ["source_id"])["source_id"]
    block = next(read_blocks(catalog, with_ids=True, block_users=users))
    items = [ids.take(block.histories.of(user)).to_pylist() for user in range(len(block.histories))]
    rows = {"user_id": block.source_ids, "items": items}
    pq.write_table(pa.table(rows), path)
    return len(block.histories)


def run_batch(model: Artifact, path: Path, root: str, cpus: float | None) -> tuple[Artifact, dict[str, float]]:
    """Run the job in a fresh root; return its artifact, and its seconds with and without the start."""
    seen: list[tuple[float, int]] = []
    add = Progress.add

    def noted(self: Progress, amount: int, note: str = "") -> None:
        if self.what == "recommend":
            seen.append((time.monotonic(), amount))
        add(self, amount, note)

    Progress.add = noted  # type: ignore[method-assign]
    overrides = [
        f"root={root}", "data.kind=tables", 'data.items=["-"]', 'data.interactions=["-"]', "data.history=items",
        f"recommend.histories={json.dumps([str(path)])}", *([f"decoding.resources.cpus={cpus}"] if cpus else []),
    ]  # fmt: skip
    begin = time.monotonic()
    artifact = recommend(load(RunConfig, None, overrides, CONFIGS), model)
    total = time.monotonic() - begin
    Progress.add = add  # type: ignore[method-assign]
    # From the first shard that is there to the last one: the users of the others, at the rate of the running pool.
    rest = sum(amount for _, amount in seen[1:])
    steady = rest / (seen[-1][0] - seen[0][0]) if len(seen) > 1 else float("nan")
    return artifact, {"seconds": total, "steady": steady}


def run_loop(model: Artifact, table: list[list[str]], threads: int) -> tuple[np.ndarray, float]:
    """Recommend in this process; return the ids, and users per second without loading the model."""
    torch.set_num_threads(threads)
    recommender = Recommender.load(model)
    options = DecodingConfig()
    recommender.recommend(table[:64], options)
    begin = time.monotonic()
    found = recommender.recommend(table, options)
    return np.array(found.ids), len(table) / (time.monotonic() - begin)


def main(arguments: list[str]) -> None:
    """Measure and print one line per way."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    logs.configure_console(False)
    model = open_artifact(given["model"], expected_kind="model")
    folder = tempfile.mkdtemp(prefix="batch")
    try:
        path = Path(folder, "histories.parquet")
        users = write_histories(model, path, int(given.get("users", 1 << 30)))
        cluster.connect()
        artifact, seconds = run_batch(model, path, str(model.home.parent.path), None)
        batch = artifact.folder.read_table("recommendations")
        lists = dict(zip(batch["user"].to_pylist(), batch["ids"].to_pylist(), strict=True))
        table = pq.read_table(path).slice(0, int(given.get("loop_users", 4000)))
        loops = {threads: run_loop(model, table["items"].to_pylist(), threads) for threads in (os.cpu_count() or 1, 1)}
        users_of_loop, ids = table["user_id"].to_pylist(), loops[1][0].tolist()
        equal = np.mean([lists[user] == row for user, row in zip(users_of_loop, ids, strict=True)])
        with_start = users / seconds["seconds"]
        print(f"batch: {users:,} users in {seconds['seconds']:.1f} s, {with_start:,.0f} users/s with the start")
        print(f"batch: {seconds['steady']:,.0f} users/s once it runs")
        for threads, (_, rate) in loops.items():
            ratios = f"x {seconds['steady'] / rate:.2f} once it runs, x {with_start / rate:.2f} with the start"
            print(f"loop with {threads} threads: {rate:,.0f} users/s; the batch {ratios}")
        print(f"equal lists: {equal:.4f}")
        shutil.rmtree(artifact.home.path)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
