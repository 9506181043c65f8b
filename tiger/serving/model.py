"""One model of the service with what it needs to answer: loaded, verified and probed before it answers anybody."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from tiger.core.artifacts import open_artifact
from tiger.core.config import Config
from tiger.core.errors import HealthError
from tiger.data.grown_catalog import is_append
from tiger.models.base import ModelConfig
from tiger.models.decoding import DecodingConfig
from tiger.models.recommender import Recommender
from tiger.semantic_ids.assignment import SemanticIds
from tiger.serving.items import ItemTable
from tiger.serving.schemas import BeamPrefix, Filters, ItemSummary, PrefixDetails, Recommendation, Request
from tiger.serving.search import TitleIndex
from tiger.serving.tree import PrefixTree

log = logging.getLogger(__name__)

BATCH = 64
"""Histories that are decoded at once."""

_PROBES, _PROBE_LENGTH, _PROBE_K = 16, 3, 10


class ModelVersion(Config):
    """What a service answers with: a model, and the items that were appended to its catalog."""

    model: str = Field(min_length=1, description="URI of the model artifact")
    semantic_ids: str | None = Field(
        None,
        min_length=1,
        description="URI of the semantic IDs of an append to the model's; none: of its training",
    )

    def __str__(self) -> str:
        """Return the URIs, for messages."""
        return self.model if self.semantic_ids is None else f"{self.model} with {self.semantic_ids}"


class Ranked(NamedTuple):
    """The top items of one history with their scores, best first, and whether they are the most popular ones."""

    items: list[tuple[int, float]]
    by_popularity: bool


@dataclass(frozen=True)
class Query:
    """One history to decode, by the model that was current when its request came.

    Attributes:
        model: the model.
        history: known items, oldest first.
        user: the user's id; empty for none.
        options: of the list.
        filters: which items may be recommended.
        key: of the filters: queries of equal options and keys are decoded together.
    """

    model: ServedModel
    history: list[int]
    user: str
    options: DecodingConfig
    filters: Filters
    key: str


class ServedModel:
    """A recommender with the ids, titles and fields of its items, the search of titles, and the prefix tree.

    Items that an append has deleted may be in histories; they are not recommended, searched, or in the tree.

    Attributes:
        name: kind and fingerprint of the model; with appended items, `+` and those of their semantic IDs.
        version: the folders that it was loaded from.
        ids_name: kind and fingerprint of the semantic IDs; None for a model without.
        available: bool [items], items that are not deleted; None: all.
        tree: None for a model without semantic IDs.
    """

    def __init__(
        self,
        recommender: Recommender,
        items: ItemTable,
        ids: SemanticIds | None = None,
        *,
        name: str = "model",
        version: ModelVersion | None = None,
        ids_name: str | None = None,
        is_personalized: bool = True,
    ) -> None:
        self.recommender, self.items, self.name, self.ids_name = recommender, items, name, ids_name
        self.version = version or ModelVersion(model=name)
        self.is_personalized = is_personalized
        self.available = available = recommender.available
        self.counts = recommender.training_counts()
        self.is_new: npt.NDArray[np.bool_] = self.counts == 0
        self.search = TitleIndex(items.titles, self.counts, available)
        self.tree = None if ids is None else PrefixTree(ids, items.source_ids, items.titles, self.counts, available)

    @classmethod
    def load(cls, uri: str, device: str = "cpu", semantic_ids: str | None = None) -> ServedModel:
        """Open a model artifact, compare its files with their checksums, and try it; see `probe`.

        Args:
            uri: folder of the model.
            device: where to compute.
            semantic_ids: folder of the semantic IDs of an append to the model's (`tiger append`), to serve its items
                and fields; None: the items of the training.

        Raises:
            ArtifactError: one of them is missing, incomplete, altered, or of another kind; or the semantic IDs do not
                continue those of the model, or it cannot score items that training has not seen.
            HealthError: the model is degenerate.
        """
        artifact = open_artifact(uri, expected_kind="model")
        given = None if semantic_ids is None else open_artifact(semantic_ids, expected_kind="semantic_ids")
        recommender = Recommender.load(artifact, device=device, semantic_ids=given)
        assert recommender.catalog is not None
        ids = given or artifact.inputs.get("semantic_ids")
        name = f"{artifact.kind}-{artifact.fingerprint}"
        ids_name = f"{ids.kind}-{ids.fingerprint}" if ids else None
        config: ModelConfig = ModelConfig.resolve(artifact.manifest["config"])
        model = cls(
            recommender,
            ItemTable.read(recommender.catalog.items_folder),
            SemanticIds.load(ids) if ids else None,
            name=f"{name}+{ids_name}" if ids and is_append(ids) else name,
            version=ModelVersion(model=uri, semantic_ids=semantic_ids),
            ids_name=ids_name,
            is_personalized=config.personalized,
        )
        model.probe()
        return model

    # --- items --------------------------------------------------------------------------------------------------

    @property
    def num_items(self) -> int:
        """Number of items that are not deleted."""
        return len(self.items.source_ids) if self.available is None else int(self.available.sum())

    def is_deleted(self, item: int) -> bool:
        """Return whether an append has deleted an item."""
        return self.available is not None and not self.available[item]

    def find(self, query: str, limit: int) -> list[int]:
        """Return at most `limit` items: the one whose id is the query, then those with its words in their titles."""
        found = self.search.find(query, limit)
        exact = self.items.index.get(query, self.items.index.get(query.strip()))
        if exact is not None and not self.is_deleted(exact):
            found = [exact, *(item for item in found if item != exact)][:limit]
        return found

    def allowed(self, filters: Filters) -> npt.NDArray[np.bool_] | None:
        """Return which items may be recommended, bool [items]: those that pass and are not deleted; None: all.

        Raises:
            ValueError: a filter asks for a field that the catalog does not have, or for an unknown category.
        """
        passing = self.items.allowed(filters, self.is_new)
        return self.available if passing is None else passing if self.available is None else passing & self.available

    # --- health -------------------------------------------------------------------------------------------------

    def probe(self, probes: int = _PROBES) -> None:
        """Recommend after a few different histories of popular items, and judge the lists.

        Raises:
            HealthError: a list is empty, a score is not finite, or all lists are equal though histories are not.
        """
        known = np.argsort(-self.counts, kind="stable")[: max(int((~self.is_new).sum()), 1)]
        picks = np.linspace(0, len(known) - 1, probes * _PROBE_LENGTH).astype(np.int64)
        histories = known[picks].reshape(_PROBE_LENGTH, probes).T
        options = DecodingConfig(k=_PROBE_K, exclude_seen=False)
        found = self.recommender.recommend(list(histories), options, users=[""] * len(histories))
        real = found.items >= 0
        if not real[:, 0].all():
            raise HealthError(f"{self.name} is degenerate: it recommends nothing after {self._names(histories[0])}")
        if not np.isfinite(found.scores[real]).all():
            raise HealthError(f"{self.name} is degenerate: its scores are not finite; were the weights damaged?")
        if self.is_personalized and probes > 1 and self.num_items > 1 and (found.items == found.items[0]).all():
            raise HealthError(
                f"{self.name} is degenerate: it recommends the same items after {probes} different histories"
            )

    def _names(self, history: npt.NDArray[np.int64]) -> str:
        return ", ".join(self.items.source_ids[item] for item in history.tolist())

    # --- recommendations ----------------------------------------------------------------------------------------

    def queries(self, request: Request, defaults: DecodingConfig) -> tuple[list[Query], list[list[str]]]:
        """Return a query per history, and the ids of each history that the catalog does not have.

        Raises:
            ValueError: the request asks for more than this model and its server have; says which key.
        """
        if request.k > defaults.beam:
            raise ValueError(f"k: must be at most {defaults.beam}, the beam of this server")
        if request.max_per_first_code is not None and self.tree is None:
            raise ValueError("max_per_first_code: this model has no semantic IDs")
        changes = {
            "k": request.k,
            "exclude_seen": request.exclude_seen,
            "temperature": request.temperature,
            "seed": request.seed,
            "max_per_first_code": request.max_per_first_code,
        }
        options = defaults.model_copy(
            update={key: value for key, value in changes.items() if value is not None} | {"batch_size": BATCH}
        )
        key = request.filters.model_dump_json()
        self.allowed(request.filters)  # reports a filter that cannot be applied
        queries, ignored = [], []
        for names, user in request.rows():
            if user is None and self.recommender.needs_users:
                raise ValueError("user: required, because this model has user tokens")
            history = [self.items.index[name] for name in names if name in self.items.index]
            ignored.append([name for name in names if name not in self.items.index])
            queries.append(Query(self, history, user or "", options, request.filters, key))
        return queries, ignored

    def decode(self, queries: list[Query]) -> list[Ranked]:
        """Return the list of every query; those of equal options and filters are decoded together."""
        groups: dict[tuple[DecodingConfig, str], list[int]] = defaultdict(list)
        for row, query in enumerate(queries):
            groups[query.options.model_copy(update={"k": 1}), query.key].append(row)
        ranked = [Ranked([], False)] * len(queries)
        for (options, _), rows in groups.items():
            group = [queries[row] for row in rows]
            found = self._decode_group(group, options.model_copy(update={"k": max(each.options.k for each in group)}))
            for row, each in zip(rows, found, strict=True):
                ranked[row] = each
        return ranked

    def _decode_group(self, queries: list[Query], options: DecodingConfig) -> list[Ranked]:
        allowed = self.allowed(queries[0].filters)
        if allowed is not None and not allowed.any():
            return [Ranked([], not query.history) for query in queries]
        found = self.recommender.recommend(
            [np.array(query.history, np.int64) for query in queries],
            options,
            users=[query.user for query in queries],
            allowed_items=allowed,
        )
        columns = zip(queries, found.items.tolist(), found.scores.tolist(), found.by_popularity.tolist(), strict=True)
        return [
            Ranked([pair for pair in zip(items, scores, strict=True) if pair[0] >= 0][: query.options.k], popular)
            for query, items, scores, popular in columns
        ]

    def recommendations(self, ranked: Ranked) -> list[Recommendation]:
        """Return the items of a list as they are sent."""
        return [
            Recommendation(
                item=self.items.source_ids[item],
                title=self.items.titles[item],
                score=score,
                semantic_id=self.tree.codes(item) if self.tree else None,
            )
            for item, score in ranked.items
        ]

    def summaries(self, items: list[int]) -> list[ItemSummary]:
        """Return ids, titles and semantic IDs of items."""
        return [
            ItemSummary(
                item=self.items.source_ids[item],
                title=self.items.titles[item],
                semantic_id=self.tree.codes(item) if self.tree else None,
            )
            for item in items
        ]

    def prefix(self, codes: tuple[int, ...], limit: int) -> PrefixDetails | None:
        """Return what is below a prefix of semantic IDs; None if no ID begins with it."""
        assert self.tree is not None
        below = self.tree.items(codes)
        if not len(below):
            return None
        children, num_children = self.tree.children(codes, limit)
        return PrefixDetails(
            prefix=list(codes),
            depth=self.tree.depth,
            num_items=len(below),
            num_children=num_children,
            words=list(self.tree.words(codes)) if codes else [],
            children=children,
            items=self.summaries(below[:limit].tolist()) if len(codes) >= self.tree.depth - 1 else [],
            model=self.name,
        )

    def explain(self, query: Query, ranked: Ranked) -> list[list[BeamPrefix]]:
        """Return the prefixes that the beam search for a query keeps, per level; none for an empty history."""
        if self.tree is None or not query.history or not ranked.items:
            return []
        allowed = self.allowed(query.filters)
        history = np.array(query.history, np.int64)
        levels = self.recommender.kept_prefixes(history, query.options, query.user, allowed)
        found = [tuple(self.tree.codes(item)) for item, _ in ranked.items]
        explained = []
        for level, kept in enumerate(levels, 1):
            recommended = [id_[:level] for id_ in found]
            explained.append(
                [
                    BeamPrefix(
                        prefix=list(prefix),
                        score=score,
                        num_items=len(self.tree.items(prefix)),
                        recommended=recommended.count(prefix),
                        words=list(self.tree.words(prefix)) if prefix in recommended else [],
                    )
                    for prefix, score in kept
                ]
            )
        return explained
