"""What the identity of an artifact depends on: for every key of the configuration, and for everything that is read."""

from __future__ import annotations

import json
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
import tiger.pipeline.sasrec
import tiger.pipeline.semantic_ids
import tiger.pipeline.train
import tiger.pipeline.tune
from tests.paths import CONFIGS
from tiger.core import artifacts
from tiger.core.artifacts import Artifact, newest, open_artifact
from tiger.core.config import describe, load, load_plugin, shipped_plugins
from tiger.core.errors import ResourceError
from tiger.core.storage import Folder
from tiger.data.catalog import Catalog
from tiger.data.sources.base import DatasetConfig, Files
from tiger.embedding.encoder import BUNDLED, TextEncoder, encoder_identity, model_path, split_revision
from tiger.embedding.vectors import load_embeddings
from tiger.run import RunConfig
from tiger.tokenizers.base import TokenizerConfig
from tiger.tuning import TuningConfig

SMALL = ["data.items=200", "data.users=300"]

# --- every key --------------------------------------------------------------------------------------------------

TOKENIZER = "tokenizer tuning"
KEYS: dict[str, tuple[str, str]] = {
    # key: (another value, the stages whose own identity it changes; what follows from them changes by their inputs)
    "root": ("elsewhere", ""),
    "data.kind": ("", "catalog"),  # see test_another_source_is_another_catalog
    "data.max_bad_row_fraction": ("0.5", ""),
    "data.items": ("201", "catalog"),
    "data.users": ("301", "catalog"),
    "data.mean_length": ("8", "catalog"),
    "data.noise": ("0.2", "catalog"),
    "data.items_per_group": ("4", "catalog"),
    "data.seed": ("1", "catalog"),
    "catalog.text_fields": ('["title"]', "catalog"),
    "catalog.k_core": ("4", "catalog"),
    "catalog.duplicates": ("all", "catalog"),
    "catalog.tie_break": ("id", "catalog"),
    "catalog.split": ("temporal", "catalog"),
    "catalog.valid_fraction": ("0.2", "catalog"),
    "catalog.test_fraction": ("0.2", "catalog"),
    "catalog.max_unknown_item_fraction": ("0.5", ""),
    "catalog.seed": ("1", "catalog"),
    "embedding.import_path": ("", ""),  # its content counts, see test_vectors_from_elsewhere_count_by_content
    "embedding.vectors_id": ("sku", ""),  # counts for own vectors alone, as in the same test
    "embedding.vectors_column": ("image", ""),
    "embedding.model": ("", "embeddings"),  # its content counts, see the tests of encoders below
    "embedding.prefix": ("passage: ", "embeddings"),
    "embedding.max_tokens": ("64", "embeddings"),
    "embedding.precision": ("float32", "embeddings"),
    "embedding.storage_dtype": ("float16", "embeddings"),
    "embedding.batch_tokens": ("512", ""),
    "embedding.min_actors": ("2", ""),
    "embedding.max_actors": ("2", ""),
    "embedding.cpus_per_actor": ("2", ""),
    "collaborative.weight": ("0.3", "item_vectors"),
    "collaborative.rank": ("32", "item_vectors"),
    "collaborative.window": ("3", "item_vectors"),
    "collaborative.smoothing": ("1", "item_vectors"),
    "collaborative.ridge": ("1", "item_vectors"),
    "collaborative.seed": ("1", "item_vectors"),
    "embedding.gpus_per_actor": ("0.25", ""),
    "tokenizer.kind": ("opq", TOKENIZER),
    "tokenizer.num_levels": ("4", TOKENIZER),
    "tokenizer.codebook_size": ("128", TOKENIZER),
    "tokenizer.kmeans_iterations": ("51", TOKENIZER),
    "tokenizer.kmeans_sample": ("90000", TOKENIZER),
    "tokenizer.training.epochs": ("41", TOKENIZER),
    "tokenizer.training.batch_size": ("128", TOKENIZER),
    "tokenizer.training.learning_rate": ("2e-3", TOKENIZER),
    "tokenizer.training.weight_decay": ("2e-4", TOKENIZER),
    "tokenizer.training.warmup_steps": ("101", TOKENIZER),
    "tokenizer.training.max_grad_norm": ("1.0", TOKENIZER),
    "tokenizer.training.validate_every_epochs": ("5.0", TOKENIZER),
    "tokenizer.training.patience": ("11", TOKENIZER),
    "tokenizer.training.precision": ("bfloat16", TOKENIZER),
    "tokenizer.seed": ("1", TOKENIZER),
    "tokenizer.distance": ("mixed", TOKENIZER),
    "tokenizer.sinkhorn_last_level": ("true", TOKENIZER),
    "tokenizer.hidden_dims": ("[256, 128]", TOKENIZER),
    "tokenizer.latent_dim": ("16", TOKENIZER),
    "tokenizer.linear_skip": ("false", TOKENIZER),
    "tokenizer.dropout": ("0.1", TOKENIZER),
    "tokenizer.commitment_weight": ("0.5", TOKENIZER),
    "tokenizer.codebook_update": ("gradient", TOKENIZER),
    "tokenizer.codebook_update_every": ("3", TOKENIZER),
    "tokenizer.codebook_update_until": ("0.5", TOKENIZER),
    "tokenizer.ema_decay": ("0.9", TOKENIZER),
    "tokenizer.reset_dead_codes": ("false", TOKENIZER),
    "tokenizer.gradient_estimator": ("rotation", TOKENIZER),
    "tokenizer.reconstruction_reduction": ("mean", TOKENIZER),
    "semantic_ids.collision_policy": ("extra_code", "semantic_ids"),
    "semantic_ids.items_per_id": ("2", "semantic_ids"),
    "semantic_ids.collision_codes": ("128", "semantic_ids"),
    "model.preset": ("medium", "model"),
    "model.d_model": ("96", "model"),
    "model.num_heads": ("2", "model"),
    "model.head_dim": ("8", "model"),
    "model.d_ff": ("64", "model"),
    "model.num_layers": ("1", "model"),
    "model.dropout": ("0.3", "model"),
    "model.encoder": ("bidirectional", "model"),
    "model.encoder_input": ("codes", "model"),
    "model.softmax": ("codes", "model"),
    "model.softmax_support": ("children", "model"),
    "model.item_vectors": ("false", "model"),
    "model.item_dropout": ("0.2", "model"),
    "model.max_history_items": ("10", "model"),
    "model.num_user_tokens": ("100", "model"),
    "model.training.validation_users": ("1000", "model"),
    "model.training.validation_beam": ("30", "model"),
    "model.training.epochs": ("31", "model"),
    "model.training.batch_size": ("128", "model"),
    "model.training.learning_rate": ("2e-3", "model"),
    "model.training.weight_decay": ("0.02", "model"),
    "model.training.warmup_steps": ("201", "model"),
    "model.training.max_grad_norm": ("2.0", "model"),
    "model.training.validate_every_epochs": ("2.0", "model"),
    "model.training.patience": ("6", "model"),
    "model.training.precision": ("float32", "model"),
    "model.seed": ("1", "model"),
    "evaluation.beam": ("60", "evaluation"),
    "evaluation.max_users": ("100", "evaluation sasrec"),
    "evaluation.num_exact_users": ("100", "evaluation"),
    "evaluation.max_actors": ("2", ""),
    "evaluation.seed": ("1", "evaluation sasrec"),
    "recommend.users": ("50", "recommendations"),
    "recommend.k": ("5", "recommendations"),
    "recommend.beam": ("60", "recommendations"),
    "recommend.exclude_history": ("false", "recommendations"),
    "recommend.allowed_items_file": ("", "recommendations"),  # its content counts, see test_a_filter_counts_by_content
    "recommend.temperature": ("0.5", "recommendations"),
    "recommend.max_per_first_code": ("2", "recommendations"),
    "recommend.seed": ("1", "recommendations"),
    "recommend.max_actors": ("2", ""),
    "sasrec.embedding_dim": ("64", "sasrec"),
    "sasrec.num_layers": ("1", "sasrec"),
    "sasrec.num_heads": ("1", "sasrec"),
    "sasrec.dropout": ("0.2", "sasrec"),
    "sasrec.max_history_items": ("20", "sasrec"),
    "sasrec.training.epochs": ("61", "sasrec"),
    "sasrec.training.batch_size": ("128", "sasrec"),
    "sasrec.training.learning_rate": ("2e-3", "sasrec"),
    "sasrec.training.weight_decay": ("0.1", "sasrec"),
    "sasrec.training.warmup_steps": ("101", "sasrec"),
    "sasrec.training.max_grad_norm": ("2.0", "sasrec"),
    "sasrec.training.validate_every_epochs": ("1.0", "sasrec"),
    "sasrec.training.patience": ("6", "sasrec"),
    "sasrec.training.precision": ("bfloat16", "sasrec"),
    "sasrec.seed": ("1", "sasrec"),
    "serve.host": ("127.0.0.2", ""),
    "serve.port": ("8001", ""),
    "serve.token_file": ("token", ""),
    "serve.beam": ("60", ""),
    "serve.replicas": ("2", ""),
    "serve.cpus": ("2", ""),
    "serve.gpus": ("0.5", ""),
    "scale.gpus": ("0", ""),
    "scale.wait_minutes": ("5", ""),
    "scale.train_workers": ("2", ""),  # changes rounding and dropout only; a snapshot says when it changes on the way
    "scale.cpus_per_worker": ("2", ""),
    "scale.collective_seconds": ("60", ""),
    "scale.dollars_per_hour": ("1.5", ""),
    "scale.max_failures": ("1", ""),
    "tracking.tensorboard": ("boards", ""),
    "tracking.mlflow": ("http://127.0.0.1:5000", ""),
    "tracking.experiment": ("other", ""),
}

NEEDS = {"model.num_user_tokens": "model.encoder=bidirectional"}
"""What must be set for the other value to be possible."""


def _run(*overrides: str) -> RunConfig:
    return load(RunConfig, None, [*SMALL, *overrides], CONFIGS)


def _stand_in(kind: str, inputs: dict[str, Artifact] | None = None) -> Artifact:
    """An artifact that is always the same, so that only a stage's own part of its identity can change."""
    manifest = {
        "kind": kind, "fingerprint": "0" * 8, "metrics": {"items": 40, "dimension": 8}, "inputs": {},
        "files": {name: {"bytes": 1, "sha256": "0" * 64} for name in ("items.parquet", "histories.parquet")},
    }  # fmt: skip
    artifact = Artifact(Folder("/nowhere"), manifest)
    artifact.__dict__["inputs"] = inputs or {}
    return artifact


def _identities(run: RunConfig) -> dict[str, str]:
    """The fingerprint that each stage gives to `build`."""
    found: dict[str, str] = {}

    def build(
        root: str, kind: str, config: Any, inputs: dict[str, Artifact], make: Any, *,
        source: dict[str, str] | None = None, **_: Any,
    ) -> Artifact:  # fmt: skip
        found[kind] = artifacts.stage_fingerprint(kind, config, inputs, source)
        return _stand_in(kind)

    catalog = _stand_in("catalog")
    embeddings, tokenizer = _stand_in("embeddings", {"catalog": catalog}), _stand_in("tokenizer")
    ids = _stand_in("semantic_ids", {"embeddings": embeddings})
    model = _stand_in("model", {"catalog": catalog, "semantic_ids": ids})
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(artifacts, "build", build)
        tiger.pipeline.prepare.prepare(run)
        tiger.pipeline.embed.embed(run, catalog)
        tiger.pipeline.item_vectors.build_item_vectors(run, catalog, embeddings)
        tiger.pipeline.semantic_ids.train_tokenizer(run, embeddings)
        tiger.pipeline.semantic_ids.assign_ids(run, tokenizer, embeddings)
        tiger.pipeline.train.train_model(run, catalog, ids)
        tiger.pipeline.evaluate.evaluate(run, model)
        tiger.pipeline.recommend.recommend(run, model)
        tiger.pipeline.sasrec.sasrec(run, catalog)
        tiger.pipeline.tune.tune(run, _search(), embeddings)
    return found


def _search() -> TuningConfig:
    return TuningConfig.model_validate({"space": {"tokenizer.dropout": {"low": 0.0, "high": 0.5}}})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return _identities(_run())


def test_the_table_has_every_key() -> None:
    assert {key for key, *_ in describe(RunConfig)} == set(KEYS)


@pytest.mark.parametrize("key", [key for key, (value, _) in KEYS.items() if value])
def test_a_key_changes_the_identity_of_exactly_its_stages(key: str, base: dict[str, str]) -> None:
    value, stages = KEYS[key]
    if key in NEEDS:
        base = _identities(_run(NEEDS[key]))
    found = _identities(_run(*([NEEDS[key]] if key in NEEDS else []), f"{key}={value}"))
    assert found.keys() == base.keys()
    assert {kind for kind in base if found[kind] != base[kind]} == set(stages.split())


UNFINGERPRINTED: dict[str, set[str]] = {
    # of the other sources and tokenizers: keys that say where files are, or when to stop, or how fast to go
    "tiger.data.sources.synthetic": {"max_bad_row_fraction"},
    "tiger.data.sources.tables": {"max_bad_row_fraction", "items", "interactions"},
    "tiger.data.sources.amazon": {"max_bad_row_fraction", "path", "items", "interactions", "category", "version"},
    "tiger.tokenizers.rqvae": set(),
    "tiger.tokenizers.rkmeans": set(),
    "tiger.tokenizers.opq": set(),
}


@pytest.mark.parametrize("plugin", [DatasetConfig, TokenizerConfig])
def test_every_other_key_of_every_plugin_counts(plugin: Any) -> None:
    for kind in shipped_plugins(plugin.plugin_package):
        config = load_plugin(plugin.plugin_package, kind).Config
        declared = UNFINGERPRINTED[f"{plugin.plugin_package}.{kind}"]
        assert set(config.unfingerprinted) == declared
        values = dict.fromkeys(config.model_fields, "x")
        assert set(config.model_construct(**values).identity()) == set(config.model_fields) - declared


# --- raw files --------------------------------------------------------------------------------------------------


def _items(path: Path, count: int = 30, shift: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {
        "item_id": [f"i{n}" for n in range(count)],
        "title": [f"title {n} {(n + shift) * 7919}" for n in range(count)],
    }
    pq.write_table(pa.table(rows), path)
    return path


def _events(path: Path, users: str, seed: int, count: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = [
        (f"{users}{user}", f"i{item}", 1_400_000_000 + place)
        for user in range(count)
        for place, item in enumerate(rng.permutation(30)[:12])
    ]
    pq.write_table(pa.table(dict(zip(("user_id", "item_id", "timestamp"), zip(*rows, strict=True), strict=True))), path)
    return path


def _prepared(root: Path, items: list[Path], events: list[Path], *more: str) -> Artifact:
    overrides = [
        "data.kind=tables", f"data.items={json.dumps([str(path) for path in items])}",
        f"data.interactions={json.dumps([str(path) for path in events])}", 'catalog.text_fields=["title"]',
        "catalog.k_core=0", f"root={root}/runs",
    ]  # fmt: skip
    return tiger.pipeline.prepare.prepare(load(RunConfig, None, [*overrides, *more], CONFIGS))


def test_every_raw_file_counts_by_role_order_and_content_and_never_by_name(tmp_path: Path) -> None:
    items = _items(tmp_path / "items/data.parquet")
    first, second = _events(tmp_path / "1/data.parquet", "a", 1), _events(tmp_path / "2/data.parquet", "b", 2)
    one = _prepared(tmp_path, [items], [first, second])
    assert one.metrics["users"] == 40
    recorded = one.manifest["raw_files"]
    assert [(file["role"], file["position"], file["name"]) for file in recorded] == [
        ("items", 0, "data.parquet"),
        ("interactions", 0, "data.parquet"),
        ("interactions", 1, "data.parquet"),
    ]
    assert [file["bytes"] for file in recorded] == [path.stat().st_size for path in (items, first, second)]

    renamed = first.rename(tmp_path / "1/other-name.parquet")
    assert _prepared(tmp_path, [items], [renamed, second]).fingerprint == one.fingerprint
    first = renamed.rename(first)
    assert _prepared(tmp_path, [items], [second, first]).fingerprint != one.fingerprint  # order decides ties
    _events(first, "c", 3, count=25)
    changed = _prepared(tmp_path, [items], [first, second])
    assert changed.fingerprint != one.fingerprint
    assert changed.metrics["users"] == 45
    _items(items, shift=1)
    assert _prepared(tmp_path, [items], [first, second]).fingerprint != changed.fingerprint


def test_the_role_of_a_file_counts(tmp_path: Path) -> None:
    """Two tables that can both be read as items and as events."""
    columns = {"item_id": [f"i{n % 5}" for n in range(40)], "user_id": [f"u{n // 5}" for n in range(40)]}
    for name, shift in (("x", 0), ("y", 1)):
        rows = columns | {"title": columns["item_id"], "timestamp": [1_400_000_000 + shift + n for n in range(40)]}
        pq.write_table(pa.table(rows), tmp_path / f"{name}.parquet")
    x, y = tmp_path / "x.parquet", tmp_path / "y.parquet"
    described = [
        tiger.pipeline.prepare.identify(tiger.pipeline.prepare.describe_files(Files([a], [b])))
        for a, b in ((x, y), (y, x))
    ]
    assert described[0] != described[1]
    assert sorted(described[0].values()) == sorted(described[1].values())


def test_another_source_is_another_catalog(tmp_path: Path) -> None:
    items, events = _items(tmp_path / "items.parquet"), _events(tmp_path / "events.parquet", "a", 1)
    tables = load(
        RunConfig, None, ["data.kind=tables", f'data.items=["{items}"]', f'data.interactions=["{events}"]'], CONFIGS
    )
    other, base = _identities(tables), _identities(_run())
    assert {kind for kind in base if other[kind] != base[kind]} == {"catalog"}


def test_vectors_from_elsewhere_count_by_content(tmp_path: Path) -> None:
    def adopted(name: str, seed: int, *more: str) -> str:
        path = tmp_path / name
        vectors = np.random.default_rng(seed).normal(size=(300, 8))
        ids = [str(n) for n in range(300)]
        pq.write_table(
            pa.table({"item_id": ids, "vector": vectors.tolist(), "sku": ids, "image": (vectors * 2).tolist()}), path
        )
        return tiger.pipeline.embed.adopt(
            _run(f"embedding.import_path={path}", f"root={tmp_path}/runs", *more)
        ).fingerprint

    one = adopted("a.parquet", 1)
    assert adopted("renamed.parquet", 1) == one
    assert adopted("a.parquet", 2) != one
    assert adopted("a.parquet", 1, "embedding.prefix=x", "embedding.model=y", "embedding.max_tokens=9") == one  # unused
    for key in ("storage_dtype=float16", "vectors_id=sku", "vectors_column=image"):
        assert adopted("a.parquet", 1, f"embedding.{key}") != one


def test_joined_vectors_count_by_content_and_by_the_items_of_the_catalog(tmp_path: Path) -> None:
    items, events = _items(tmp_path / "items.parquet"), _events(tmp_path / "events.parquet", "a", 1)

    def joined(catalog: Artifact, seed: int, *more: str, count: int = 30) -> str:
        vectors = np.random.default_rng(seed).normal(size=(count, 8)).tolist()
        table = pa.table({"item_id": [f"i{n}" for n in range(count)], "vector": vectors, "other": vectors})
        pq.write_table(table, tmp_path / "v.parquet")
        return tiger.pipeline.embed.embed(
            _run(f"embedding.import_path={tmp_path}/v.parquet", f"root={tmp_path}/runs", *more), catalog
        ).fingerprint

    catalog = _prepared(tmp_path, [items], [events])
    one = joined(catalog, 1)
    assert joined(catalog, 1, "embedding.prefix=x", "embedding.model=y") == one  # unused
    assert len({one, joined(catalog, 2), joined(catalog, 1, "embedding.vectors_column=other")}) == 3
    _items(items, shift=1)
    assert joined(_prepared(tmp_path, [items], [events]), 1) != one


def test_a_filter_counts_by_content(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("i1\ni2\n")
    (tmp_path / "b.txt").write_text("i1\ni3\n")
    none, a, b = (
        _identities(_run(*more))["recommendations"]
        for more in (
            [],
            [f"recommend.allowed_items_file={tmp_path}/a.txt"],
            [f"recommend.allowed_items_file={tmp_path}/b.txt"],
        )
    )
    assert len({none, a, b}) == 3
    (tmp_path / "renamed.txt").write_text("i2\ni1\n")
    assert _identities(_run(f"recommend.allowed_items_file={tmp_path}/renamed.txt"))["recommendations"] == a


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
    other, base = _identities(_run(f"embedding.model={moved}")), _identities(_run())
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
    base = _identities(_run("embedding.model=org/model"))
    pinned = _identities(_run(f"embedding.model=org/model@{'a' * 40}"))
    assert base == pinned
    assert _identities(_run("embedding.model=org/model@v2"))["embeddings"] != base["embeddings"]


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
    items, events = _items(tmp_path / "items.parquet"), [_events(tmp_path / "1.parquet", "a", 1)]
    run = _run(f"root={tmp_path}/runs")
    first = _prepared(tmp_path, [items], events)
    embeddings = tiger.pipeline.embed.embed(run, first)
    made = counted.made
    assert made > 0
    by_time = _prepared(tmp_path, [items], events, "catalog.split=temporal", "catalog.valid_fraction=0.2")
    more = _prepared(tmp_path, [items], [*events, _events(tmp_path / "2.parquet", "b", 2)])
    assert len({first.fingerprint, by_time.fingerprint, more.fingerprint}) == 3
    for catalog in (by_time, more):
        with caplog.at_level(logging.INFO):
            assert tiger.pipeline.embed.embed(run, catalog).folder.uri == embeddings.folder.uri
        assert f"embeddings: already finished, skipped ({embeddings.folder.uri})" in caplog.text
        assert catalog.folder.read_bytes("items.parquet") == first.folder.read_bytes("items.parquet")
    assert counted.made == made
    other = _prepared(tmp_path, [_items(tmp_path / "items.parquet", shift=1)], events)
    assert tiger.pipeline.embed.embed(run, other).fingerprint != embeddings.fingerprint
    assert counted.made == 2 * made


def test_embeddings_outlive_the_catalog_that_they_were_made_from(tmp_path: Path, counted: _Counted) -> None:
    items, events = _items(tmp_path / "items.parquet"), [_events(tmp_path / "1.parquet", "a", 1)]
    run = _run(f"root={tmp_path}/runs")
    first = _prepared(tmp_path, [items], events)
    made = tiger.pipeline.embed.embed(run, first)
    assert [part.kind for part in made.lineage()] == ["catalog", "embeddings"]
    assert made.manifest["read_from"] == {"catalog": first.fingerprint}
    second = _prepared(tmp_path, [items], events, "catalog.split=temporal")

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
    items, events = _items(tmp_path / "items.parquet"), [_events(tmp_path / "1.parquet", "a", 1)]
    run, catalog = _run(f"root={tmp_path}/runs"), _prepared(tmp_path, [items], events)
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
