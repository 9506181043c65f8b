"""A model in a folder of its own, in the form of the Hugging Face Hub: what `tiger export` writes, opened again.

| file | holds |
|---|---|
| config.json | format, model options, level sizes of the semantic IDs |
| model.safetensors | weights |
| items.parquet | item_id, source_id, title, training_count, and codes of a model with semantic IDs |
| text_embeddings.safetensors | `vectors` float [N, d], for a model that reads text |

Nothing is unpickled, and nothing outside of the folder is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from tiger.core.errors import ArtifactError, ResourceError
from tiger.core.storage import Folder
from tiger.data.catalog import Catalog
from tiger.models.base import ModelConfig, load_family
from tiger.semantic_ids.assignment import SemanticIds
from tiger.training.weights import load_weights

FORMAT = 1
CONFIG, ITEMS, VECTORS = "config.json", "items.parquet", "text_embeddings.safetensors"
HUB = "hf://"


class ExportedCatalog(Catalog):
    """Ids and titles of an exported model's items; it has no artifact and no histories."""

    def __init__(self, items: pa.Table) -> None:
        self.n_items = items.num_rows
        self.__dict__["items"] = items
        self.__dict__["titles"] = items["title"].to_pylist()


@dataclass(frozen=True)
class _TrainingCounts:
    """In place of histories: how often training has seen each item."""

    counts: npt.NDArray[np.int64]

    def training_counts(self, num_items: int) -> npt.NDArray[np.int64]:
        """Return the counts, int64 [num_items]."""
        return self.counts


@dataclass(frozen=True)
class ExportedData:
    """`tiger.models.base.ModelData` of an exported folder."""

    folder: Folder
    config: dict[str, Any]

    @cached_property
    def catalog(self) -> ExportedCatalog:
        """Ids and titles."""
        return ExportedCatalog(self.folder.read_table(ITEMS))

    @property
    def num_items(self) -> int:
        """Number of items."""
        return self.catalog.n_items

    @property
    def histories(self) -> Any:
        """Training counts; users' histories are not part of an export."""
        return _TrainingCounts(np.asarray(self.catalog.items["training_count"], np.int64))

    @cached_property
    def semantic_ids(self) -> SemanticIds:
        """The semantic IDs of all items."""
        lists = self.catalog.items["codes"].combine_chunks()
        codes = np.asarray(lists.flatten(), np.int16).reshape(len(lists), -1)
        return SemanticIds(codes, tuple(self.config["level_sizes"]), self.config["levels"])

    @cached_property
    def text_embeddings(self) -> Tensor:
        """Text embeddings of all items, [N, d]."""
        return self.folder.read_tensors(VECTORS)["vectors"]


def is_exported(folder: Folder) -> bool:
    """Return whether a folder holds an exported model."""
    return folder.exists(CONFIG) and folder.exists(ITEMS)


def load_exported(folder: Folder, device: torch.device) -> Any:
    """Open an exported model as a `Recommender`.

    Raises:
        ArtifactError: it is of another format, or a file is missing or does not match.
    """
    config = folder.read_json(CONFIG)
    if config.get("format") != FORMAT or config.get("model_type") != "tiger-on-ray":
        raise ArtifactError(
            f"{folder.uri}/{CONFIG} is not an export of this version (format {FORMAT}); export the model again"
        )
    data = ExportedData(folder, config)
    options: ModelConfig = ModelConfig.resolve(config["model"])
    family = load_family(options)
    module = family.build(options, data)
    load_weights(module, folder)
    recommender = family.recommender(module, options, data, device)
    recommender.catalog = data.catalog
    return recommender


def download(name: str) -> Folder:
    """Download a model from the Hugging Face Hub, or find it in its local cache.

    Args:
        name: `hf://USER/NAME` or `hf://USER/NAME@REVISION`.

    Raises:
        ResourceError: there is no such model, or the hub cannot be reached.
    """
    import huggingface_hub

    repository, _, revision = name.removeprefix(HUB).partition("@")
    try:
        return Folder(huggingface_hub.snapshot_download(repository, revision=revision or None))
    except Exception as error:  # of the hub's client or its HTTP library
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ResourceError(f"{name} cannot be loaded from the hub: {reason}") from None
