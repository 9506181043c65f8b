"""Recommendations of the generative model by beam search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tiger.core.precision import allow_tf32
from tiger.data.catalog import Catalog
from tiger.models.base import ModelData
from tiger.models.decoding import DecodingConfig
from tiger.models.padding import pad_right
from tiger.models.recommender import Recommender, Rows, Search
from tiger.models.sampling import hash_users
from tiger.models.tiger import growth
from tiger.models.tiger.batches import pad_histories
from tiger.models.tiger.beam_search import beam_search, new_item_bonus
from tiger.models.tiger.config import TigerConfig
from tiger.models.tiger.model import TigerModel
from tiger.semantic_ids.assignment import SemanticIds
from tiger.semantic_ids.trie import Trie


class TigerRecommender(Recommender):
    """Generates the semantic ID of the next item; beam search can only end on real items."""

    def __init__(self, model: TigerModel, device: torch.device | str = "cpu", catalog: Catalog | None = None) -> None:
        super().__init__(len(model.trie.leaf_items), torch.device(device), catalog)
        allow_tf32(self.device)
        self.model = model.to(self.device).eval()
        self.trie = self.model.trie
        self.num_user_tokens = model.config.num_user_tokens or 0
        self.needs_users = self.num_user_tokens > 0
        self.max_history_items = self.model.encoder.context
        with torch.inference_mode():
            self.node_vectors = self.model.node_vectors()
            self.groups = self.trie.codes[:, 0].long()

    def training_counts(self) -> npt.NDArray[np.int64]:
        """Return how often training has seen each item, int64 [items]."""
        counts: npt.NDArray[np.int64] = self.model.items.training_counts.cpu().numpy()
        return counts

    def search(self, options: DecodingConfig, allowed_items: npt.NDArray[np.bool_] | None) -> Search:
        """Return the beam search under a filter."""
        return self._search(options, allowed_items, None)

    def _search(
        self,
        options: DecodingConfig,
        allowed_items: npt.NDArray[np.bool_] | None,
        kept: list[tuple[Tensor, Tensor]] | None,
    ) -> Search:
        allowed_nodes = None
        if allowed_items is not None:
            allowed_nodes = self.trie.allowed_nodes(torch.from_numpy(allowed_items).to(self.device))
        bonus = new_item_bonus(self.model, options.new_item_boost)

        def search(
            histories: list[Rows], users: Sequence[str] | None, num_results: int, exclude_seen: bool
        ) -> tuple[Tensor, Tensor]:
            flat = np.concatenate(histories)
            lengths = np.array([len(history) for history in histories], np.int64)
            ends = np.cumsum(lengths)
            begins = ends - np.minimum(lengths, self.model.encoder.context)
            tokens = None
            if users is not None and self.num_user_tokens:
                tokens = torch.from_numpy(hash_users(users, self.num_user_tokens)).to(self.device)
            return beam_search(
                self.model,
                pad_histories(flat, begins, ends).to(self.device),
                beam=options.beam,
                num_results=num_results,
                node_vectors=self.node_vectors,
                user=tokens,
                excluded_items=pad_right(histories).to(self.device) if exclude_seen else None,
                allowed_nodes=allowed_nodes,
                bonus=bonus,
                kept=kept,
            )

        return search

    def kept_prefixes(
        self,
        history: Rows,
        options: DecodingConfig,
        user: str | None = None,
        allowed_items: npt.NDArray[np.bool_] | None = None,
    ) -> list[list[tuple[tuple[int, ...], float]]]:
        """Return the prefixes that the beam search keeps, per level with their scores, best first."""
        kept: list[tuple[Tensor, Tensor]] = []
        search = self._search(options, allowed_items, kept)
        search([history], None if user is None else [user], options.beam, options.exclude_seen)
        levels = []
        for level, (nodes, scores) in enumerate(kept):
            ordered = self.trie.paths[self.trie.leaf_items, level].contiguous()  # ascending
            first = self.trie.leaf_items[torch.searchsorted(ordered, nodes[0].to(ordered.dtype))]
            codes = self.trie.codes[first, : level + 1].tolist()
            real = zip(codes, scores[0].tolist(), strict=True)
            levels.append([(tuple(prefix), score) for prefix, score in real if score > -torch.inf])
        return levels


def build(config: TigerConfig, data: ModelData) -> TigerModel:
    """Return the model before training, for the items of `data`."""
    return TigerModel(config, Trie(data.semantic_ids), data.text_embeddings if config.softmax == "trie" else None)


def grow(module: TigerModel, state: dict[str, Tensor], config: TigerConfig, data: ModelData) -> None:
    """Give a model of a catalog with appended items the weights of one trained on the items of `data`."""
    vectors = data.text_embeddings if config.softmax == "trie" else None
    growth.grow(module, state, Trie(data.semantic_ids), vectors)


def warm_start(
    module: TigerModel, state: dict[str, Tensor], config: TigerConfig, ids: SemanticIds, before: Tensor
) -> int:
    """Begin the training of a model from the weights of another one; see `growth.warm_start`."""
    return growth.warm_start(module, state, Trie(ids), before)


def recommender(module: TigerModel, config: TigerConfig, data: ModelData, device: torch.device) -> Recommender:
    """Return a trained model, ready to recommend."""
    return TigerRecommender(module, device)
