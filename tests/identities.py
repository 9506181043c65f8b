"""Compute the identity of every stage's artifact from a configuration, without doing the work."""

from __future__ import annotations

from typing import Any

import pytest

import tiger.data.catalog
import tiger.pipeline.embed
import tiger.pipeline.evaluate
import tiger.pipeline.item_vectors
import tiger.pipeline.prepare
import tiger.pipeline.recommend
import tiger.pipeline.report
import tiger.pipeline.semantic_ids
import tiger.pipeline.train
import tiger.pipeline.tune
from tests.paths import CONFIGS
from tiger.core import artifacts
from tiger.core.artifacts import Artifact
from tiger.core.config import load
from tiger.core.storage import Folder
from tiger.run import RunConfig
from tiger.tuning import TuningConfig


def config_of(*overrides: str) -> RunConfig:
    return load(RunConfig, None, [*SMALL, *overrides], CONFIGS)


def stand_in(kind: str, inputs: dict[str, Artifact] | None = None) -> Artifact:
    """An artifact that is always the same, so that only a stage's own part of its identity can change."""
    manifest = {
        "kind": kind, "fingerprint": "0" * 8, "metrics": {"items": 40, "dimension": 8, "rows": {}}, "inputs": {},
        "files": {name: {"bytes": 1, "sha256": "0" * 64} for name in ("items.parquet", "histories.parquet")},
    }  # fmt: skip
    artifact = Artifact(Folder("/nowhere"), manifest)
    artifact.__dict__["inputs"] = inputs or {}
    return artifact


def identities(run: RunConfig) -> dict[str, str]:
    """The fingerprint that each stage gives to `build`."""
    found: dict[str, str] = {}

    def build(
        root: str, kind: str, config: Any, inputs: dict[str, Artifact], make: Any, *,
        source: dict[str, str] | None = None, **_: Any,
    ) -> Artifact:  # fmt: skip
        found[kind] = artifacts.stage_fingerprint(kind, config, inputs, source)
        return stand_in(kind)

    catalog = stand_in("catalog")
    embeddings, tokenizer = stand_in("embeddings", {"catalog": catalog}), stand_in("tokenizer")
    ids = stand_in("semantic_ids", {"embeddings": embeddings})
    model = stand_in("model", {"catalog": catalog, "semantic_ids": ids})
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(artifacts, "build", build)
        monkeypatch.setattr(tiger.data.catalog, "check_limits", lambda *_: None)  # it reads the stand-in's files
        tiger.pipeline.prepare.prepare(run)
        tiger.pipeline.embed.embed(run, catalog)
        tiger.pipeline.item_vectors.build_item_vectors(run, catalog, embeddings)
        tiger.pipeline.semantic_ids.train_tokenizer(run, embeddings)
        tiger.pipeline.semantic_ids.assign_ids(run, tokenizer, embeddings)
        tiger.pipeline.train.train_model(run, catalog, ids)
        tiger.pipeline.evaluate.evaluate(run, model)
        tiger.pipeline.recommend.recommend(run, model)
        tiger.pipeline.report.report(run, stand_in("evaluation"), stand_in("recommendations"))
        tiger.pipeline.tune.tune(run, tuning_config(), embeddings)
    return found


SMALL = ["data.items=200", "data.users=300"]


def tuning_config() -> TuningConfig:
    return TuningConfig.model_validate({"space": {"tokenizer.dropout": {"low": 0.0, "high": 0.5}}})
