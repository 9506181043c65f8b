"""Real items that come after the training: what an append costs, what it moves, and what the model finds of them.

    uv run python benchmarks/append_items.py root=RUNS work=FOLDER [items=1000] [seed=0] [beauty-cpu] [key=value ...]

`root` holds a finished catalog (`jobs.pipeline beauty-cpu`). A sample of its items is taken out, with all of their
interactions; item vectors, semantic IDs and a model are made of the rest in `work`, as if these items had not existed.
Then they are appended from a file, with the interactions that they had.

Printed are: seconds from the file to the published IDs; whether any published ID has moved (sha256 of the IDs before
and after); how many of the new items beam search reaches when only they are allowed, and in ordinary lists; Recall@10
of users whose next item is a new one, among all items and among the new ones, next to nearest neighbors; and the
verdicts on drift of this append and of one whose texts are of another kind of things.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tiger.core import logs
from tiger.core.artifacts import Artifact, newest
from tiger.core.config import load
from tiger.data.catalog import Catalog
from tiger.evaluation.drift import DriftReport
from tiger.evaluation.shard import load_baselines
from tiger.metrics.ranking import confidence, ranking, target_ranks
from tiger.models.decoding import DecodingConfig
from tiger.models.recommender import Recommender
from tiger.pipeline.append import append
from tiger.pipeline.train import ensure_model
from tiger.run import CONFIGS, RunConfig

_PARTS = ("brake pad set", "spark plug", "oxygen sensor", "timing belt kit", "alternator", "wheel bearing", "fuel pump")
_MAKERS, _CARS = ("Bosch", "Denso", "Moog", "Brembo", "Gates"), ("Corolla", "F-150", "Civic", "3 Series", "Outback")


def write_files(catalog: Catalog, held_out: npt.NDArray[np.bool_], work: Path) -> dict[str, Path]:
    """Write the items and interactions of the training, and those that come later, as Parquet."""
    table = catalog.artifact.folder.read_table("histories.parquet").combine_chunks()
    lengths = np.asarray(pc.list_value_length(table["items"]))
    item = np.asarray(table["items"].combine_chunks().flatten())
    user = np.repeat(np.arange(len(table)), lengths)
    ids = catalog.items["source_id"]
    events = pa.table(
        {
            "user_id": table["source_id"].take(pa.array(user)),
            "item_id": ids.take(pa.array(item)),
            "timestamp": table["times"].combine_chunks().flatten(),
        }
    )
    later = held_out[item]
    touched = np.isin(user, np.unique(user[later]))
    items = catalog.items.drop_columns(["item_id", "text"]).rename_columns({"source_id": "item_id"})
    files = {name: work / f"{name}.parquet" for name in ("items", "events", "new-items", "new-events", "other-items")}
    pq.write_table(items.filter(pa.array(~held_out)), files["items"])
    pq.write_table(events.filter(pa.array(~later)), files["events"])
    pq.write_table(items.filter(pa.array(held_out)), files["new-items"])
    pq.write_table(events.filter(pa.array(touched)), files["new-events"])
    pq.write_table(pa.Table.from_pylist(other_things(int(held_out.sum())), items.schema), files["other-items"])
    return files


def other_things(count: int) -> list[dict[str, Any]]:
    """Return items of another kind: parts of cars."""
    choose = random.Random(0).choice
    return [
        {
            "item_id": f"part-{number}",
            "title": f"{choose(_MAKERS)} {choose(_PARTS)} for {choose(_CARS)} {1990 + number % 35}",
            "brand": choose(_MAKERS), "categories": [["Automotive", "Replacement Parts", choose(_PARTS)]],
            "price": 5.0 + number % 300,
            "description": f"Fits {choose(_CARS)} and {choose(_CARS)}; replaces the {choose(_PARTS)}.",
        }
        for number in range(count)
    ]  # fmt: skip


def digest(ids: Artifact, count: int) -> str:
    """Return the sha256 of the first semantic IDs with the ids of their items."""
    rows = ids.folder.read_table("ids.parquet").slice(0, count).select(["item_id", "source_id", "codes"])
    return hashlib.sha256(json.dumps(rows.to_pylist()).encode()).hexdigest()


def found(
    recommender: Recommender, histories: Sequence[npt.NDArray[Any]], targets: npt.NDArray[Any], **changes: Any
) -> str:
    """Return Recall@10 with its interval."""
    lists = recommender.recommend(histories, DecodingConfig().ranked(10), users=[""] * len(histories), **changes).items
    ranks = target_ranks(lists, targets)
    low, high = confidence(ranks, (10,))["recall@10"]
    return f"{ranking(ranks, (10,))['recall@10']:.4f} ({low:.4f} to {high:.4f})"


def main(arguments: list[str]) -> None:
    """Train without a sample of the items, append it, and print what became of it."""
    logs.configure_console(False)
    names = {"root", "work", "items", "seed"}
    given = {key: value for key, _, value in (text.partition("=") for text in arguments) if key in names}
    keys = [text for text in arguments if text.partition("=")[0] not in names and "=" in text]
    config = next((text for text in arguments if "=" not in text), "beauty-cpu")
    work = Path(given["work"])
    work.mkdir(parents=True, exist_ok=True)
    catalog = Catalog(newest(given["root"], "catalog"))
    held_out = np.zeros(catalog.n_items, bool)
    count = int(given.get("items", 1000))
    held_out[np.random.default_rng(int(given.get("seed", 0))).permutation(catalog.n_items)[:count]] = True
    files = write_files(catalog, held_out, work)
    settings = catalog.artifact.manifest["config"]["catalog"]
    tables = [
        "data.kind=tables", "data.time_unit=us", f"data.items={json.dumps([str(files['items'])])}",
        f"data.interactions={json.dumps([str(files['events'])])}", f"root={work}/runs", "catalog.k_core=0",
        f"catalog.text_fields={json.dumps(settings['text_fields'])}", f"catalog.split={settings['split']}",
    ]  # fmt: skip
    base = {"model": load(RunConfig, config, [], CONFIGS).model.model_dump(mode="json")}
    run = load(RunConfig, None, [*tables, "embedding.precision=float32", *keys], CONFIGS, defaults=base)
    model = ensure_model(run)
    before = model.inputs["semantic_ids"]
    begin = time.perf_counter()
    appended = append_file(run, model, files["new-items"])
    seconds = time.perf_counter() - begin
    trained = before.metrics["items"]
    print(f"{count:,} items appended to {trained:,}: {seconds:.1f} s from the file to the IDs, of which "
          f"{appended.metrics['embed_seconds']} s for reading and embedding")  # fmt: skip
    one, other = digest(before, trained), digest(appended, trained)
    moved = "none" if one == other else "SOME"
    print(f"sha256 of the published IDs: {one[:16]} before, {other[:16]} after: {moved} moved")
    report(run, model, appended, files, trained)


def append_file(run: RunConfig, model: Artifact, items: Path, interactions: Path | None = None) -> Artifact:
    """Append the items of a file."""
    events = [] if interactions is None else [str(interactions)]
    changes = run.append.model_copy(update={"items": [str(items)], "interactions": events})
    return append(run.model_copy(update={"append": changes}), model)


def report(run: RunConfig, model: Artifact, appended: Artifact, files: dict[str, Path], trained: int) -> None:
    """Print what the model finds of the new items, and the verdicts on drift."""
    recommender = Recommender.load(model, "cpu", semantic_ids=appended)
    is_new = np.arange(recommender.num_items) >= trained
    options = DecodingConfig(k=int(is_new.sum()), beam=int(is_new.sum()), exclude_seen=False)
    reached = recommender.recommend([[0], [trained]], options, allowed_items=is_new)
    print(f"reached by decoding, only new items allowed: {len(np.unique(reached.items)):,} of {int(is_new.sum()):,}")
    events = pq.read_table(files["new-events"])
    index = recommender.catalog.item_index if recommender.catalog else {}
    histories: dict[str, list[tuple[int, int]]] = {}
    for user, name, at in zip(*(events[name].to_pylist() for name in ("user_id", "item_id", "timestamp")), strict=True):
        histories.setdefault(user, []).append((at, index[name]))
    users, targets = [], []
    for rows in histories.values():
        items = [item for _, item in sorted(rows, key=lambda row: row[0])]
        first = next((place for place, item in enumerate(items) if place and item >= trained), None)
        if first is not None:
            users.append(np.array(items[:first]))
            targets.append(items[first])
    wanted = np.array(targets)
    baselines = {"nearest_neighbors": {"kind": "nearest_neighbors"}}
    inputs = model.inputs | {"semantic_ids": appended}
    neighbors = load_baselines(inputs, baselines)["nearest_neighbors"]
    print(f"users whose next item is new: {len(users):,}; Recall@10 with 95 % intervals")
    for name, each in (("this model", recommender), ("nearest neighbors", neighbors)):
        alone = found(each, users, wanted, allowed_items=is_new)
        print(f"  {name}: {found(each, users, wanted)} of all items, {alone} of the new ones alone")
    print(f"  this model, boost 1: {found(recommender, users, wanted, new_item_boost=1.0)} of all items")
    lists = recommender.recommend(users, DecodingConfig().ranked(10), users=[""] * len(users)).items
    shown = lists[is_new[lists]]
    print(f"  new items in lists of all items: {len(shown) / lists.size:.4f}; distinct ones: {len(np.unique(shown)):,}")
    for name, artifact in (
        ("the held-out items", append_file(run, model, files["new-items"], files["new-events"])),
        ("parts of cars", append_file(run, model, files["other-items"])),
    ):
        print(f"{name}: {DriftReport.model_validate(artifact.folder.read_json('drift.json'))}")


if __name__ == "__main__":
    main(sys.argv[1:])
