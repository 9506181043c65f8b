"""A dataset, a tokenizer, a metric and two model families, each added in one file of tests/plugins, by dotted name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.factories import clusters, toy_histories
from tests.paths import CONFIGS
from tests.raw_data import playlists
from tiger.core.config import load
from tiger.core.errors import ConfigError, DataError
from tiger.data.catalog import Catalog
from tiger.data.histories import Histories
from tiger.evaluation.evaluator import EvaluationConfig, MethodRanks, SplitUsers, evaluate, rank
from tiger.models.base import InMemoryData, ModelConfig, load_family
from tiger.models.decoding import DecodingConfig
from tiger.models.recommender import Recommender
from tiger.models.train import fit_model
from tiger.pipeline.prepare import prepare
from tiger.run import RunConfig
from tiger.semantic_ids.assignment import SemanticIdsConfig, assign
from tiger.tokenizers.train import encode_dataset, fit_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
PLUGINS = "tests.plugins"


def configured(*overrides: str) -> RunConfig:
    return load(RunConfig, None, list(overrides), CONFIGS)


def playlist_run(folder: Path) -> RunConfig:
    return configured(
        f"root={folder / 'runs'}", f"data.kind={PLUGINS}.toy_dataset", f"data.path={folder}",
        'catalog.text_fields=["title", "genre"]',
    )  # fmt: skip


def ring(users: int = 200, items: int = 30) -> Histories:
    """Histories in which every item is followed by the next one of a ring."""
    histories = toy_histories(np.random.default_rng(0), users, items)
    lengths = np.diff(histories.offsets)
    position = np.arange(len(histories.items)) - np.repeat(histories.offsets[:-1], lengths)
    start = np.repeat(np.arange(users), lengths)
    ringed = ((start + position) % items).astype(np.int32)
    return Histories(histories.source_ids, histories.offsets, ringed, histories.train_end, histories.valid_end)


# --- dataset ------------------------------------------------------------------------------------------------------


def test_a_dataset_is_prepared(tmp_path: Path) -> None:
    artifact = prepare(playlist_run(playlists(tmp_path)))
    catalog = Catalog(artifact)
    assert catalog.n_items == 60
    assert catalog.titles[10] == "Morning rock"
    assert [catalog.source_ids[item] for item in catalog.histories.of(0)] == [f"s{song:02d}" for song in range(6)]
    assert artifact.metrics["rows"]["items"]["kept"] == 60


def test_a_bad_row_of_a_dataset_is_counted_and_named(tmp_path: Path) -> None:
    file = playlists(tmp_path) / "songs.txt"
    file.write_text(file.read_text() + "s60\tNo genre\n")
    with pytest.raises(DataError, match=r"1 of 61 rows .*data.max_bad_row_fraction.*songs.txt:61: not three columns"):
        prepare(playlist_run(tmp_path))


def test_other_files_of_a_dataset_are_another_catalog(tmp_path: Path) -> None:
    before = prepare(playlist_run(playlists(tmp_path)))
    assert prepare(playlist_run(tmp_path)).fingerprint == before.fingerprint
    assert prepare(playlist_run(playlists(tmp_path, users=210))).fingerprint != before.fingerprint


# --- tokenizer ----------------------------------------------------------------------------------------------------


def test_a_tokenizer_gives_every_item_a_semantic_id() -> None:
    run = configured(f"tokenizer.kind={PLUGINS}.toy_tokenizer", "tokenizer.codebook_size=16")
    vectors = torch.from_numpy(clusters())
    tokenizer, result = fit_tokenizer(run.tokenizer, vectors, device=CPU)
    assert result.best["reconstruction_error"] < 1
    codes = encode_dataset(tokenizer, vectors, CPU).numpy()
    assert codes.shape == (400, 3)
    assert [np.bincount(level, minlength=16).tolist() for level in codes.T] == [[25] * 16] * 3
    costs = tokenizer.assignment_costs(vectors)
    ids = assign(codes, 16, SemanticIdsConfig(), costs)
    assert len(np.unique(ids.codes, axis=0)) == 400


# --- metric -------------------------------------------------------------------------------------------------------


def test_a_metric_is_evaluated() -> None:
    run = configured(f'evaluation.metrics=["recall", "{PLUGINS}.toy_metric.hit_in_first_place"]')
    users = ring().evaluation("test")
    lists = np.full((len(users), 50), -1)
    lists[::2, 0] = users.targets[::2]
    lists[1::2, 1] = users.targets[1::2]
    counts = np.ones(30, np.int64)
    ranks = MethodRanks.of(lists, lists, users.targets, 30)
    found = evaluate({"mine": ranks}, SplitUsers.of(users, counts), counts, run.evaluation)
    metrics = found.methods["mine"].metrics
    assert metrics["hit_in_first_place@1"] == metrics["hit_in_first_place@10"] == metrics["recall@1"] == 0.5
    assert metrics["recall@5"] == 1.0
    assert "ndcg@10" not in metrics
    low, high = found.methods["mine"].ci95["hit_in_first_place@10"]
    assert low < 0.5 < high


# --- model families -----------------------------------------------------------------------------------------------


def recommender(run: RunConfig, data: InMemoryData) -> Recommender:
    """What the pipeline does: train a family that has something to train, and make it recommend."""
    family = load_family(run.model)
    module = fit_model(run.model, data, device=CPU)[0] if hasattr(family, "train") else nn.Module()
    found: Recommender = family.recommender(module, run.model, data, CPU)
    return found


@pytest.mark.parametrize(("kind", "least"), [("toy_model", 0.9), ("toy_counting_model", 0.9)])
def test_a_model_family_is_trained_and_evaluated(kind: str, least: float) -> None:
    run, histories = configured(f"model.kind={PLUGINS}.{kind}"), ring()
    model = recommender(run, InMemoryData(30, histories))
    users = histories.evaluation("test")
    ranks = rank(model, users, histories.source_ids, DecodingConfig())
    counts = model.training_counts()
    found = evaluate({"mine": ranks}, SplitUsers.of(users, counts), counts, EvaluationConfig())
    assert found.methods["mine"].exclude_seen["recall@10"] > least  # by chance: 1 in 3


def test_a_trained_family_reports_its_validation() -> None:
    run = configured(f"model.kind={PLUGINS}.toy_model", "model.training.epochs=2", "model.embedding_dim=4")
    module, result = fit_model(run.model, InMemoryData(30, ring()), device=CPU)
    assert module.state_dict()["next.weight"].shape == (30, 4)
    assert result.steps == 2 * -(-ring().training_examples() // 256)
    assert {"recall@10", "ndcg@10"} <= result.best.keys()


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", ["data", "tokenizer", "model"])
def test_a_dotted_name_that_does_not_exist_is_an_error(section: str) -> None:
    with pytest.raises(ConfigError, match=rf"{section}.kind = 'tests.plugins.absent': there is no module"):
        configured(f"{section}.kind={PLUGINS}.absent")


def test_a_plugin_of_another_section_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tests.plugins.toy_tokenizer has no Config for a ModelConfig"):
        configured(f"model.kind={PLUGINS}.toy_tokenizer")


def test_a_baseline_may_be_a_plugin() -> None:
    kind = f"{PLUGINS}.toy_counting_model"
    assert ModelConfig.of_kind(kind, "evaluation.baselines")(kind=kind).kind == kind


@pytest.mark.parametrize(("section", "key"), [("data", "folder"), ("tokenizer", "bins"), ("model", "dim")])
def test_an_unknown_option_of_a_plugin_is_an_error(section: str, key: str) -> None:
    kind = {"data": "toy_dataset", "tokenizer": "toy_tokenizer", "model": "toy_model"}[section]
    with pytest.raises(ConfigError, match=rf"unknown key {section}.{key}"):
        configured(f"{section}.kind={PLUGINS}.{kind}", f"{section}.{key}=1")
