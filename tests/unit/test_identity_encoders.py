"""Which text encoder made an embedding, and what another one embeds again."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tiger.pipeline.embed
import tiger.pipeline.evaluate
import tiger.pipeline.item_vectors
import tiger.pipeline.prepare
import tiger.pipeline.recommend
import tiger.pipeline.semantic_ids
import tiger.pipeline.train
import tiger.pipeline.tune
from tests.identities import config_of, identities
from tests.paths import CONFIGS
from tests.raw_tables import prepare_files, write_events, write_items
from tiger.core import artifacts
from tiger.core.artifacts import Artifact, newest, open_artifact
from tiger.core.config import load
from tiger.core.errors import ResourceError
from tiger.core.storage import Folder
from tiger.data.catalog import Catalog
from tiger.embedding.encoder import BUNDLED, TextEncoder, encoder_identity, model_path, split_revision
from tiger.embedding.vectors import load_embeddings
from tiger.run import RunConfig

# --- encoders ---------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A folder of an encoder, of which every file is a link to the bundled one until a test writes to it."""
    folder = tmp_path / "my-encoder"
    shutil.copytree(model_path(BUNDLED), folder, copy_function=os.symlink)
    return folder


def _alter(path: Path) -> None:
    """Change one byte of the last weight."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_local_encoder_counts_by_the_content_of_its_folder(encoder: Path, tmp_path: Path) -> None:
    identity = encoder_identity(str(encoder))
    assert identity["sha256"] == encoder_identity(BUNDLED)["sha256"]  # a copy is the same model
    moved = encoder.rename(tmp_path / "moved@v2")
    assert encoder_identity(str(moved))["sha256"] == identity["sha256"]
    assert encoder_identity(str(moved))["model"] == str(moved)
    (moved / ".cache").mkdir()
    (moved / ".cache/x").write_text("left by a tool")
    assert encoder_identity(str(moved))["sha256"] == identity["sha256"]
    _alter(moved / "model.safetensors")
    assert encoder_identity(str(moved))["sha256"] != identity["sha256"]
    other, base = identities(config_of(f"embedding.model={moved}")), identities(config_of())
    assert {kind for kind in base if other[kind] != base[kind]} == {"embeddings"}


def test_a_relative_folder_is_found_by_workers_elsewhere(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(encoder.parent)
    assert encoder_identity("my-encoder")["model"] == str(encoder)


COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture(params=["hub", "cache"])
def hub(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A hub that answers, or one that cannot be reached and whose cache holds the answer."""
    import huggingface_hub
    from huggingface_hub import constants

    commits = dict(COMMITS)

    def model_info(self: Any, name: str, *, revision: str, timeout: float) -> Any:
        if request.param == "cache" or name != "org/model" or revision not in commits:
            raise OSError("no route to the hub")
        return huggingface_hub.ModelInfo(id=name, sha=commits[revision])

    if request.param == "cache":
        refs = tmp_path / "hub/models--org--model/refs"
        refs.mkdir(parents=True)
        for name, commit in commits.items():
            (refs / name).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    return commits


def test_a_hub_model_counts_by_its_commit(hub: dict[str, str]) -> None:
    assert encoder_identity("org/model") == {"model": f"org/model@{'a' * 40}", "revision": "a" * 40}
    assert encoder_identity("org/model@v2") == {"model": f"org/model@{'b' * 40}", "revision": "b" * 40}
    assert encoder_identity(f"org/model@{'c' * 40}")["revision"] == "c" * 40  # needs no hub
    base = identities(config_of("embedding.model=org/model"))
    pinned = identities(config_of(f"embedding.model=org/model@{'a' * 40}"))
    assert base == pinned
    assert identities(config_of("embedding.model=org/model@v2"))["embeddings"] != base["embeddings"]


def test_a_model_that_nobody_has_is_one_error(hub: dict[str, str]) -> None:
    with pytest.raises(ResourceError, match=r"'org/other@main' cannot be loaded: no route.*to 'bundled'"):
        encoder_identity("org/other")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("org/model@v1", ("org/model", "v1")),
        ("org/model", ("org/model", None)),
        (BUNDLED, (BUNDLED, None)),
        ("@v1", ("@v1", None)),
    ],
)
def test_a_revision_is_split_from_a_name(model: str, expected: tuple[str, str | None]) -> None:
    assert split_revision(model) == expected


def test_the_revision_is_the_one_that_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import sentence_transformers

    given: list[Any] = []

    def loaded(name: str, **options: Any) -> Any:
        given.append((name, options["revision"]))
        raise OSError("enough")

    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", loaded)
    with pytest.raises(ResourceError, match="enough"):
        TextEncoder(f"org/model@{'a' * 40}")
    assert given == [("org/model", "a" * 40)]


# --- what is embedded again -------------------------------------------------------------------------------------


class _Counted:
    """Stands for `map_shards`: a shard per row group, those that are there are kept; vectors tell the encoder."""

    def __init__(self) -> None:
        self.made = 0
        self.stop_after: int | None = None

    def __call__(
        self, source: Folder, name: str, columns: list[str], target: Folder, worker: Any, arguments: Any, **_: Any
    ) -> None:
        weights = Folder(model_path(arguments["model"])).digest("model.safetensors")
        seed = int(weights[:8], 16)
        file = pq.ParquetFile(source.join(name))
        for group in range(file.num_row_groups):
            if target.exists(f"part-{group:05d}.parquet"):
                continue
            if self.stop_after == group:
                raise KeyboardInterrupt
            self.made += 1
            rows = file.read_row_group(group, columns)
            vectors = np.random.default_rng([seed, group]).normal(size=(len(rows), 8)).astype(np.float32)
            vectors[:, 0] = seed % 1000
            target.write_table(
                f"part-{group:05d}.parquet",
                pa.table(
                    {
                        "item_id": rows["item_id"],
                        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 8),
                        "tokens": pa.array([5] * len(rows), pa.int32()),
                    }
                ),
            )


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> _Counted:
    counted = _Counted()
    monkeypatch.setattr(tiger.pipeline.embed, "map_shards", counted)
    monkeypatch.setattr(tiger.pipeline.embed, "require", lambda checks: [])
    return counted


def test_a_change_of_split_or_of_interactions_embeds_nothing_again(
    tmp_path: Path, counted: _Counted, caplog: pytest.LogCaptureFixture
) -> None:
    items, events = write_items(tmp_path / "items.parquet"), [write_events(tmp_path / "1.parquet", "a", 1)]
    run = config_of(f"root={tmp_path}/runs")
    first = prepare_files(tmp_path, [items], events)
    embeddings = tiger.pipeline.embed.embed(run, first)
    made = counted.made
    assert made > 0
    by_time = prepare_files(tmp_path, [items], events, "catalog.split=temporal", "catalog.valid_fraction=0.2")
    more = prepare_files(tmp_path, [items], [*events, write_events(tmp_path / "2.parquet", "b", 2)])
    assert len({first.fingerprint, by_time.fingerprint, more.fingerprint}) == 3
    for catalog in (by_time, more):
        with caplog.at_level(logging.INFO):
            assert tiger.pipeline.embed.embed(run, catalog).folder.uri == embeddings.folder.uri
        assert f"embeddings: already finished, skipped ({embeddings.folder.uri})" in caplog.text
        assert catalog.folder.read_bytes("items.parquet") == first.folder.read_bytes("items.parquet")
    assert counted.made == made
    other = prepare_files(tmp_path, [write_items(tmp_path / "items.parquet", shift=1)], events)
    assert tiger.pipeline.embed.embed(run, other).fingerprint != embeddings.fingerprint
    assert counted.made == 2 * made


def test_embeddings_outlive_the_catalog_that_they_were_made_from(tmp_path: Path, counted: _Counted) -> None:
    items, events = write_items(tmp_path / "items.parquet"), [write_events(tmp_path / "1.parquet", "a", 1)]
    run = config_of(f"root={tmp_path}/runs")
    first = prepare_files(tmp_path, [items], events)
    made = tiger.pipeline.embed.embed(run, first)
    assert [part.kind for part in made.lineage()] == ["catalog", "embeddings"]
    assert made.manifest["read_from"] == {"catalog": first.fingerprint}
    second = prepare_files(tmp_path, [items], events, "catalog.split=temporal")

    def model_of(embeddings: Artifact, catalog: Artifact) -> Artifact:
        """What follows, with nothing in it but its lineage."""

        def make(draft: artifacts.Draft) -> None:
            draft.folder.write_json("x.json", {})

        ids = artifacts.build(run.root, "semantic_ids", run.semantic_ids, {"embeddings": embeddings}, make)
        return artifacts.build(run.root, "model", run.model, {"catalog": catalog, "semantic_ids": ids}, make)

    model = model_of(tiger.pipeline.embed.embed(run, second), second)
    kinds = {part.kind: part.fingerprint for part in model.lineage()}
    assert kinds["catalog"] == second.fingerprint  # and not the one that the embeddings were made from
    assert [part.kind for part in model.lineage()] == ["catalog", "embeddings", "semantic_ids", "model"]
    assert Catalog(model.inputs["catalog"]).artifact.fingerprint == second.fingerprint

    shutil.rmtree(first.folder.uri)
    again = open_artifact(made.folder.uri)
    assert again.inputs == {}
    assert [part.kind for part in again.lineage()] == ["embeddings"]
    assert [part.kind for part in open_artifact(model.folder.uri).lineage()] == [
        "catalog", "embeddings", "semantic_ids", "model",
    ]  # fmt: skip
    assert again.folder.read_table("items.parquet", ["source_id"]) == second.folder.read_table(
        "items.parquet", ["source_id"]
    )
    again.verify()


def test_shards_of_another_encoder_are_never_mixed_in(tmp_path: Path, counted: _Counted, encoder: Path) -> None:
    """Killed after one shard; the encoder changes in its folder; the same command; and the old encoder comes back."""
    run = load(
        RunConfig, "sample",
        [f"embedding.model={encoder}", "data.items=3000", "data.users=6000", f"root={tmp_path}/runs"], CONFIGS,
    )  # fmt: skip
    catalog = tiger.pipeline.prepare.prepare(run)
    counted.stop_after = 1
    with pytest.raises(KeyboardInterrupt):
        tiger.pipeline.embed.embed(run, catalog)
    counted.stop_after = None
    original = (encoder / "model.safetensors").resolve()
    _alter(encoder / "model.safetensors")
    changed = tiger.pipeline.embed.embed(run, catalog)
    assert len(set(load_embeddings(changed.folder)[:, 0].tolist())) == 1
    (encoder / "model.safetensors").unlink()
    (encoder / "model.safetensors").symlink_to(original)
    before = counted.made
    old = tiger.pipeline.embed.embed(run, catalog)
    shards = len(list(Path(old.folder.uri, "vectors").iterdir()))
    assert counted.made == before + shards - 1  # the shard from before the kill is continued from
    assert old.fingerprint != changed.fingerprint
    assert set(load_embeddings(old.folder)[:, 0].tolist()) != set(load_embeddings(changed.folder)[:, 0].tolist())
    assert newest(f"{tmp_path}/runs", "embeddings").manifest["encoder"]["sha256"] == encoder_identity(BUNDLED)["sha256"]


def test_what_a_killed_driver_left_among_the_vectors_is_not_read(tmp_path: Path, counted: _Counted) -> None:
    items, events = write_items(tmp_path / "items.parquet"), [write_events(tmp_path / "1.parquet", "a", 1)]
    run, catalog = config_of(f"root={tmp_path}/runs"), prepare_files(tmp_path, [items], events)
    real = counted.__call__

    def leave(source: Folder, name: str, columns: list[str], target: Folder, *rest: Any, **more: Any) -> None:
        target.write_bytes(".reachable-0123.partial", b"")
        target.write_bytes("note.txt", b"")
        real(source, name, columns, target, *rest, **more)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tiger.pipeline.embed, "map_shards", leave)
        made = tiger.pipeline.embed.embed(run, catalog)
    assert len(load_embeddings(made.folder)) == catalog.metrics["items"]
    assert not list(Path(made.folder.uri).rglob(".reachable-*"))
