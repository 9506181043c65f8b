"""A trained run, ready to recommend: batch jobs, evaluation and serving all call this.

recommender = Recommender.load("runs/model-1a2b3c4d")
recommender.recommend([[17, 4]], k=10).items  # item ids; `Catalog.source_ids` has their names
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from tiger.core.artifacts import Artifact, open_artifact
from tiger.core.config import build
from tiger.core.errors import DataError
from tiger.core.precision import allow_tf32
from tiger.data.catalog import Catalog
from tiger.embedding.vectors import load_embeddings
from tiger.models.tiger.batches import pad_histories, user_token_ids
from tiger.models.tiger.beam_search import beam_search, limit_per_group, new_item_bonus, sample_top_k
from tiger.models.tiger.config import ModelConfig
from tiger.models.tiger.model import TigerModel
from tiger.semantic_ids.assignment import SemanticIds
from tiger.semantic_ids.trie import Trie
from tiger.training.weights import load_weights

_OVERSAMPLING = 4
"""Items a beam that a draw, or a spread over first codes, chooses from."""


@dataclass(frozen=True)
class Recommendations:
    """For each history the best items, best first.

    Attributes:
        items: int64 [U, K] item ids, -1 where the catalog has no more.
        scores: float32 [U, K] log-probabilities, -inf there.
        by_popularity: bool [U], whether the history was empty: its list holds the most popular items of training, with
            the logarithms of their frequencies.
    """

    items: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    by_popularity: npt.NDArray[np.bool_]


class Recommender:
    """A trained model, ready to recommend."""

    def __init__(self, model: TigerModel, device: str | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        allow_tf32(self.device)
        self.model = model.to(self.device).eval()
        self.trie, self.num_items = self.model.trie, len(self.model.trie.leaf_items)
        self.num_user_tokens = model.config.num_user_tokens or 0
        with torch.inference_mode():
            self.node_vectors = self.model.node_vectors()
            self.first_codes = self.trie.codes[:, 0].long()

    @classmethod
    def load(cls, run: str | Artifact, device: str | None = None) -> Recommender:
        """Opens a model artifact, with the semantic IDs that it was trained on.

        Raises:
            ArtifactError: it is missing, incomplete, altered, or not a model.
        """
        artifact = open_artifact(run, expected_kind="model") if isinstance(run, str) else run
        artifact.verify()
        artifact.inputs["semantic_ids"].verify()
        config = build(ModelConfig, artifact.manifest["config"])
        ids = SemanticIds.read(artifact.inputs["semantic_ids"].folder)
        model = TigerModel(config, Trie(ids), load_text_embeddings(config, artifact.inputs["semantic_ids"]))
        load_weights(model, artifact.folder)
        return cls(model, device)

    def recommend(
        self,
        histories: Sequence[Sequence[int] | npt.NDArray[Any]],
        k: int,
        *,
        beam: int = 50,
        exclude_history: bool = False,
        allowed: npt.NDArray[np.bool_] | None = None,
        users: Sequence[str] | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        per_first_code: int | None = None,
        new_item_boost: float = 0.0,
        batch_size: int = 64,
    ) -> Recommendations:
        """The `k` best next items of each history.

        Args:
            histories: item ids in time order; the model reads the most recent ones. An empty one gets the most popular
                items.
            beam: width of the search; at least `k` for lists that are as good as the model.
            exclude_history: leave out the items of the history itself.
            allowed: bool [items], a filter for all users: in stock, of a category. The beam holds nothing else.
            users: names of the users, for a model with user tokens.
            temperature: above 0, what the search found is sampled from and not ranked: see `sample_top_k`. The sample
                is a function of `seed` and the user's name (without `users`, the history's row).
            per_first_code: at most so many items that share their first code, which keeps a list from showing one kind
                of item only; of what the search found, so lists can come back short of `k` (-1).
            new_item_boost: added to the log-probability of items that training has not seen, before normalization.

        Raises:
            DataError: a history holds an item that is not in the catalog; names its row.
            ValueError: an argument is out of its range, users are missing, or `allowed` is of another catalog.
        """
        varied = temperature > 0 or per_first_code is not None
        results = max(k, _OVERSAMPLING * beam) if varied else k
        if k < 1:
            raise ValueError(f"k = {k}: at least one item must be asked for")
        if beam < 1:
            raise ValueError(f"beam = {beam}: at least one prefix must be kept")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature = {temperature}: a number that is not negative is needed")
        if users is not None and len(users) != len(histories):
            raise ValueError(f"{len(users)} users for {len(histories)} histories")
        if not math.isfinite(new_item_boost):
            raise ValueError(f"new_item_boost = {new_item_boost}: a finite number is needed")
        if self.num_user_tokens and users is None:
            raise ValueError("this model reads user tokens: pass users")
        if allowed is not None and np.shape(allowed) != (self.num_items,):
            raise ValueError(f"allowed has shape {np.shape(allowed)}, the catalog {self.num_items} items")
        allowed_nodes = None
        if allowed is not None:
            allowed_nodes = self.trie.allowed_nodes(torch.from_numpy(np.asarray(allowed, bool)).to(self.device))
        bonus = new_item_bonus(self.model, new_item_boost)
        arrays = self._checked(histories)
        items = np.full((len(arrays), k), -1, np.int64)
        scores = np.full((len(arrays), k), -np.inf, np.float32)
        flat = np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
        ends = np.cumsum([len(history) for history in arrays], dtype=np.int64)
        lengths = np.array([len(history) for history in arrays], np.int64)
        begins = ends - np.minimum(lengths, self.model.encoder.context)
        tokens = None
        if users and self.num_user_tokens:
            tokens = torch.from_numpy(user_token_ids(list(users), self.num_user_tokens))
        draws = np.arange(len(arrays))
        if varied and users:
            draws = user_token_ids(list(users), 1 << 31)
        by_popularity = lengths == 0
        if by_popularity.any():
            popular, frequency = self._most_popular(k, allowed)
            items[by_popularity, : len(popular)], scores[by_popularity, : len(popular)] = popular, frequency
        order = np.argsort(ends - begins, kind="stable")[int(by_popularity.sum()) :]  # equal lengths share a batch
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            found, score = beam_search(
                self.model,
                pad_histories(flat, begins[rows], ends[rows]).to(self.device),
                beam=beam,
                num_results=results,
                node_vectors=self.node_vectors,
                user=None if tokens is None else tokens[rows].to(self.device),
                excluded_items=self._padded([arrays[row] for row in rows]) if exclude_history else None,
                allowed_nodes=allowed_nodes,
                bonus=bonus,
            )
            if temperature > 0:
                uniform = np.stack([np.random.default_rng([seed, draws[row]]).random(found.shape[1]) for row in rows])
                noise = torch.from_numpy(uniform.clip(1e-12, 1 - 1e-12)).to(self.device)
                found, score = sample_top_k(found, score, found.shape[1], temperature, noise)
            if per_first_code is not None:
                found, score = limit_per_group(found, score, k, self.first_codes, per_first_code)
            width = min(k, found.shape[1])
            items[rows, :width] = found[:, :width].cpu().numpy()
            scores[rows, :width] = score[:, :width].cpu().numpy()
        return Recommendations(items, scores, by_popularity)

    def _most_popular(
        self, k: int, allowed: npt.NDArray[np.bool_] | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the `k` items that training has seen most, and the logarithms of their frequencies."""
        counts = self.model.items.training_counts.cpu().numpy()
        candidates = np.arange(len(counts)) if allowed is None else np.flatnonzero(allowed)
        items = candidates[np.argsort(-counts[candidates], kind="stable")][:k]
        return items, np.log((counts[items] + 1) / (counts.sum() + len(counts))).astype(np.float32)

    def recommend_with_and_without_seen(
        self, histories: Sequence[npt.NDArray[Any]], k: int, *, beam: int = 50, users: Sequence[str] | None = None
    ) -> tuple[Recommendations, Recommendations]:
        """The `k` best items of each history, once with all items allowed and once without those of the history.

        One search gives both: what a history holds is left out of what the last prefixes lead to. So does
        `exclude_history`. Arguments and errors are those of `recommend`.
        """
        longest = max((len(np.unique(history)) for history in histories), default=0)
        wide = self.recommend(histories, k + longest, beam=beam, users=users)
        items, scores = np.full((len(histories), k), -1, np.int64), np.full((len(histories), k), -np.inf, np.float32)
        for row, history in enumerate(histories):
            kept = np.flatnonzero(~np.isin(wide.items[row], history) & (wide.items[row] >= 0))[:k]
            items[row, : len(kept)], scores[row, : len(kept)] = wide.items[row, kept], wide.scores[row, kept]
        all_items = Recommendations(wide.items[:, :k], wide.scores[:, :k], wide.by_popularity)
        return all_items, Recommendations(items, scores, wide.by_popularity)

    def _checked(self, histories: Sequence[Any]) -> list[npt.NDArray[np.int64]]:
        arrays = []
        for row, history in enumerate(histories):
            if not len(history):
                arrays.append(np.zeros(0, np.int64))
                continue
            array = np.asarray(history, None if isinstance(history, np.ndarray) else object)
            numbers = array.dtype.kind in "iu" or all(
                type(item) is int or isinstance(item, np.integer) for item in array
            )
            if array.ndim != 1 or not numbers:
                raise DataError(f"history {row} holds what is no item id: whole numbers are needed, found {array[0]!r}")
            if array.min() < 0 or array.max() >= self.num_items:
                raise DataError(f"history {row} holds an item outside of 0 .. {self.num_items - 1}")
            arrays.append(array.astype(np.int64))
        return arrays

    def _padded(self, histories: list[npt.NDArray[np.int64]]) -> torch.Tensor:
        longest = max(map(len, histories))
        rows = [np.pad(history, (0, longest - len(history)), constant_values=-1) for history in histories]
        return torch.from_numpy(np.stack(rows)).to(self.device)


class RecommendShard:
    """Recommends to one part of a table: user_id, source_id, history -> user_id, items, scores.

    With `history = "both"` there are also masked_items and masked_scores, without the items of the history.
    """

    def __init__(
        self,
        model: str,
        k: int,
        beam: int,
        history: Literal["allowed", "excluded", "both"],
        options: dict[str, Any] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            options: further arguments of `Recommender.recommend`; `allowed` as item ids.
            device: where to compute; None as for `Recommender.load`.
        """
        self.recommender = Recommender.load(model, None if device is None else str(device))
        self.k, self.beam, self.history, self.options = k, beam, history, dict(options or {})
        if (items := self.options.get("allowed")) is not None:
            self.options["allowed"] = np.isin(np.arange(self.recommender.num_items), items)

    def __call__(self, part: pa.Table) -> pa.Table:
        histories, users = [np.array(history) for history in part["history"].to_pylist()], part["source_id"].to_pylist()
        if self.history == "both":
            found, masked = self.recommender.recommend_with_and_without_seen(
                histories, self.k, beam=self.beam, users=users
            )
            columns = self._columns(found, "") | self._columns(masked, "masked_")
        else:
            found = self.recommender.recommend(
                histories,
                self.k,
                beam=self.beam,
                exclude_history=self.history == "excluded",
                users=users,
                **self.options,
            )
            columns = self._columns(found, "")
        return pa.table({"user_id": part["user_id"], **columns})

    def _columns(self, found: Recommendations, prefix: str) -> dict[str, pa.Array]:
        flat = {"items": pa.array(found.items.ravel().astype(np.int32)), "scores": pa.array(found.scores.ravel())}
        return {f"{prefix}{name}": pa.FixedSizeListArray.from_arrays(values, self.k) for name, values in flat.items()}


def show(catalog: Catalog, history: npt.NDArray[Any], items: npt.NDArray[Any], scores: npt.NDArray[Any]) -> str:
    """One user's history and recommendations as lines for a person: source ids, titles, scores."""
    lines = [f"  had   {catalog.source_ids[item]:<12} {catalog.titles[item]:.90}" for item in history[-5:]]
    for rank, (item, score) in enumerate(zip(items, scores, strict=True), 1):
        if item >= 0:
            lines.append(f"  {rank:>2}. {score:>7.2f} {catalog.source_ids[item]:<12} {catalog.titles[item]:.80}")
    return "\n".join(lines)


def load_text_embeddings(config: ModelConfig, semantic_ids: Artifact) -> torch.Tensor | None:
    """Return the text embeddings of the items, float32 [items, d], for a model with softmax = trie."""
    return load_embeddings(text_embeddings(semantic_ids).folder) if config.softmax == "trie" else None


def text_embeddings(semantic_ids: Artifact) -> Artifact:
    """Return the text embeddings that semantic IDs come from, directly or with co-occurrence added."""
    inputs = semantic_ids.inputs
    return inputs["item_vectors"].inputs["embeddings"] if "item_vectors" in inputs else inputs["embeddings"]
