"""The contract of a model family: a module, or package, in this folder or in any installed package by its dotted name.

    class Config(ModelConfig)                                  its options; `inputs`: what `data` gives access to
    recommender(module, config, data, device) -> Recommender   the trained module, ready to recommend

and, of a family with weights (the others are made from `data` whenever they are loaded):

    build(config, data) -> module                              before training; the caller has set the seed
    train(module, config, data, *, device, callbacks) -> FitResult     `best` has recall@10, which the pipeline checks
    grow(module, state, config, data)                          optional: load weights that were trained on `data` into a
                                                               module of a catalog with appended items
    warm_start(module, state, config, ids, before) -> int      optional: take weights that were trained with semantic
                                                               `ids`, in which `before` is the index of every item

`tests/unit/test_model_contract.py` checks what every family promises; `tests/plugins/toy_model.py` is an example.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor

from tiger.core.artifacts import Artifact
from tiger.core.config import PluginConfig, load_plugin
from tiger.data.catalog import Catalog
from tiger.data.grown_catalog import chain, open_catalog
from tiger.data.histories import Histories
from tiger.data.history_blocks import read_blocks
from tiger.embedding.vectors import map_embeddings
from tiger.semantic_ids.assignment import SemanticIds
from tiger.training.loop import TrainingConfig


class ModelTraining(TrainingConfig):
    """How a model is trained."""

    validation_users: int | None = Field(
        None, ge=1, description="maximum number of users that choose the best weights; none: all"
    )


class NoModelTraining(ModelTraining):
    """Training options of families that only count, or have nothing to train."""

    epochs: int = Field(0, ge=0, le=0, description="always 0: there is nothing to train")


class ModelConfig(PluginConfig):
    """Options of every model family."""

    plugin_package: ClassVar[str] = "tiger.models"
    default_kind: ClassVar[str] = "tiger"
    inputs: ClassVar[tuple[str, ...]] = ("catalog",)
    """Kinds of the artifacts that the family reads: catalog, and embeddings or semantic_ids."""
    personalized: ClassVar[bool] = True
    """Whether lists depend on histories; if not, equal lists for all users are expected."""

    kind: str = Field(
        "tiger",
        description="model family: tiger, sasrec, popularity, markov_chain, nearest_neighbors, or a dotted module name",
    )
    training: ModelTraining = NoModelTraining()
    seed: int = Field(0, ge=0, description="seed of weights, dropout and order")


def load_family(config: ModelConfig) -> ModuleType:
    """Import the module of a model family."""
    return load_plugin(ModelConfig.plugin_package, config.kind)


class ModelData(Protocol):
    """What a family may read, each on first access."""

    @property
    def num_items(self) -> int:
        """Number of items of the catalog."""

    @property
    def histories(self) -> Histories:
        """All users' histories."""

    def history_blocks(self) -> Iterator[Histories]:
        """Yield all users' histories block by block, without source ids, so that they need not be in memory at once."""

    @property
    def semantic_ids(self) -> SemanticIds:
        """The semantic IDs of all items."""

    @property
    def text_embeddings(self) -> Tensor:
        """Text embeddings of all items, floating-point [items, d]."""


@dataclass(frozen=True)
class StoredData:
    """`ModelData` of artifacts."""

    artifacts: dict[str, Artifact]
    """By kind, those of `ModelConfig.inputs`."""

    @cached_property
    def catalog(self) -> Catalog:
        """The catalog, with the items of appends if the semantic IDs are those of one."""
        return open_catalog(self.artifacts["catalog"], self.artifacts.get("semantic_ids"))

    @property
    def num_items(self) -> int:
        """Number of items of the catalog."""
        return self.catalog.n_items

    @property
    def histories(self) -> Histories:
        """All users' histories."""
        return self.catalog.histories

    def history_blocks(self) -> Iterator[Histories]:
        """Yield all users' histories block by block."""
        return (block.histories for block in read_blocks(self.catalog.artifact.folder))

    @cached_property
    def semantic_ids(self) -> SemanticIds:
        """The semantic IDs of all items."""
        return SemanticIds.read(self.artifacts["semantic_ids"].folder)

    @cached_property
    def text_embeddings(self) -> Tensor:
        """Text embeddings of all items: those given, or those that the semantic IDs were made from."""
        if "embeddings" in self.artifacts:
            return map_embeddings(self.artifacts["embeddings"].folder)
        trained, *appends = chain(self.artifacts["semantic_ids"])
        parts = [map_embeddings(text_embeddings(trained).folder)]
        parts += [map_embeddings(each.folder) for each in appends if each.metrics["new_items"]]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class InMemoryData:
    """`ModelData` of arrays, for experiments and tests; a family reads only what its `inputs` stand for."""

    num_items: int
    histories: Any = None
    semantic_ids: Any = None
    text_embeddings: Any = None

    def history_blocks(self) -> Iterator[Histories]:
        """Yield all histories as one block."""
        yield self.histories


def text_embeddings(semantic_ids: Artifact) -> Artifact:
    """Return the text embeddings that semantic IDs come from, directly or with co-occurrence added.

    Those of appends are in the artifacts of the appends.
    """
    inputs = chain(semantic_ids)[0].inputs
    return inputs["item_vectors"].inputs["embeddings"] if "item_vectors" in inputs else inputs["embeddings"]
