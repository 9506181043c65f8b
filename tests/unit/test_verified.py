"""One altered byte of equal size in any file that a recommender or a server is built from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.factories import SIZES, SMALL, random_ids, small_model, toy_histories
from tiger.core import storage
from tiger.core.artifacts import Artifact, Draft, build, newest, open_artifact
from tiger.core.config import Config
from tiger.core.config import build as build_config
from tiger.core.errors import ArtifactError
from tiger.core.storage import Folder
from tiger.data.catalog import Catalog
from tiger.data.histories import history_table
from tiger.embedding.vectors import load_embeddings, vector_column
from tiger.models.recommender import Recommender
from tiger.models.tiger.config import TigerConfig
from tiger.serving.items import ItemTable
from tiger.training.weights import write_weights

ITEMS = 24


def lineage(root: Path) -> dict[str, Artifact]:
    """Publish an untrained model with all artifacts that it comes from."""
    rng = np.random.default_rng(0)
    ids = random_ids(rng, ITEMS, SIZES)
    model = small_model(ids)

    def catalog(draft: Draft) -> None:
        names = [f"i{n:02d}" for n in range(ITEMS)]
        draft.folder.write_table(
            "items.parquet", pa.table({"item_id": range(ITEMS), "source_id": names, "text": names})
        )
        histories = toy_histories(rng, 20, ITEMS)
        draft.folder.write_table("histories.parquet", history_table(histories, np.arange(len(histories.items))))
        draft.metrics["items"] = ITEMS

    def embeddings(draft: Draft) -> None:
        vectors = rng.normal(size=(ITEMS, 6)).astype(np.float32)
        for part in range(3):
            own = np.arange(8 * part, 8 * part + 8)
            table = pa.table({"item_id": pa.array(own, pa.int32()), "vector": vector_column(vectors[own])})
            draft.folder.write_table(f"vectors/part-{part:05d}.parquet", table)

    made: dict[str, Artifact] = {}

    def publish(kind: str, config: Config, inputs: list[str], make: Callable[[Draft], None]) -> None:
        made[kind] = build(str(root), kind, config, {name: made[name] for name in inputs}, make)

    publish("catalog", Config(), [], catalog)
    publish("embeddings", Config(), ["catalog"], embeddings)
    names = pa.table({"source_id": list(map(str, range(ITEMS)))})
    publish("semantic_ids", Config(), ["embeddings"], lambda draft: ids.write(draft.folder, [names]))
    config = build_config(TigerConfig, SMALL)
    publish("model", config, ["catalog", "semantic_ids"], lambda draft: write_weights(model, draft.folder))
    return made


def serve(model: Artifact) -> None:
    """Read what a replica reads."""
    Recommender.load(model, "cpu").recommend([[1, 2]], k=3)
    ItemTable.read(model.inputs["catalog"].folder)


def evaluate(model: Artifact) -> None:
    """Read what evaluation reads in addition."""
    catalog = Catalog(model.inputs["catalog"])
    assert len(catalog.titles) == ITEMS
    assert len(catalog.histories) == 20


@pytest.mark.parametrize(
    ("kind", "name", "read"),
    [
        ("model", "model.safetensors", serve),
        ("semantic_ids", "ids.parquet", serve),
        ("semantic_ids", "levels.json", serve),
        ("embeddings", "vectors/part-00000.parquet", serve),
        ("embeddings", "vectors/part-00002.parquet", serve),
        ("catalog", "items.parquet", serve),
        ("catalog", "items.parquet", evaluate),
        ("catalog", "histories.parquet", evaluate),
    ],
)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_altered_byte_is_an_error_with_the_name_of_the_file(
    kind: str, name: str, read: Callable[[Artifact], None], where: str, tmp_path: Path
) -> None:
    made = lineage(tmp_path)
    read(open_artifact(made["model"].folder.uri))
    path = Path(made[kind].folder.join(name))
    data = bytearray(path.read_bytes())
    data[{"first": 0, "middle": len(data) // 2, "last": -1}[where]] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{kind}-\w+: {name} was altered; delete the folder and run the stage"):
        read(open_artifact(made["model"].folder.uri))


@pytest.mark.parametrize("at_once", [0, 1 << 30])
def test_a_file_is_verified_once_however_often_it_is_read(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in a large one no more than a chunk is held to verify it."""
    lineage(tmp_path)
    monkeypatch.setattr(storage, "_READ_AT_ONCE", at_once)
    hashed: list[bool] = []
    real = storage.sha256

    def counting(content: Any) -> str:
        hashed.append(isinstance(content, bytes))
        return real(content)

    monkeypatch.setattr(storage, "sha256", counting)
    folder = newest(str(tmp_path), "embeddings").folder
    hashed.clear()
    first, second = load_embeddings(folder), load_embeddings(folder)
    assert torch.equal(first, second)
    assert len(hashed) == 3
    assert all(hashed) == (at_once > 0)


def test_a_verified_artifact_is_not_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = lineage(tmp_path)["embeddings"]
    artifact.verify()
    monkeypatch.setattr(Folder, "digest", lambda *_: pytest.fail("verified already"))
    assert len(load_embeddings(artifact.folder)) == ITEMS
