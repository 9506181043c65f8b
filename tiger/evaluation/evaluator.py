"""Evaluate recommenders on the same users: metrics with intervals, paired differences, groups of users.

Lists are of items, not of codes, over all users or a sample drawn by seed, with no sampled negatives; once with every
item allowed and once without those of the history. Interactions of equal times are in the order of the raw file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field

from tiger.core.config import Config
from tiger.data.histories import EvalSplit
from tiger.metrics import ranking
from tiger.metrics.lists import LIST_METRICS, ListSums
from tiger.metrics.ranking import CUTOFFS, user_metrics
from tiger.models.decoding import DecodingConfig
from tiger.models.recommender import Recommender

LIST_LENGTH = max(CUTOFFS)
_CUTOFF = 10  # of metrics that are reported at one cutoff
_LENGTHS, _POPULARITIES = (3, 5, 10, 20), (0, 4, 9, 19, 49)  # upper edges of the groups that are reported

_UNSEEN = "0 to 0"  # the group of targets without interactions in training


class EvaluationConfig(Config):
    """What is evaluated, and on whom."""

    unfingerprinted: ClassVar[frozenset[str]] = frozenset({"compare_with", "semantic_ids"})  # they count by content

    metrics: list[str] = Field(
        ["recall", "ndcg", "mrr"],
        min_length=1,
        description="metrics of users: recall, ndcg, mrr, or the dotted name of a function (ranks, cutoff) -> values",
    )
    baselines: list[str] = Field(
        ["popularity", "markov_chain", "nearest_neighbors"],
        description="model families that are evaluated on the same users; those that need no training",
    )
    compare_with: list[str] = Field(
        [], description="folders of further models of the same catalog, such as SASRec's, evaluated on the same users"
    )
    semantic_ids: str | None = Field(
        None,
        description="folder of the semantic IDs of an append (tiger append), whose items are then in the lists",
    )
    max_users: int | None = Field(None, ge=1, description="users per split, sampled by seed; none: all")
    num_exact_users: int = Field(
        300, ge=0, description="test users for whom beam search is compared with scoring every item; 0: none"
    )
    seed: int = Field(0, ge=0, description="seed of the sample of users and of the bootstrap")


class GroupResult(BaseModel):
    """Recall@10 of a group of users."""

    users: int
    recall: float


class MethodResult(BaseModel):
    """Metrics of one recommender on the users of a split."""

    metrics: dict[str, float] = Field(description="metrics with every item allowed, averaged over users")
    ci95: dict[str, tuple[float, float]] = Field(description="95% confidence intervals over users")
    exclude_seen: dict[str, float] = Field(description="metrics without the items of the histories")
    lists: dict[str, float] = Field(description="metrics of all lists together, at cutoff 10")
    by_history_length: dict[str, GroupResult]
    by_target_popularity: dict[str, GroupResult]


class SplitResult(BaseModel):
    """All methods on the users of a split; the first method is the evaluated model."""

    users: int
    methods: dict[str, MethodResult]
    paired: dict[str, dict[str, tuple[float, float, float]]] = Field(
        description="by method, how much better the first one is: difference and bounds of its 95% interval"
    )

    def table(self, name: str) -> str:
        """Format the metrics as text: the first method with intervals, the others, groups, and differences."""
        first, *others = self.methods
        result = self.methods[first]
        heads = "".join(f"{other.replace('_', ' '):>20}" for other in others)
        lines = [
            f"{name}, {self.users:,} users",
            f"{'':<12}{first:>9}  {'95% interval':<18}{'seen excluded':>14}{heads}",
        ]
        for metric, value in result.metrics.items():
            low, high = result.ci95[metric]
            row = "".join(f"{self.methods[other].metrics[metric]:>20.4f}" for other in others)
            interval = f"{low:.4f} to {high:.4f}"
            lines.append(f"{metric:<12}{value:>9.4f}  {interval:<18}{result.exclude_seen[metric]:>14.4f}{row}")
        for title, groups in (
            ("by history length", result.by_history_length),
            ("by target popularity", result.by_target_popularity),
        ):
            shown = (f"{group}: {value.recall:.4f} ({value.users:,})" for group, value in groups.items())
            lines.append(f"recall@{_CUTOFF} {title}: {', '.join(shown)}")
        for other, differences in self.paired.items():
            if f"recall@{_CUTOFF}" in differences:
                difference, low, high = differences[f"recall@{_CUTOFF}"]
                lines.append(
                    f"recall@{_CUTOFF}, {first} minus {other.replace('_', ' ')}: {difference:+.4f} "
                    f"({low:+.4f} to {high:+.4f}, paired)"
                )
        return "\n".join(lines)

    def short_table(self, name: str) -> str:
        """Format one line per method: two metrics with an interval, and Recall@10 of items unknown to training."""
        first = next(iter(self.methods.values()))
        shown = [metric for metric in (f"recall@{_CUTOFF}", f"ndcg@{_CUTOFF}") if metric in first.metrics]
        shown = shown or list(first.metrics)[:1]
        unseen = first.by_target_popularity.get(_UNSEEN)
        heads = f"{shown[0]:>10}  {'95% interval':<18}" + "".join(f"{metric:>9}" for metric in shown[1:])
        lines = [f"{f'{name}, {self.users:,} users':<24}{heads}" + (f"{'new items':>12}" if unseen else "")]
        for method, result in self.methods.items():
            low, high = result.ci95[shown[0]]
            line = f"{method.replace('_', ' '):<24}{result.metrics[shown[0]]:>10.4f}  {f'{low:.4f} to {high:.4f}':<18}"
            line += "".join(f"{result.metrics[metric]:>9.4f}" for metric in shown[1:])
            lines.append(line + (f"{result.by_target_popularity[_UNSEEN].recall:>12.4f}" if unseen else ""))
        if unseen:
            lines.append(f"new items: recall@{_CUTOFF} of {unseen.users:,} users whose next item training has not seen")
        return "\n".join(lines)


class EvaluationResult(BaseModel):
    """The content of evaluation.json; `EvaluationResult.model_json_schema()` is its schema."""

    splits: dict[str, SplitResult] = Field(description="by split: valid, test")
    exact_search: dict[str, float] = Field(
        description="recall@10 of the same test users by width of the beam, and of scoring every item (`exact`)"
    )


@dataclass(frozen=True)
class MethodRanks:
    """What is known of the lists of one recommender for the users of a split.

    Attributes:
        all_items: uint8 [U], rank of each user's target from 1, with every item allowed; 0 if it is not in the list.
        unseen_items: uint8 [U], the same without the items of the histories.
        sums: sums over the lists with every item allowed.
    """

    all_items: npt.NDArray[np.uint8]
    unseen_items: npt.NDArray[np.uint8]
    sums: ListSums

    @classmethod
    def of(
        cls, everything: npt.NDArray[Any], unseen: npt.NDArray[Any], targets: npt.NDArray[Any], num_items: int
    ) -> MethodRanks:
        """Rank the targets [U] in lists [U, K], K at most 255."""
        ranks, unseen_ranks = (ranking.target_ranks(items, targets).astype(np.uint8) for items in (everything, unseen))
        return cls(ranks, unseen_ranks, ListSums.of(everything, num_items, _CUTOFF))


@dataclass(frozen=True)
class SplitUsers:
    """What metrics need to know of the users of a split; memory is 12 bytes per user.

    Attributes:
        lengths: int32 [U], items of each history.
        target_counts: int64 [U], training interactions of each target.
    """

    lengths: npt.NDArray[np.int32]
    target_counts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of(cls, users: EvalSplit, counts: npt.NDArray[np.int64]) -> SplitUsers:
        """Take the users of a split, with training interactions of every item [items]."""
        return cls((users.end - users.begin).astype(np.int32), counts[users.targets])


def rank(recommender: Recommender, users: EvalSplit, source_ids: Sequence[str], options: DecodingConfig) -> MethodRanks:
    """Return what a recommender's lists for the users of a split come to, made in this process."""
    names = [source_ids[user] for user in users.users]
    everything, unseen = recommender.recommend_with_and_without_seen(
        users.histories(), options.ranked(LIST_LENGTH), users=names
    )
    return MethodRanks.of(everything.items, unseen.items, users.targets, recommender.num_items)


def evaluate(
    methods: Mapping[str, MethodRanks], users: SplitUsers, counts: npt.NDArray[np.int64], config: EvaluationConfig
) -> SplitResult:
    """Evaluate the lists of several methods for the same users.

    Args:
        methods: by name; the first one is compared with the others.
        users: the users of a split.
        counts: int64 [items], interactions of every item in training.
        config: the metrics.
    """
    metrics = user_metrics(config.metrics)
    first, *others = methods
    return SplitResult(
        users=len(users),
        methods={
            name: MethodResult(
                metrics=ranking.ranking(found.all_items, metrics=metrics),
                ci95=ranking.confidence(found.all_items, seed=config.seed, metrics=metrics),
                exclude_seen=ranking.ranking(found.unseen_items, metrics=metrics),
                lists=_list_metrics(found.sums, counts),
                by_history_length=_groups(found.all_items, users.lengths, _LENGTHS),
                by_target_popularity=_groups(found.all_items, users.target_counts, _POPULARITIES),
            )
            for name, found in methods.items()
        },
        paired={
            name: ranking.paired_difference(
                methods[first].all_items, methods[name].all_items, seed=config.seed, metrics=metrics
            )
            for name in others
        },
    )


def _list_metrics(sums: ListSums, counts: npt.NDArray[np.int64]) -> dict[str, float]:
    shown = sums.shown
    return {f"{metric}@{_CUTOFF}": value(shown, counts) for metric, value in LIST_METRICS.items()}


def _groups(ranks: npt.NDArray[np.integer], values: npt.NDArray[Any], edges: tuple[int, ...]) -> dict[str, GroupResult]:
    groups = ranking.by_group(ranks, values, edges, _CUTOFF)
    return {name: GroupResult(users=int(group["users"]), recall=group["recall"]) for name, group in groups.items()}


def compare_with_exact(
    recommender: Recommender,
    histories: Sequence[npt.NDArray[Any]],
    targets: npt.NDArray[Any],
    names: Sequence[str],
    options: DecodingConfig,
) -> dict[str, float]:
    """Return Recall@10 with beams of 20, of `options.beam`, and as wide as the catalog, which scores every item.

    Args:
        recommender: a generative model.
        histories: of each user.
        targets: [U], the next item of each user.
        names: id of each user.
        options: how lists are made.
    """
    results: dict[str, float] = {"users": len(histories)}
    for beam in dict.fromkeys((20, options.beam, recommender.num_items)):
        batch_size = max(1, min(options.batch_size, 50_000 // beam))
        changed = options.ranked(_CUTOFF).model_copy(update={"beam": beam, "batch_size": batch_size})
        found = recommender.recommend(histories, changed, users=names)
        recall = ranking.ranking(ranking.target_ranks(found.items, targets), cutoffs=(_CUTOFF,))
        results["exact" if beam == recommender.num_items else f"beam_{beam}"] = recall[f"recall@{_CUTOFF}"]
    return results


__all__ = [
    "LIST_LENGTH",
    "EvaluationConfig",
    "EvaluationResult",
    "MethodRanks",
    "MethodResult",
    "SplitResult",
    "SplitUsers",
    "compare_with_exact",
    "evaluate",
    "rank",
]
