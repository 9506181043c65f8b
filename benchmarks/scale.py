"""The stages at sizes of your choice: seconds, rows per second, and peak memory of driver, workers and object store.

    uv run python benchmarks/scale.py [sizes=250000x10000000,2000000x50000000] [stages=prepare,embed,...] [dim=64]
        [root=FOLDER] [key=value of the configuration ...]

A size is items x interactions. The raw files are those of prepare_scaling.py (36-character user ids, skewed items),
kept in `root`, if it is given, and used again. Vectors are made of hashed words instead of a text encoder, whose speed
is another benchmark's; everything else is the code of the pipeline, each stage in a process of its own, with the work
on Ray whatever its size. A driver above 2 GB ends the benchmark with an error. `driver` and `worker` are the largest
memory of the driver and of one of Ray's processes without what they map from files; `store` is Ray's object store.

Interactions are random, so that nothing but popularity can be learned: training ends after 100 steps, `evaluate` ranks
the targets of 10,000 users with the model and two baselines, `recommend` writes lists for 20,000 (unless
`evaluation.max_users` and `recommend.users` are given), and the thresholds of a trained model are not applied. Catalogs
above 2 million items have no learned vector per item.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from prepare_scaling import event_chunks, item_chunks, write
from whole_path import watched

from tiger.core.artifacts import Artifact, newest
from tiger.embedding.vectors import vector_column
from tiger.on_ray.cluster import cores
from tiger.run import RunConfig, load_config

STAGES = (
    "prepare", "embed", "item_vectors", "tokenizer", "semantic_ids", "trie", "train", "evaluate", "recommend",
)  # fmt: skip
DRIVER_GB = 2.0
LEARNED_UP_TO = 2_000_000
SETTINGS = [
    "data.kind=tables", 'catalog.text_fields=["title"]', "scale.in_process_megabytes=0", "tokenizer.kind=rkmeans",
    "tokenizer.streaming=true", "tokenizer.passes_per_level=2", "collaborative.rank=16", "tokenizer.codebook_size=256",
    "model.training.max_steps=100", "model.training.batch_size=1024", "evaluation.max_users=10000",
    'evaluation.baselines=["popularity","nearest_neighbors"]', "recommend.users=20000",
]  # fmt: skip


class HashedWords:
    """Stands for the text encoder: a sum of random vectors of the words, each a function of the word."""

    def __init__(self, dim: int = 64, device: torch.device | None = None, **_: Any) -> None:
        self.dim = dim

    def __call__(self, shard: pa.Table) -> pa.Table:
        words = pc.utf8_split_whitespace(shard["text"]).combine_chunks()
        each = pc.list_flatten(words).dictionary_encode()
        rows = np.zeros((len(shard), self.dim), np.float32)
        np.add.at(
            rows, pc.list_parent_indices(words).to_numpy(), self._vectors(each.dictionary)[each.indices.to_numpy()]
        )
        columns = {"item_id": shard["item_id"], "vector": vector_column(rows)}
        return pa.table(columns | {"tokens": pc.list_value_length(words).cast(pa.int32())})

    def _vectors(self, words: pa.Array) -> npt.NDArray[np.float32]:
        """Return numbers of mean 0 and variance 1, float32 [words, dim]: the finalizer of SplitMix64 of a checksum."""
        checksums = np.array([zlib.crc32(word.encode()) for word in words.to_pylist()], np.uint64)
        x = (checksums[:, None] << np.uint64(16)) + np.arange(self.dim, dtype=np.uint64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return ((x >> np.uint64(40)).astype(np.float32) / 2**24 - 0.5) * np.float32(12**0.5)


def run_stage(stage: str, root: str, given: list[str], dim: int) -> None:
    """Run one stage in this process, with the artifacts of the stages before it."""
    import tiger.pipeline.embed
    from tiger.pipeline import item_vectors, semantic_ids
    from tiger.pipeline.prepare import prepare

    run = load_config("sample", [f"root={root}", *given])
    if stage == "prepare":
        prepare(run)
        return
    catalog = newest(root, "catalog")
    if stage == "embed":
        tiger.pipeline.embed.EmbedShard = HashedWords  # type: ignore[assignment, misc]
        tiger.pipeline.embed.encoder_identity = lambda model: {"model": "hashed", "sha256": str(dim)}
        original = tiger.pipeline.embed.map_shards
        tiger.pipeline.embed.map_shards = lambda *rest, **more: original(*rest[:-1], {"dim": dim}, **more)
        tiger.pipeline.embed.embed(run, catalog)
    elif stage == "item_vectors":
        item_vectors.build_item_vectors(run, catalog, newest(root, "embeddings"))
    elif stage == "tokenizer":
        semantic_ids.train_tokenizer(run, newest(root, "item_vectors"))
    elif stage == "semantic_ids":
        semantic_ids.assign_ids(run, newest(root, "tokenizer"), newest(root, "item_vectors"))
    elif stage in ("train", "evaluate", "recommend"):
        use_model(stage, run, catalog)
    elif stage == "trie":
        from tiger.semantic_ids.assignment import SemanticIds
        from tiger.semantic_ids.trie import Trie

        Trie(SemanticIds.read(newest(root, "semantic_ids").folder))


def write_timeline(path: Path, begin: float) -> None:
    """Write when the stage began and ended, the cores, and Ray's events of all its tasks, for strong_scaling.py."""
    end, events = time.time(), []
    if ray.is_initialized():
        time.sleep(3)  # workers send their events once a second
        events = ray.timeline()
    written = {"begin": begin, "end": end, "cores": cores(), "events": events}
    path.write_text(json.dumps(written), encoding="utf-8")


def use_model(stage: str, run: RunConfig, catalog: Artifact) -> None:
    """Train the model, or rank and recommend with it, whether or not it has learned anything."""
    from tiger.pipeline import evaluate, recommend, train

    for module in (train, evaluate, recommend):
        module.require = lambda checks: [check.record() for check in checks]  # type: ignore[attr-defined]
    if stage == "train":
        train.train_model(run, catalog, newest(run.root, "semantic_ids"))
    elif stage == "evaluate":
        evaluate.evaluate(run, newest(run.root, "model"))
    else:
        recommend.recommend(run, newest(run.root, "model"))


def rows_of(stage: str, items: int, events: int, settings: dict[str, str]) -> int:
    """Return what the rate of a stage counts: interactions and items, items, targets, or users (of both splits)."""
    if stage == "prepare":
        return events + items
    if stage == "train":
        return int(settings["model.training.max_steps"]) * int(settings["model.training.batch_size"])
    if stage == "evaluate":
        return 2 * int(settings["evaluation.max_users"])
    return int(settings["recommend.users"]) if stage == "recommend" else items


def raw_files(folder: Path, items: int, events: int) -> list[str]:
    names = {role: folder / f"{role}-{events}-{items}.csv" for role in ("items", "interactions")}
    write(names["items"], item_chunks(items), "csv")
    write(names["interactions"], event_chunks(events, items), "csv")
    return [f"data.{role}={path}" for role, path in names.items()]


def measure(items: int, events: int, stages: list[str], folder: Path, dim: int, more: list[str]) -> dict[str, Any]:
    learned = [] if items <= LEARNED_UP_TO else ["model.item_vectors=false"]
    given = [*raw_files(folder, items, events), *SETTINGS, *learned, *more]
    settings = dict(setting.split("=", 1) for setting in given)
    root = str(folder / f"runs-{events}-{items}")
    found: dict[str, Any] = {}
    for stage in stages:
        command = [sys.executable, __file__, f"only={stage}", f"root={root}", f"dim={dim}", *given]
        row = watched(command)
        rows = rows_of(stage, items, events, settings)
        found[stage] = row | {"rows": rows}
        print(
            f"| {items:,} x {events:,} | {stage} | {row['seconds']:.1f} | {rows / row['seconds']:,.0f} | "
            f"{row['driver']:.2f} | {row['worker']:.2f} | {row['store']:.2f} |",
            flush=True,
        )
        assert row["driver"] < DRIVER_GB, f"{stage}: the driver took {row['driver']:.2f} GB"
    print(f"catalog: {json.dumps(newest(root, 'catalog').metrics | {'rows': None})}", flush=True)
    return found


def main() -> None:
    settings = {"sizes": "250000x10000000,2000000x50000000", "stages": ",".join(STAGES), "dim": "64", "root": ""}
    more = []
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        if key in (*settings, "only"):
            settings[key] = value
        else:
            more.append(argument)
    if "only" in settings:
        begin = time.time()
        run_stage(settings["only"], settings["root"], more, int(settings["dim"]))
        return write_timeline(Path(settings["root"]) / f"timeline-{settings['only']}.json", begin)
    folder = Path(settings["root"] or tempfile.mkdtemp(prefix="scale-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = f"{Path(__file__).parent}:{Path(__file__).parents[1]}"  # for `HashedWords` in workers
    print("| items x interactions | stage | seconds | rows/s | driver GB | worker GB | store GB |\n|" + "---|" * 7)
    found = {}
    for size in settings["sizes"].split(","):
        items, events = map(int, size.split("x"))
        found[size] = measure(items, events, settings["stages"].split(","), folder, int(settings["dim"]), more)
    for one, other in itertools.pairwise(found):
        print(f"\nfrom {one} to {other}: times rows, seconds, driver, worker")
        for stage, row in found[other].items():
            before = found[one][stage]
            names = ("rows", "seconds", "driver", "worker")
            print(f"{stage:<14}" + "".join(f"  x {row[name] / max(before[name], 1e-9):5.1f}" for name in names))
    return None


if __name__ == "__main__":
    main()
