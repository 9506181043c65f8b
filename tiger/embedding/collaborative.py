"""Item vectors from texts and from what is bought together, for the tokenizer to quantize.

A tree made of texts alone follows what users do only as far as texts tell: with short titles, generation falls behind
a scorer of all items (LOG.md). So half of a vector's length is the text embedding, and half a co-occurrence vector: the
factors of the positive pointwise mutual information of items in the training parts (Levy and Goldberg 2014). Rare and
new items get the co-occurrence vector that their text predicts, by ridge regression, in the measure of how little is
known about them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.sparse
import torch
from pydantic import Field
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from tiger.core.config import Config
from tiger.core.errors import ConfigError
from tiger.core.storage import Folder
from tiger.data.histories import Histories
from tiger.embedding.vectors import vector_column, vector_shards

Matrix = npt.NDArray[np.float32]

_PAIRS_AT_ONCE = 1 << 24


class CollaborativeConfig(Config):
    """How much of an item's vector is what users do, and how that is learned."""

    weight: float = Field(
        0.5, ge=0, lt=1, description="part of co-occurrence in the squared length of a vector; 0: the text alone"
    )
    rank: int = Field(64, ge=1, description="dimensions of the co-occurrence vectors")
    window: int = Field(5, ge=1, description="largest distance of two items of a history that co-occur")
    smoothing: float = Field(
        3.0, ge=0, description="purchases at which an item's own co-occurrence counts as much as its text's prediction"
    )
    ridge: float = Field(10.0, gt=0, description="penalty of the regression from text to co-occurrence")
    seed: int = Field(0, ge=0, description="seed of the factorization and of the rotation")


@dataclass(frozen=True)
class Fusion:
    """How text embeddings become item vectors.

    Attributes:
        config: weight and smoothing.
        text_mean: float32 [d] of the text embeddings.
        prediction: float32 [d + 1, r], from a unit text vector and 1 to the co-occurrence vector.
        rotation: float32 [d + r, d + r] orthogonal. Tokenizers standardize every dimension, which would give text and
            co-occurrence weights by their numbers of dimensions; after a random rotation all dimensions are alike.
        cooccurrence: float32 [items, r], unit vectors or zero.
        counts: [items] purchases.
    """

    config: CollaborativeConfig
    text_mean: Matrix
    prediction: Matrix
    rotation: Matrix
    cooccurrence: Matrix
    counts: npt.NDArray[np.int64]

    def tensors(self) -> dict[str, Tensor]:
        """Return what new items are fused with, as tensors to store."""
        arrays = {"text_mean": self.text_mean, "prediction": self.prediction, "rotation": self.rotation}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def __call__(self, items: npt.NDArray[np.integer], text: Matrix) -> Matrix:
        """Return item vectors float32 [n, d + r] of items [n] with text embeddings [n, d]."""
        return self.fuse(self.cooccurrence[items], self.counts[items], text)

    def fuse(self, cooccurrence: Matrix, counts: npt.NDArray[np.int64], text: Matrix) -> Matrix:
        """Return item vectors float32 [n, d + r] of co-occurrence vectors [n, r], purchases [n] and texts [n, d]."""
        unit_text = unit_rows(text - self.text_mean)
        predicted = with_constant(unit_text) @ self.prediction
        count = counts[:, None].astype(np.float32)
        smoothing = self.config.smoothing
        mixed = unit_rows((count * cooccurrence + smoothing * predicted) / np.maximum(count + smoothing, 1e-9))
        weight = self.config.weight
        fused = np.concatenate([np.sqrt(1 - weight) * unit_text, np.sqrt(weight) * mixed], axis=1, dtype=np.float32)
        rotated: Matrix = fused @ self.rotation
        return rotated

    def of_new_items(self, text: Matrix) -> Matrix:
        """Return item vectors float32 [n, d + r] of items without purchases: their texts predict co-occurrence."""
        none = np.zeros((1, self.prediction.shape[1]), np.float32)
        unknown = replace(self, cooccurrence=none, counts=np.zeros(1, np.int64))
        fused: Matrix = unknown(np.zeros(len(text), np.int64), text)
        return fused


def load_fusion(config: dict[str, Any], folder: Folder) -> Fusion:
    """Return how the items of an artifact were fused, for new items: without those of its own.

    Args:
        config: values of a `CollaborativeConfig`.
        folder: folder of the item vectors.
    """
    arrays = {name: tensor.numpy() for name, tensor in folder.read_tensors("fusion.safetensors").items()}
    rank = arrays["prediction"].shape[1]
    return Fusion(
        CollaborativeConfig.model_validate(config), **arrays, cooccurrence=np.zeros((0, rank), np.float32),
        counts=np.zeros(0, np.int64),
    )  # fmt: skip


@dataclass(frozen=True)
class KnownFactors:
    """Co-occurrence vectors of an earlier training.

    Attributes:
        items: int64 [c], items of the new training that had one.
        vectors: float32 [c, r], theirs.
    """

    items: npt.NDArray[np.int64]
    vectors: Matrix


def factors_of(fused: Folder, config: dict[str, Any], items: npt.NDArray[np.integer]) -> Matrix:
    """Return the co-occurrence parts of fused vectors, float32 [n, r]: what their tokenizer was trained on.

    Args:
        fused: folder of item vectors, which are read shard by shard.
        config: values of their `CollaborativeConfig`.
        items: [n] items of that folder.
    """
    fusion = load_fusion(config, fused)
    dim, order = len(fusion.text_mean), np.argsort(items)
    factors = np.zeros((len(items), len(fusion.rotation) - dim), np.float32)
    for own, vectors in vector_shards(fused):
        place = np.minimum(np.searchsorted(items, own, sorter=order), len(items) - 1)
        found = items[order[place]] == own
        parts = (vectors[found] @ fusion.rotation.T)[:, dim:] / np.float32(np.sqrt(fusion.config.weight))
        factors[order[place[found]]] = parts
    return factors


def rotation_onto(vectors: Matrix, known: KnownFactors) -> Matrix:
    """Return the rotation [r, r] of co-occurrence vectors [items, r] onto those of an earlier training.

    A factorization is determined up to a rotation, and codebooks of before know one of them (orthogonal Procrustes
    problem, Schoenemann 1966).

    Raises:
        ConfigError: the numbers of dimensions differ.
    """
    if vectors.shape[1] != known.vectors.shape[1]:
        raise ConfigError(
            f"warm_start: co-occurrence vectors have {vectors.shape[1]} dimensions, those of before "
            f"{known.vectors.shape[1]}; set collaborative.rank to that of before"
        )
    left, _, right = np.linalg.svd(vectors[known.items].T.astype(np.float64) @ known.vectors)
    rotation: Matrix = (left @ right).astype(np.float32)
    return rotation


def fit_fusion(
    config: CollaborativeConfig, embeddings: Folder, histories: Histories, known: KnownFactors | None = None
) -> Fusion:
    """Learn how to fuse text embeddings with the training parts of histories; nothing later is read.

    Args:
        config: weight, rank, window and penalties.
        embeddings: a folder of text embeddings. They are read shard by shard, twice.
        histories: users' items; only their training parts are read.
        known: co-occurrence vectors of an earlier training to align with.
    """
    num_items, text_sum = 0, np.zeros(1)
    for _, text in vector_shards(embeddings):
        num_items, text_sum = num_items + len(text), text_sum + text.sum(0, dtype=np.float64)
    text_mean = (text_sum / num_items).astype(np.float32)
    counts = histories.training_counts(num_items)
    cooccurrence = _factors(_count_pairs(histories, num_items, config.window), config.rank, config.seed)
    if known is not None:
        cooccurrence = cooccurrence @ rotation_onto(cooccurrence, known)
    dim = len(text_mean)
    gram, product = config.ridge * np.eye(dim + 1), np.zeros((dim + 1, cooccurrence.shape[1]))
    for items, text in vector_shards(embeddings):
        own_gram, own_product = regression_sums(text - text_mean, cooccurrence[items], counts[items])
        gram += own_gram
        product += own_product
    prediction = np.linalg.solve(gram, product).astype(np.float32)
    rotation = random_rotation(dim + cooccurrence.shape[1], config.seed)
    return Fusion(config, text_mean, prediction, rotation, cooccurrence, counts)


def regression_sums(
    text: Matrix, factors: Matrix, counts: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the Gram matrix [d + 1, d + 1] and the product [d + 1, r] of the regression from texts to co-occurrence.

    Args:
        text: float32 [n, d] centered text embeddings.
        factors: float32 [n, r] co-occurrence vectors; items with a zero vector are left out.
        counts: [n] purchases, the weights of the items.
    """
    x = with_constant(unit_rows(text)).astype(np.float64)
    weighted = x * (counts * factors.any(axis=1))[:, None]
    return weighted.T @ x, weighted.T @ factors


def random_rotation(size: int, seed: int) -> Matrix:
    """Return a random orthogonal matrix float32 [size, size]."""
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    return rotation.astype(np.float32)


def write_fused(fusion: Fusion, embeddings: Folder, target: Folder) -> None:
    """Write the item vectors of all items, shard by shard, as `vectors/part-N.parquet` (item_id, vector)."""
    for index, (items, text) in enumerate(vector_shards(embeddings)):
        table = pa.table({"item_id": pa.array(items, pa.int32()), "vector": vector_column(fusion(items, text))})
        target.write_table(f"vectors/part-{index:05d}.parquet", table)


def _count_pairs(histories: Histories, num_items: int, window: int) -> scipy.sparse.csr_matrix:
    """Return the symmetric matrix [items, items] of sums of 1 / distance over pairs of different items."""
    shape = (num_items, num_items)
    counted = scipy.sparse.csr_matrix(shape, dtype=np.float32)
    for one, other, value in pairs_within(histories, window):
        values = np.full(len(one), value, np.float32)
        counted = counted + scipy.sparse.coo_matrix((values, (one, other)), shape).tocsr()
    return counted + counted.T


def pairs_within(
    histories: Histories, window: int
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], float]]:
    """Yield pairs of different items of the training parts, (earlier items, later items, 1 / distance)."""
    begin, end = histories.offsets[:-1], histories.train_end
    events = int(histories.offsets[-1] - histories.offsets[0])
    step = max(1, _PAIRS_AT_ONCE * max(1, len(histories)) // max(1, events * window))
    for first in range(0, len(histories), step):
        begins, ends = begin[first : first + step], end[first : first + step]
        positions = np.arange(begins[0], ends[-1])
        last = ends[np.searchsorted(begins, positions, side="right") - 1]
        for distance in range(1, window + 1):
            inside = positions[positions + distance < last]
            one, other = histories.items[inside], histories.items[inside + distance]
            differ = one != other
            yield one[differ], other[differ], 1 / distance


def _factors(pairs: scipy.sparse.csr_matrix, rank: int, seed: int) -> Matrix:
    """Return unit rows of U sqrt(S) of the positive pointwise mutual information; zero for items without pairs.

    Contexts are smoothed with the power 0.75 (Levy, Goldberg and Dagan 2015).
    """
    sums = np.asarray(pairs.sum(axis=1), np.float64).ravel()
    if not sums.any():
        return np.zeros((pairs.shape[0], 1), np.float32)
    context = sums**0.75
    context /= context.sum()
    entries = pairs.tocoo()
    information = np.log(entries.data / (sums[entries.row] * context[entries.col]))
    positive = scipy.sparse.csr_matrix(
        (np.maximum(information, 0).astype(np.float32), (entries.row, entries.col)), pairs.shape
    )
    left, values, _ = randomized_svd(positive, min(rank, pairs.shape[0] - 1), n_iter=8, random_state=seed)
    return unit_rows((left * np.sqrt(values)).astype(np.float32)) * (sums > 0)[:, None].astype(np.float32)


def unit_rows(rows: npt.NDArray[Any]) -> Matrix:
    """Return rows divided by their lengths; rows of zeros stay zero."""
    scaled: Matrix = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    return scaled


def with_constant(rows: Matrix) -> Matrix:
    """Return rows with a 1 appended."""
    return np.concatenate([rows, np.ones((len(rows), 1), np.float32)], axis=1)
