"""The whole pipeline with a dataset, a tokenizer, a metric and two model families of tests/plugins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiger
from tests.paths import CONFIGS
from tests.raw_data import playlists
from tiger.core.config import load
from tiger.run import RunConfig

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow]


def test_the_pipeline_runs_with_plugins_for_all_parts(tmp_path: Path) -> None:
    run = load(
        RunConfig,
        None,
        [
            f"root={tmp_path / 'runs'}",
            "data.kind=tests.plugins.toy_dataset",
            f"data.path={playlists(tmp_path)}",
            'catalog.text_fields=["title", "genre"]',
            "embedding.resources.max_workers=1",
            "collaborative.weight=0",
            "tokenizer.kind=tests.plugins.toy_tokenizer",
            "tokenizer.codebook_size=8",
            "model.kind=tests.plugins.toy_model",
            "model.training.epochs=20",
            'evaluation.metrics=["recall", "tests.plugins.toy_metric.hit_in_first_place"]',
            'evaluation.baselines=["popularity", "tests.plugins.toy_counting_model"]',
            "decoding.resources.max_workers=1",
            "recommend.users=10",
        ],
        CONFIGS,
    )
    artifact = tiger.run_pipeline(run)
    methods = artifact.folder.read_json("evaluation.json")["splits"]["test"]["methods"]
    assert list(methods) == ["toy_model", "popularity", "toy_counting_model"]
    metrics = methods["toy_model"]["metrics"]
    assert metrics["recall@1"] == metrics["hit_in_first_place@10"] > 0.9  # the next song is always certain
    assert methods["toy_counting_model"]["metrics"]["recall@10"] > 0.9  # ten songs of one genre
    assert methods["popularity"]["metrics"]["recall@10"] < 0.5
    (ids,) = (tmp_path / "runs").glob("semantic_ids-*/manifest.json")
    assert json.loads(ids.read_text())["metrics"]["items"] == 60
    found = tiger.Recommender.load(artifact.inputs["model"]).recommend([["s00", "s01"]], k=1)
    assert found.ids == [["s02"]]
