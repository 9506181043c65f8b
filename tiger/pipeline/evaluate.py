"""Evaluate a model: Recall, NDCG and MRR on validation and test, next to baselines under the same evaluator.

Lists are of items, not of codes, over all users or a sample drawn by seed, with no sampled negatives; once with every
item allowed and once without those of the history. Interactions of equal times stand in the order of the raw file.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from tiger.core import artifacts, tracking
from tiger.core.artifacts import Artifact, Draft
from tiger.data.catalog import Catalog
from tiger.data.histories import EvalSplit, Split
from tiger.embedding.vectors import load_embeddings
from tiger.evaluation.health import check_recommendations, invalid, require
from tiger.metrics import ranking as metrics
from tiger.models import baselines
from tiger.models.recommender import Recommender
from tiger.on_ray.recommend import recommend_users
from tiger.pipeline.train import ensure_model
from tiger.run import RunConfig

log = logging.getLogger(__name__)

K = max(metrics.CUTOFFS)
SPLITS: tuple[Split, ...] = ("valid", "test")
_LENGTHS, _POPULARITIES = (3, 5, 10, 20), (0, 4, 9, 19, 49)  # upper edges of the groups that are reported
_EXACT_ITEMS = 100_000  # scoring every item of a larger catalog takes more than seconds a user

Lists = npt.NDArray[np.int64]


def evaluate(run: RunConfig, model: Artifact) -> Artifact:
    catalog = Catalog(model.inputs["catalog"])

    def make(draft: Draft) -> None:
        histories = catalog.histories
        figures: dict[str, Any] = {}
        splits = {split: select_users(run, catalog, split) for split in SPLITS}
        lists, masked = recommend_users(  # both splits through one pool: an actor takes long to start
            model,
            histories,
            [user for users in splits.values() for user in users.users.tolist()],
            [history for users in splits.values() for history in users.histories()],
            draft,
            "lists",
            k=K,
            beam=run.evaluation.beam,
            history="both",
            max_actors=run.evaluation.max_actors,
            scale=run.scale,
        )
        assert masked is not None
        vectors = load_embeddings(model.inputs["semantic_ids"].inputs["embeddings"].folder).numpy()
        counts = baselines.item_counts(histories, catalog.n_items)
        begin = 0
        for split, users in splits.items():
            own = slice(begin, begin := begin + len(users))
            tiger = compute_metrics(lists[own], masked[own], users, counts)
            others = _baselines(catalog, users, vectors)
            figures[split] = {"users": len(users), "tiger": tiger} | {
                name: compute_metrics(found[:, :K], drop_seen(found, users)[:, :K], users, counts)
                for name, found in others.items()
            }
            ranks = metrics.target_ranks(lists[own], users.targets)
            figures[split]["paired_difference"] = {
                name: metrics.paired_difference(ranks, metrics.target_ranks(found[:, :K], users.targets))
                for name, found in others.items()
            }
            log.info("%s, %d users\n%s", split, len(users), _table(figures[split]))
            tracking.record(split, 0, tiger["all_items"] | {"invalid_beams": invalid(lists[own], catalog.n_items)})
            draft.health += require(check_recommendations(lists[own], catalog.n_items))
        figures["exact_search"] = compare_with_exact(run, model, catalog, splits["test"])
        draft.folder.write_json("metrics.json", figures)
        test = figures["test"]
        draft.metrics = {
            name: {figure: round(value, 5) for figure, value in test[name]["all_items"].items()}
            for name in ("tiger", "popularity", "markov_chain", "nearest_embeddings")
        }

    return artifacts.build(run.root, "evaluation", run.evaluation, {"model": model}, make)


def select_users(run: RunConfig, catalog: Catalog, split: Split) -> EvalSplit:
    """All users with a target in the split, or `evaluation.max_users` of them."""
    users = catalog.histories.evaluation(split)
    limit = run.evaluation.max_users
    if limit is None or limit >= len(users):
        return users
    drawn = np.random.default_rng(run.evaluation.seed).permutation(len(users))[:limit]
    return users.take(np.sort(drawn))


def compare_with_exact(run: RunConfig, model: Artifact, catalog: Catalog, users: EvalSplit) -> dict[str, Any]:
    """What the beam loses: the same users by the beam, and by one as wide as the catalog, which scores every item.

    With a dense head once for generation alone, and once for the order that the dense head gives: there the beam also
    decides what the head gets to see. Beams of 20 and of `evaluation.beam`.
    """
    drawn = np.random.default_rng(run.evaluation.seed).permutation(len(users))[: run.evaluation.num_exact_users]
    if not len(drawn) or catalog.n_items > _EXACT_ITEMS:
        log.info("search: not held against scoring every item (%d users, %d items)", len(drawn), catalog.n_items)
        return {}
    asked, recommender = users.take(np.sort(drawn)), Recommender.load(model)
    names = [catalog.histories.source_ids[user] for user in asked.users]
    shares, figures = {"generation": 0.0}, dict[str, Any]()
    if recommender.model.dense:
        shares["with the dense head"] = recommender.model.dense_share
    for title, share in shares.items():
        recommender.model.dense_share = share
        figures[title] = {}
        for beam in (20, run.evaluation.beam, catalog.n_items):
            found = recommender.recommend(
                list(asked.histories()), 10, beam=beam, users=names, batch_size=max(1, min(64, 50_000 // beam))
            )
            recall = metrics.ranking(metrics.target_ranks(found.items, asked.targets), cutoffs=(10,))["recall@10"]
            figures[title]["exact" if beam == catalog.n_items else f"beam_{beam}"] = recall
        log.info(
            "search, %s, %d test users: recall@10 %s",
            title,
            len(asked),
            ", ".join(f"{name} {value:.4f}" for name, value in figures[title].items()),
        )
    return figures | {"users": len(asked)}


def _baselines(catalog: Catalog, users: EvalSplit, vectors: npt.NDArray[np.float32]) -> dict[str, Lists]:
    """Lists of each baseline, long enough that enough is left without the items of any history."""
    histories, taken = catalog.histories, list(users.histories())
    k = K + max(map(len, taken), default=0)
    popular = baselines.popularity(histories, catalog.n_items, k)
    return {
        "popularity": np.tile(popular, (len(users), 1)),
        "markov_chain": baselines.markov_chain(histories, catalog.n_items, taken, k),
        "nearest_embeddings": baselines.nearest_by_embedding(vectors, taken, k),
    }


def compute_metrics(items: Lists, masked: Lists, users: EvalSplit, counts: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Figures with every item allowed (`all_items`) and without the items of the history (`exclude_seen`)."""
    ranks = metrics.target_ranks(items, users.targets)
    return {
        "all_items": metrics.ranking(ranks),
        "ci95": metrics.confidence(ranks),
        "exclude_seen": metrics.ranking(metrics.target_ranks(masked, users.targets)),
        **metrics.coverage(items, len(counts)),
        "popular_item_fraction@10": metrics.popular_item_fraction(items, counts),
        "by_history_length": metrics.by_group(ranks, users.end - users.begin, _LENGTHS),
        "by_target_popularity": metrics.by_group(ranks, counts[users.targets], _POPULARITIES),
    }


def drop_seen(items: Lists, users: EvalSplit) -> Lists:
    """Lists with the items of the users' histories taken out, filled up with -1."""
    result = np.full_like(items, -1)
    for row, history in enumerate(users.histories()):
        kept = items[row][~np.isin(items[row], history)]
        result[row, : len(kept)] = kept
    return result


def _table(figures: dict[str, Any]) -> str:
    names = ["popularity", "markov_chain", "nearest_embeddings"]
    lines = [
        f"{'':<12}{'tiger':>9}  {'95 % interval':<18}{'masked':>9}"
        + "".join(f"{name.replace('_', ' '):>20}" for name in names)
    ]
    for name, value in figures["tiger"]["all_items"].items():
        low, high = figures["tiger"]["ci95"][name]
        lines.append(
            f"{name:<12}{value:>9.4f}  {f'{low:.4f} to {high:.4f}':<18}{figures['tiger']['exclude_seen'][name]:>9.4f}"
            + "".join(f"{figures[other]['all_items'][name]:>20.4f}" for other in names)
        )
    for title in ("by_history_length", "by_target_popularity"):
        groups = figures["tiger"][title].items()
        lines.append(
            f"recall@10 {title.replace('_', ' ')}: "
            + ", ".join(f"{k}: {v['recall@10']:.4f} ({v['users']:,})" for k, v in groups)
        )
    for name in names:
        difference, low, high = figures["paired_difference"][name]["recall@10"]
        lines.append(
            f"recall@10, tiger minus {name.replace('_', ' ')}: {difference:+.4f} ({low:+.4f} to {high:+.4f}, paired)"
        )
    return "\n".join(lines)


def job(run: RunConfig) -> Artifact:
    """Evaluate the model of a configuration; train it first if needed."""
    return evaluate(run, ensure_model(run))
