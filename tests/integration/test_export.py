"""An exported model is complete: it loads without the run, recommends the same, and its card has the run's figures."""

from __future__ import annotations

import csv
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest

import tiger
from tiger.core.artifacts import Artifact
from tiger.core.config import load
from tiger.core.errors import ArtifactError, ResourceError
from tiger.data.catalog import Catalog
from tiger.evaluation.evaluator import EvaluationResult
from tiger.export import main
from tiger.run import CONFIGS, RunConfig
from tiger.semantic_ids.assignment import SemanticIds


@pytest.fixture(scope="module")
def exported(finished: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "model"
    assert main([finished.inputs["model"].folder.uri, "--output", str(folder)]) == 0
    return folder


def test_exported_model_recommends_what_the_run_recommends(finished: Artifact, exported: Path) -> None:
    own, other = tiger.Recommender.load(finished.inputs["model"]), tiger.Recommender.load(str(exported))
    names = Catalog(finished.inputs["model"].inputs["catalog"]).source_ids
    histories = [names[3:7], names[50:51], []]
    first, second = own.recommend(histories, k=7), other.recommend(histories, k=7)
    assert np.array_equal(first.items, second.items)
    assert np.array_equal(first.scores, second.scores)
    assert str(first) == str(second)


def test_exported_folder_holds_ids_options_and_a_card_with_the_figures(finished: Artifact, exported: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md", "config.json", "items.parquet", "model.safetensors", "run.toml", "text_embeddings.safetensors",
    ]  # fmt: skip
    import pyarrow.parquet as pq

    table = pq.read_table(exported / "items.parquet")
    ids = SemanticIds.load(finished.inputs["model"].inputs["semantic_ids"])
    assert np.array_equal(np.array(table["codes"].to_pylist()), ids.codes)
    card, result = (exported / "README.md").read_text(), EvaluationResult.model_validate(
        finished.folder.read_json("evaluation.json")
    )  # fmt: skip
    for method in result.splits["test"].methods.values():
        low, high = method.ci95["recall@10"]
        assert f"{method.metrics['recall@10']:.4f} ({low:.4f} to {high:.4f})" in card
    for digest in finished.inputs["model"].inputs["catalog"].manifest["source"].values():
        assert digest in card
    run = load(RunConfig, str(exported / "run.toml"), [], CONFIGS)
    assert run.model.model_dump() == finished.inputs["model"].manifest["config"]
    assert tomllib.loads((exported / "run.toml").read_text())["data"]["items"] == 300


def test_csv_files_are_those_of_sidinspector(finished: Artifact, tmp_path: Path) -> None:
    assert main([finished.inputs["model"].folder.uri, "--sid-csv", str(tmp_path / "sid")]) == 0
    tables = {path.stem: list(csv.DictReader(path.open(newline=""))) for path in (tmp_path / "sid").iterdir()}
    catalog = Catalog(finished.inputs["model"].inputs["catalog"])
    ids = SemanticIds.load(finished.inputs["model"].inputs["semantic_ids"])
    assert tables.keys() == {"sid_codes", "item_metadata", "interactions"}
    assert [row["item_id"] for row in tables["sid_codes"]] == catalog.source_ids
    assert [[int(row[f"sid_{level}"]) for level in range(3)] for row in tables["sid_codes"]] == ids.codes[
        :, :3
    ].tolist()
    assert [row["title"] for row in tables["item_metadata"]] == catalog.titles
    assert len(tables["interactions"]) == len(catalog.histories.items)
    splits = [row["split"] for row in tables["interactions"]]
    assert splits.count("test") == splits.count("valid") == len(catalog.histories)


def test_what_is_no_export_is_refused(exported: Path, finished: Artifact, tmp_path: Path,
                                      capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    assert main([finished.inputs["model"].folder.uri, "--output", str(exported)]) == 2
    assert "is not empty; choose another --output" in capsys.readouterr().err
    assert main([finished.folder.uri]) == 4
    for name in ("items.parquet", "model.safetensors", "text_embeddings.safetensors"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    config = json.loads((exported / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(ArtifactError, match="is not an export of this version"):
        tiger.Recommender.load(str(tmp_path))


def test_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError, match=r"^hf://someone/nothing cannot be loaded from the hub: [^\n]*$"):
        tiger.Recommender.load("hf://someone/nothing")
