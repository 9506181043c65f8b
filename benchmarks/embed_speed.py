"""Texts a second: sentence-transformers called directly, our encoder called directly, and Ray Data with actors of it.

    uv run python benchmarks/embed_speed.py [texts=5000] [cores=1,2] [rounds=1] data.path=../shared/data/amazon-beauty

The same texts (those of the catalog several times, if it has fewer) and model on the same number of cores: threads for
the direct calls, actors of one CPU for Ray Data. The direct call is `SentenceTransformer.encode` as it comes: float32,
batches of 32, sorted by length over all texts. Ray Data's rate is given twice, over the whole stage, and from the first
part that came to the last, without the start of Ray and of the actors, which takes the same seconds for any number of
texts.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from tiger.core import tracking
from tiger.core.config import load
from tiger.core.resources import Resources
from tiger.core.storage import Folder
from tiger.data.prepare.build import ITEM_ROW_GROUP
from tiger.embedding.encoder import BUNDLED, EmbedShard, TextEncoder, model_path
from tiger.on_ray.map import map_shards
from tiger.pipeline.prepare import prepare
from tiger.run import CONFIGS, RunConfig


def direct(texts: list[str], threads: int) -> float:
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(model_path(BUNDLED), device="cpu")
    begin = time.perf_counter()
    model.encode(texts, show_progress_bar=False)
    return len(texts) / (time.perf_counter() - begin)


def ours(texts: list[str], threads: int) -> float:
    torch.set_num_threads(threads)
    encoder = TextEncoder(device="cpu")
    begin = time.perf_counter()
    encoder.encode(texts)
    return len(texts) / (time.perf_counter() - begin)


def ray_data(texts: list[str], actors: int) -> tuple[float, float]:
    """Texts a second over the whole stage, and from the first part to the last."""
    arrivals: list[tuple[float, int]] = []

    def arrived(stage: str, step: int, figures: object) -> None:
        arrivals.append((time.perf_counter(), step))

    with tempfile.TemporaryDirectory() as folder, tracking.recording(arrived):
        source = Folder(folder)
        table = pa.table({"item_id": np.arange(len(texts), dtype=np.int32), "text": texts})
        source.write_table("items.parquet", table, row_group_size=ITEM_ROW_GROUP)
        pool = Resources(min_workers=actors, max_workers=actors, cpus=1, gpus=0)
        settings = {"storage_dtype": "float32"}
        begin = time.perf_counter()
        map_shards(source, "items.parquet", ["item_id", "text"], source.child("out"), EmbedShard, settings,
                  actors=pool, what="embed")  # fmt: skip
    (first, before), (last, rows) = arrivals[actors - 1], arrivals[-1]
    return rows / (last - begin), (rows - before) / (last - first)


def main() -> None:
    arguments = dict(argument.split("=", 1) for argument in sys.argv[1:])
    count, rounds = int(arguments.pop("texts", "5000")), int(arguments.pop("rounds", "1"))
    cores = [int(number) for number in arguments.pop("cores", "1,2").split(",")]
    name = "beauty-cpu" if "data.path" in arguments else "sample"
    run = load(RunConfig, name, [f"{key}={value}" for key, value in arguments.items()], Path(CONFIGS))
    table = prepare(run).folder.read_table("items.parquet", ["text"])
    order = np.random.default_rng(0).permutation(len(table))
    drawn = np.sort(np.resize(order, count))  # a catalog smaller than `count` comes more than once
    texts = table["text"].take(pa.array(drawn)).to_pylist()
    for number in cores:
        found: dict[str, list[float]] = {}
        for _ in range(rounds):
            found.setdefault("direct", []).append(direct(texts, number))
            found.setdefault("ours", []).append(ours(texts, number))
            whole, steady = ray_data(texts, number)
            found.setdefault("whole stage", []).append(whole)
            found.setdefault("from part to part", []).append(steady)
        base = float(np.median(found["direct"]))
        own = float(np.median(found["ours"]))
        print(f"{len(texts):,} texts, {number} cores: direct call {base:.1f} texts/s")
        for what in ("ours", "whole stage", "from part to part"):
            rate = float(np.median(found[what]))
            print(
                f"  {what:<18} {rate:6.1f} texts/s, x {rate / base:.2f} the direct call, x {rate / own:.2f} ours",
                flush=True,
            )


if __name__ == "__main__":
    main()
