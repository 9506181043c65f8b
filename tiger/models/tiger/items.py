"""Vectors of items, shared by the encoder's input and the trie's leaves: codes, a learned vector, and text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tiger.core.errors import ConfigError
from tiger.models.tiger.config import TigerConfig
from tiger.models.tiger.pairs import pair_products
from tiger.semantic_ids.trie import Trie

_ITEMS_AT_ONCE = 1 << 14


class ItemEmbedding(nn.Module):
    """Embed items: [...] item ids -> [..., M].

    The learned vector of an item that training has not seen is zero, and item dropout makes that a case that training
    knows: the text then speaks for the item.
    """

    level_offsets: Tensor
    vectors: Tensor
    text_mean: Tensor
    text_std: Tensor
    training_counts: Tensor

    def __init__(self, config: TigerConfig, trie: Trie, vectors: Tensor | None) -> None:
        """
        Args:
            trie: semantic IDs of the catalog.
            vectors: floating-point [items, d] text embeddings, needed by softmax = trie. They are not part of the
                state; their mean and standard deviation are.
        """
        super().__init__()
        d_model, num_items = config.d_model or 0, len(trie.leaf_items)
        offsets = torch.tensor([0, *trie.level_sizes[:-1]]).cumsum(0)
        self.register_buffer("level_offsets", offsets, persistent=False)
        self.code_embedding = nn.Embedding(sum(trie.level_sizes), d_model)
        self.register_buffer("training_counts", torch.ones(num_items, dtype=torch.int64))
        self.dropout = config.item_dropout
        self.learned: nn.Embedding | None = None
        self.text_projection: nn.Linear | None = None
        if config.softmax == "trie":
            if vectors is None or len(vectors) != num_items:
                raise ConfigError(f"model.softmax = trie reads text embeddings of all {num_items} items: pass vectors")
            mean, std = _mean_and_std(vectors)
            self.register_buffer("vectors", vectors, persistent=False)
            self.register_buffer("text_mean", mean)
            self.register_buffer("text_std", std.clamp_min(1e-8))
            self.text_projection = nn.Linear(vectors.shape[1], d_model, bias=False)
            if config.item_vectors:
                self.learned = nn.Embedding(num_items, d_model)
        self._step_seed: Tensor | None = None

    def reset_parameters(self) -> None:
        """Initialize so that code, learned vector and text begin at equal length."""
        nn.init.normal_(self.code_embedding.weight, std=0.05)
        if self.text_projection is not None:
            nn.init.normal_(self.text_projection.weight, std=0.05 * self.text_projection.in_features**-0.5)
        if self.learned is not None:
            nn.init.normal_(self.learned.weight, std=0.05)

    @property
    def known(self) -> Tensor:
        """Which items training has seen, bool [items]."""
        return self.training_counts > 0

    @torch.no_grad()
    def set_training_counts(self, counts: Tensor) -> None:
        """Say how often training sees each item, int64 [items]; learned vectors of items it never sees become zero."""
        self.training_counts.copy_(counts)
        if self.learned is not None:
            self.learned.weight[~self.known] = 0

    def codes(self, trie: Trie, items: Tensor) -> Tensor:
        """Return the rows of `code_embedding` of items' codes, int64 [..., L]; any valid ones for PAD."""
        codes: Tensor = trie.codes[items.clamp_min(0)].long() + self.level_offsets
        return codes

    def begin_step(self) -> None:
        """Choose the items whose learned vectors this training step leaves out."""
        dropping = self.training and self.dropout and self.learned is not None
        self._step_seed = torch.randint(1 << 62, (1,), device=self.level_offsets.device) if dropping else None

    def content(self, items: Tensor) -> Tensor:
        """Return learned vector + projected text of items, [..., M]."""
        assert self.text_projection is not None, "a model with softmax = codes has no item content"
        text = self.project_text(self.vectors[items])
        learned = self.learned_vectors(items)
        return text if learned is None else text + learned

    def learned_vectors(self, items: Tensor) -> Tensor | None:
        """Return the learned vectors of items, [..., M], some of them zero at a training step; None: text alone."""
        if self.learned is None:
            return None
        learned: Tensor = self.learned(items)
        if self.training and self._step_seed is not None:  # the last step's seed outlives it, also in validation
            learned = learned * (_uniform(items, self._step_seed) >= self.dropout)[..., None]
        return learned

    def text_products(self, queries: Tensor, vectors: Tensor, row_of_pair: Tensor, column_of_pair: Tensor) -> Tensor:
        """Return queries[row_of_pair] . project_text(vectors[column_of_pair]), float32 [R].

        The queries are projected, not the text embeddings, of which there are more.

        Args:
            queries: floating-point [T, M].
            vectors: floating-point [n, d] text embeddings.
            row_of_pair: int64 [R], ascending.
            column_of_pair: int64 [R].
        """
        assert self.text_projection is not None
        projected = (queries @ self.text_projection.weight).float() / self.text_std
        products = pair_products(projected, vectors, row_of_pair, column_of_pair)
        return products - (projected @ self.text_mean)[row_of_pair]

    def project_text(self, vectors: Tensor) -> Tensor:
        """Project text embeddings [..., d], standardized with the statistics of training, to [..., M]."""
        assert self.text_projection is not None
        projected: Tensor = self.text_projection((vectors.float() - self.text_mean) / self.text_std)
        return projected


def _mean_and_std(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean vector, float32 [d], and the root mean square of all deviations from it, float32 [].

    No second table is made: catalogs may have vectors of many GB, memory-mapped or in 16 bits.

    Args:
        vectors: floating-point [items, d].
    """
    parts = vectors.split(_ITEMS_AT_ONCE)
    mean = torch.stack([part.sum(0, dtype=torch.float64) for part in parts]).sum(0) / len(vectors)
    variance = torch.stack([(part - mean).square().sum() for part in parts]).sum() / max(1, vectors.numel())
    return mean.float(), variance.sqrt().float()


def _uniform(items: Tensor, seed: Tensor) -> Tensor:
    """Return a number in [0, 1) per item, a hash of (item, seed): equal wherever the item occurs in a step.

    The finalizer of SplitMix64 (Steele et al. 2014); drawing one number per item of the catalog would grow with it.
    """
    x = items * -7046029254386353131 + seed
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -7723592293110705685
    return (x >> 40 & 0xFFFFFF).float() / (1 << 24)
