"""What the next full training starts from: a trained model, and the semantic IDs that were published for it.

Vectors, codebooks, IDs and weights of the new training are aligned to those of the old one, item by item, by the items'
original ids: so most published IDs stay, and what was learned of items and prefixes is not learned again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiger.core.artifacts import Artifact, open_artifact
from tiger.core.errors import ArtifactError
from tiger.core.storage import Folder
from tiger.data.grown_catalog import chain, is_append, items_folder
from tiger.data.item_names import ItemNames
from tiger.semantic_ids.assignment import SemanticIds


@dataclass(frozen=True)
class WarmStart:
    """A trained model and its published semantic IDs.

    Attributes:
        model: the model artifact.
        ids: the semantic IDs of its training, or of an append to them.
    """

    model: Artifact
    ids: Artifact

    @classmethod
    def open(cls, folder: str | Folder) -> WarmStart:
        """Open the folder of a model, or of the semantic IDs of an append to one.

        Raises:
            ArtifactError: it is neither, or the model has no semantic IDs.
        """
        artifact = open_artifact(folder)
        if artifact.kind == "semantic_ids" and is_append(artifact):
            return cls(artifact.inputs["model"], artifact)
        if artifact.kind != "model" or "semantic_ids" not in artifact.inputs:
            raise ArtifactError(
                f"warm_start: {artifact.folder.uri} is neither a model with semantic IDs nor an append to one"
            )
        return cls(artifact, artifact.inputs["semantic_ids"])

    @property
    def folder(self) -> Folder:
        """The folder from which `open` makes it again."""
        return (
            self.model if self.ids.fingerprint == self.model.inputs["semantic_ids"].fingerprint else self.ids
        ).folder

    @property
    def source(self) -> dict[str, str]:
        """What identifies it, for fingerprints."""
        return {"warm_start": f"{self.model.fingerprint} {self.ids.fingerprint}"}

    @property
    def tokenizer(self) -> Artifact:
        """The tokenizer of the semantic IDs."""
        return chain(self.ids)[0].inputs["tokenizer"]

    @property
    def item_vectors(self) -> Artifact | None:
        """The fused vectors that the tokenizer was trained on; None if it was trained on text embeddings."""
        return chain(self.ids)[0].inputs.get("item_vectors")

    def published_ids(self) -> SemanticIds:
        """Return the semantic IDs of all items, appended ones included."""
        return SemanticIds.read(self.ids.folder)

    def items_of(self, folder: Folder) -> npt.NDArray[np.int64]:
        """Return the index of each item of a folder's items.parquet among those of before, int64 [items]; -1: new."""
        before = ItemNames(items_folder(self.model.inputs["catalog"], self.ids))
        return np.asarray(before.indices(ItemNames(folder).ids).fill_null(-1)).astype(np.int64)
