"""Semantic IDs of new items from the frozen tokenizer of published ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tiger.core.artifacts import Artifact
from tiger.embedding.collaborative import load_fusion
from tiger.embedding.vectors import sample_embeddings
from tiger.semantic_ids.assignment import SemanticIds, SemanticIdsConfig
from tiger.semantic_ids.growth import Growth, append_ids
from tiger.tokenizers.base import Tokenizer, TokenizerConfig
from tiger.tokenizers.train import encode_dataset, load_tokenizer

_TRAINED_SAMPLE = 20_000  # trained items with whose errors those of new items are compared
_ROWS_AT_ONCE = 4096
_PREFIXES_AT_ONCE = 8
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Numbered:
    """Semantic IDs of published and new items.

    Attributes:
        growth: the IDs, and what became of the new ones.
        errors: float32 [n], squared errors of the new items' nearest codes.
        trained_errors: float32 [m], those of a sample of the items that the tokenizer was trained on.
    """

    growth: Growth
    errors: npt.NDArray[np.floating]
    trained_errors: npt.NDArray[np.floating]


def number_items(base: Artifact, trained: Artifact, text: Tensor) -> Numbered:
    """Return semantic IDs of new items behind published ones, which do not change.

    Args:
        base: semantic IDs of the published items.
        trained: semantic IDs of the training, which `base` continues or is.
        text: float32 [n, d] text embeddings of the new items, made as those of the training.
    """
    inputs = trained.inputs
    fused = inputs.get("item_vectors")
    quantized = fused or inputs["embeddings"]
    config: TokenizerConfig = TokenizerConfig.resolve(inputs["tokenizer"].manifest["config"])
    tokenizer = load_tokenizer(config, inputs["tokenizer"].folder, quantized.metrics["dimension"])
    sample = sample_embeddings(quantized.folder, _TRAINED_SAMPLE)
    vectors = text
    if fused is not None:
        fusion = load_fusion(fused.manifest["config"], fused.folder)
        vectors = torch.from_numpy(fusion.of_new_items(text.numpy()))
    nearest = encode_dataset(tokenizer, vectors, _CPU)
    codes = nearest.numpy()
    growth = append_ids(
        SemanticIds.read(base.folder), codes, SemanticIdsConfig.model_validate(trained.manifest["config"]),
        tokenizer.assignment_costs(vectors), lambda item: other_codes(tokenizer, vectors[item], codes[item]),
    )  # fmt: skip
    trained_errors = squared_errors(tokenizer, sample, encode_dataset(tokenizer, sample, _CPU))
    return Numbered(growth, squared_errors(tokenizer, vectors, nearest), trained_errors)


def squared_errors(tokenizer: Tokenizer, vectors: Tensor, codes: Tensor) -> npt.NDArray[np.floating]:
    """Return the squared error of the codes [n, L] of each vector [n, d], float32 [n]."""
    pieces = zip(vectors.split(_ROWS_AT_ONCE), codes.split(_ROWS_AT_ONCE), strict=True)
    errors: npt.NDArray[np.floating] = torch.cat([tokenizer.errors(v, c) for v, c in pieces]).numpy()
    return errors


def other_codes(
    tokenizer: Tokenizer, vector: Tensor, nearest: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.floating]]]:
    """Yield codes [M, L] that differ from an item's in the last level but one, and their squared errors [M].

    Prefixes are tried in the order of their errors with the item's own last code, a few at a time; each with all codes
    of the last level. A tokenizer with one level has no other prefix.

    Args:
        tokenizer: a trained tokenizer.
        vector: float32 [d].
        nearest: int64 [L], the item's nearest codes.
    """
    if len(nearest) < 2:
        return
    size = tokenizer.codebook_size
    prefixes = np.tile(nearest, (size, 1))
    prefixes[:, -2] = np.arange(size)
    errors = _errors(tokenizer, vector, prefixes)
    order = np.argsort(errors, kind="stable")
    order = order[order != nearest[-2]]
    for first in range(0, len(order), _PREFIXES_AT_ONCE):
        codes = np.repeat(prefixes[order[first : first + _PREFIXES_AT_ONCE]], size, axis=0)
        codes[:, -1] = np.tile(np.arange(size), len(codes) // size)
        yield codes, _errors(tokenizer, vector, codes)


def _errors(tokenizer: Tokenizer, vector: Tensor, codes: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
    given = torch.from_numpy(codes)
    errors: npt.NDArray[np.floating] = tokenizer.errors(vector.expand(len(codes), -1), given).numpy()
    return errors
