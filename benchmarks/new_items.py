"""Items that training has never seen: what each method finds of them, and what favoring them costs other users.

    OMP_NUM_THREADS=1 uv run python benchmarks/new_items.py root=RUNS [seeds=3] [first_seed=0] [fraction=0.05]
        [others=4000] [work=FOLDER] [ids=rebuilt] [model.training.epochs=16]

`root` holds finished artifacts (`jobs.pipeline beauty-cpu`): a catalog, and text embeddings. For every seed a fraction
of the items is removed from the training parts of all histories, as in Rajput et al. 2023, section 4.3; validation and
test keep them. Item vectors, semantic IDs and the model are made again from what is left: the artifacts' own semantic
IDs know the co-occurrence of the removed items (`ids=artifact` uses them all the same, to see what that leaks). Texts
of removed items are part of the catalog, and of the tokenizer's vectors. The model is trained in this process, on one
thread; `work` keeps IDs and checkpoints, from which the same command goes on after an interruption.

Measured are users whose target is a removed item, of validation (to choose from) and of test (to report), and a sample
of `others` further users. Lists hold 10 items, seen items are not excluded, the beam is 50. `paper` is the protocol of
section 4.3: the model generates known items, and removed items that share their first codes are inserted, at most
`epsilon = 0.1` of a list; with the first three codes as the tokenizer gives them, before IDs are made unique, and with
the first two. SASRec is not run: it has no vector for an item without training, so it finds none.

Output: one JSON line per seed, split and method; then a Markdown table over all seeds, with 95 % intervals over users.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tiger.core.artifacts import newest
from tiger.core.config import load
from tiger.core.errors import ConfigError
from tiger.core.row_groups import read_row_groups
from tiger.core.storage import Folder
from tiger.data.catalog import Catalog
from tiger.data.histories import EvalSplit, Histories, Split, sample_users
from tiger.data.item_names import ITEMS
from tiger.embedding.collaborative import fit_fusion
from tiger.embedding.vectors import load_embeddings, vector_shards
from tiger.metrics.ranking import confidence, ranking, target_ranks
from tiger.models.base import InMemoryData, ModelConfig, load_family, text_embeddings
from tiger.models.decoding import DecodingConfig
from tiger.models.recommender import Recommender
from tiger.models.train import fit_model
from tiger.run import CONFIGS, RunConfig
from tiger.semantic_ids.assignment import SemanticIds, assign, packed
from tiger.tokenizers.train import encode_dataset, fit_tokenizer
from tiger.training.checkpoints import CheckpointStore
from tiger.training.loop import Callbacks

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
BOOSTS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
EPSILON = 0.1
LENGTH = 10
SPLITS: tuple[Split, ...] = ("valid", "test")
BASELINES = ("nearest_neighbors", "popularity", "markov_chain")
MODEL, NEIGHBORS = "this model", "nearest_neighbors"

Items = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def choose_items(num_items: int, fraction: float, seed: int) -> Mask:
    """Return which items are removed, bool [items]: a fraction of them, drawn by the seed."""
    removed = np.zeros(num_items, bool)
    removed[np.random.default_rng(seed).permutation(num_items)[: int(fraction * num_items)]] = True
    return removed


def remove_from_training(histories: Histories, removed: Mask) -> Histories:
    """Return the histories without the removed items in the training parts; validation and test stay."""
    in_training = np.arange(len(histories.items)) < np.repeat(histories.train_end, np.diff(histories.offsets))
    kept = ~(in_training & removed[histories.items])
    before = np.concatenate([[0], np.cumsum(kept)])
    return Histories(
        histories.source_ids,
        before[histories.offsets],
        histories.items[kept],
        before[histories.train_end],
        before[histories.valid_end],
    )


def insert_by_prefix(lists: Items, prefixes: Items, removed: Mask, epsilon: float) -> Items:
    """Return lists with removed items inserted behind the first generated item that shares their prefix.

    Args:
        lists: [U, K] generated items, best first, padded with -1.
        prefixes: [items] a number per item, equal for items with equal first codes.
        removed: bool [items].
        epsilon: maximum part of inserted items of a list.
    """
    by_prefix: dict[int, list[int]] = {}
    for item in np.flatnonzero(removed).tolist():
        by_prefix.setdefault(int(prefixes[item]), []).append(item)
    length = lists.shape[1]
    result = np.full_like(lists, -1)
    for row, generated in enumerate(lists.tolist()):
        merged: list[int] = []
        left = int(epsilon * length + 1e-9)
        for item in generated:
            if item < 0:
                break
            merged.append(item)
            inserted = [new for new in by_prefix.get(int(prefixes[item]), []) if new not in merged][:left]
            merged += inserted
            left -= len(inserted)
        result[row, : len(merged[:length])] = merged[:length]
    return result


@dataclass(frozen=True)
class Source:
    """What is read from finished artifacts."""

    catalog: Catalog
    embeddings: Folder
    ids: SemanticIds

    @classmethod
    def open(cls, root: str) -> Source:
        """Open the newest semantic IDs below a root, their text embeddings and the catalog."""
        semantic_ids = newest(root, "semantic_ids")
        embeddings = text_embeddings(semantic_ids)
        return cls(Catalog(newest(root, "catalog")), embeddings.folder, SemanticIds.read(semantic_ids.folder))


@dataclass(frozen=True)
class Trained:
    """A model of the histories without removed items.

    Attributes:
        removed: bool [items].
        data: what the model was trained on.
        recommender: the model.
        nearest_codes: int64 [items, L] the tokenizer's codes before IDs are made unique.
    """

    removed: Mask
    data: InMemoryData
    recommender: Recommender
    nearest_codes: Items


def rebuild_ids(run: RunConfig, embeddings: Folder, histories: Histories) -> tuple[SemanticIds, Items]:
    """Return semantic IDs of text and of the co-occurrence in given histories, and the codes before they are unique."""
    fusion = fit_fusion(run.collaborative, embeddings, histories)
    parts = [(items, fusion(items, text)) for items, text in vector_shards(embeddings)]
    order = np.argsort(np.concatenate([items for items, _ in parts]))
    vectors = torch.from_numpy(np.concatenate([part for _, part in parts])[order])
    tokenizer, _ = fit_tokenizer(run.tokenizer, vectors, device=CPU)
    codes = encode_dataset(tokenizer, vectors, CPU).numpy()
    costs = tokenizer.assignment_costs(vectors)
    return assign(codes, run.tokenizer.codebook_size, run.semantic_ids, costs), codes


def make_ids(
    run: RunConfig, source: Source, histories: Histories, settings: dict[str, Any], folder: Folder | None
) -> tuple[SemanticIds, Items]:
    """Return semantic IDs and the codes before they are unique: of the artifact, or rebuilt, from `folder` if there."""
    if not settings["rebuild"]:
        return source.ids, source.ids.codes[:, : source.ids.levels].astype(np.int64)
    if folder is not None and folder.exists("ids.json") and folder.read_json("ids.json") == settings:
        log.info("the semantic IDs are those of %s", folder.uri)
        return SemanticIds.read(folder), folder.read_tensors("codes.safetensors")["codes"].numpy()
    ids, codes = rebuild_ids(run, source.embeddings, histories)
    if folder is not None:
        ids.write(folder, read_row_groups(source.catalog.artifact.folder, ITEMS, ["source_id"]))
        folder.write_tensors("codes.safetensors", {"codes": torch.from_numpy(codes)})
        folder.write_json("ids.json", settings)
    return ids, codes


def train(run: RunConfig, source: Source, seed: int, fraction: float, rebuild: bool, work: Folder | None) -> Trained:
    """Return a model trained without a fraction of the items; with `work`, go on from its IDs and checkpoints."""
    removed = choose_items(source.catalog.n_items, fraction, seed)
    histories = remove_from_training(source.catalog.histories, removed)
    if histories.training_counts(len(removed))[removed].any():
        raise AssertionError("removed items are left in the training parts")
    config: ModelConfig = run.model.model_copy(update={"seed": seed})
    settings = {
        "seed": seed, "fraction": fraction, "rebuild": rebuild, "embeddings": source.embeddings.uri,
        "tokenizer": run.tokenizer.model_dump(mode="json"), "semantic_ids": run.semantic_ids.model_dump(mode="json"),
        "collaborative": run.collaborative.model_dump(mode="json"),
    }  # fmt: skip
    folder = None if work is None else work.child(f"seed-{seed}")
    begin = time.perf_counter()
    ids, codes = make_ids(run, source, histories, settings, folder)
    log.info("seed %d: semantic IDs after %.0f s", seed, time.perf_counter() - begin)
    data = InMemoryData(len(removed), histories, ids, load_embeddings(source.embeddings))
    callbacks = Callbacks()
    if folder is not None:
        given = settings | {"model": config.model_dump(mode="json")}
        store = CheckpointStore(folder.child("checkpoints"), given)
        callbacks = Callbacks(save=store.save, load=store.load)
    module, result = fit_model(config, data, device=CPU, callbacks=callbacks)
    log.info("seed %d: trained after %.0f s, best %s", seed, time.perf_counter() - begin, result.best)
    return Trained(removed, data, load_family(config).recommender(module, config, data, CPU), codes)


@dataclass(frozen=True)
class Measured:
    """Ranks of the targets of one method on one split.

    Attributes:
        new: int64 [U] ranks for users whose target is a removed item, 0: not in the list.
        others: int64 [V] ranks for the sample of other users; None: not measured.
        new_in_lists: part of removed items among the items recommended to the other users.
        weight: number of all other users per user of the sample.
    """

    new: Items
    others: Items | None = None
    new_in_lists: float = 0.0
    weight: float = 1.0

    def all_users(self) -> float:
        """Return Recall@10 of all users, from the sample of others."""
        assert self.others is not None
        hits = float((self.new > 0).sum()), self.weight * float((self.others > 0).sum())
        return sum(hits) / (len(self.new) + self.weight * len(self.others))

    def figures(self) -> dict[str, Any]:
        """Return the metrics with their intervals, for a JSON line."""
        cutoffs = (LENGTH,)
        intervals = confidence(self.new, cutoffs)
        found: dict[str, Any] = {"users": len(self.new)}
        for name in (f"recall@{LENGTH}", f"ndcg@{LENGTH}"):
            found[name] = ranking(self.new, cutoffs)[name]
            found[f"{name} 95%"] = intervals[name]
        if self.others is not None:
            name = f"recall@{LENGTH}"
            found["others"] = len(self.others)
            found[f"others {name}"] = ranking(self.others, cutoffs)[name]
            found[f"others {name} 95%"] = confidence(self.others, cutoffs)[name]
            found[f"all users {name}"] = self.all_users()
            found["new in lists of others"] = self.new_in_lists
        return found


def evaluate(trained: Trained, split: Split, num_others: int, seed: int) -> Iterator[tuple[str, Measured]]:
    """Yield every method's name and ranks on a split."""
    removed, histories = trained.removed, trained.data.histories
    users: EvalSplit = histories.evaluation(split)
    is_new = removed[users.targets]
    new, rest = users.take(np.flatnonzero(is_new)), users.take(np.flatnonzero(~is_new))
    others = sample_users(rest, num_others, seed)
    options = DecodingConfig().ranked(LENGTH)

    def measure(recommender: Recommender, **changes: Any) -> Measured:
        lists = recommender.recommend(new.histories(), options, **changes).items
        ranks = target_ranks(lists, new.targets)
        if "allowed_items" in changes:
            return Measured(ranks)
        found = recommender.recommend(others.histories(), options, **changes).items
        part = float(removed[found[found >= 0]].mean())
        return Measured(ranks, target_ranks(found, others.targets), part, len(rest) / len(others))

    for boost in BOOSTS:
        yield f"{MODEL}, boost {boost:g}", measure(trained.recommender, new_item_boost=boost)
    yield f"{MODEL}, new items only", measure(trained.recommender, allowed_items=removed)
    known = trained.recommender.recommend(new.histories(), options, allowed_items=~removed).items
    levels = trained.nearest_codes.shape[1]
    for width in (levels, levels - 1):
        lists = insert_by_prefix(known, packed(trained.nearest_codes[:, :width]), removed, EPSILON)
        yield f"paper, first {width} codes, epsilon {EPSILON}", Measured(target_ranks(lists, new.targets))
    for kind in BASELINES:
        config = ModelConfig.of_kind(kind, "kind")(kind=kind)
        recommender = load_family(config).recommender(nn.Module(), config, trained.data, CPU)
        yield kind, measure(recommender)
        if kind == NEIGHBORS:
            yield f"{kind}, new items only", measure(recommender, allowed_items=removed)


def format_table(split: str, methods: dict[str, list[Measured]]) -> str:
    """Return a Markdown table of one split: metrics over the users of all seeds, Recall@10 per seed in parentheses."""
    recall, ndcg = f"recall@{LENGTH}", f"ndcg@{LENGTH}"
    users = ", ".join(str(len(measured.new)) for measured in next(iter(methods.values())))
    lines = [
        f"{split}, users whose target is a removed item, per seed: {users}",
        "",
        "| method | Recall@10 (per seed) | 95 % | NDCG@10 | 95 % | other users R@10 | all users R@10 | new in lists |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, seeds in methods.items():
        ranks = np.concatenate([measured.new for measured in seeds])
        values, bounds = ranking(ranks, (LENGTH,)), confidence(ranks, (LENGTH,))
        each = ", ".join(_short(ranking(measured.new, (LENGTH,))[recall]) for measured in seeds)
        cells = [name, f"{_short(values[recall])} ({each})", " to ".join(map(_short, bounds[recall]))]
        cells += [_short(values[ndcg]), " to ".join(map(_short, bounds[ndcg]))]
        if all(measured.others is not None for measured in seeds):
            others = np.concatenate([measured.others for measured in seeds if measured.others is not None])
            cells.append(_short(ranking(others, (LENGTH,))[recall]))
            cells.append(_short(float(np.mean([measured.all_users() for measured in seeds]))))
            cells.append(_short(float(np.mean([measured.new_in_lists for measured in seeds]))))
        else:
            cells += [""] * 3
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.4f}".removeprefix("0")


def main(arguments: Sequence[str]) -> None:
    """Train and measure, seed after seed."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    settings = dict(argument.split("=", 1) for argument in arguments)
    if "root" not in settings:
        raise ConfigError("root is missing: name the folder of the artifacts of `jobs.pipeline beauty-cpu`, root=RUNS")
    root, work, ids = settings.pop("root"), settings.pop("work", None), settings.pop("ids", "rebuilt")
    if ids not in ("rebuilt", "artifact"):
        raise ConfigError(f"ids = {ids}: it is neither rebuilt nor artifact; remove ids to have them rebuilt")
    first, num_seeds = int(settings.pop("first_seed", "0")), int(settings.pop("seeds", "3"))
    fraction, num_others = float(settings.pop("fraction", "0.05")), int(settings.pop("others", "4000"))
    run = load(RunConfig, settings.pop("config", "beauty-cpu"), [f"{k}={v}" for k, v in settings.items()], CONFIGS)
    source = Source.open(root)
    measured: dict[Split, dict[str, list[Measured]]] = {split: {} for split in SPLITS}
    for seed in range(first, first + num_seeds):
        trained = train(run, source, seed, fraction, ids == "rebuilt", Folder(work) if work else None)
        for split in SPLITS:
            for method, found in evaluate(trained, split, num_others, seed):
                measured[split].setdefault(method, []).append(found)
                print(json.dumps({"seed": seed, "split": split, "method": method} | found.figures()), flush=True)
    for split in SPLITS:
        print(f"\n{format_table(split, measured[split])}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
