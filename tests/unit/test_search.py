"""The search: its space, its objective, and a real sweep on a local Ray that is killed and resumes."""

from __future__ import annotations

import json
import tomllib
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.factories import clusters
from tests.paths import CONFIGS
from tiger.core import artifacts
from tiger.core.artifacts import Artifact
from tiger.core.config import build, dump_toml, load, with_override
from tiger.core.errors import ArtifactError, ConfigError, HealthError
from tiger.core.storage import Folder
from tiger.metrics.codes import code_metrics, nearest_neighbors, neighbor_prefix_agreement
from tiger.on_ray import tune_journal, tune_sampler
from tiger.run import RunConfig
from tiger.tuning import TuningConfig, TuningStageConfig, Weights, apply, judge, plot_trials, require_possible, table

SEARCHES = sorted(CONFIGS.glob("*.tune.toml"))
BAD = HealthError("tokenizer: the loss is not finite")


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_every_shipped_search_fits_its_configuration(path: Path) -> None:
    search = load(TuningConfig, str(path), [], CONFIGS)
    run = load(RunConfig, path.stem.removesuffix(".tune"), [], CONFIGS)
    for key, space in search.space.items():
        for value in space.choices or [space.low, space.high]:
            apply(run, {key: value}, search.num_evaluations)


REFUSED: dict[str, dict[str, Any]] = {
    "low must be less": {"space": {"tokenizer.latent_dim": {"low": 2, "high": 1}}},
    "requires low > 0": {"space": {"tokenizer.latent_dim": {"low": 0, "high": 1, "log": True}}},
    "either choices, or low and high": {"space": {"tokenizer.latent_dim": {"low": 1}}},
    "model.d_ff is not one": {"space": {"model.d_ff": {"choices": [1]}}},
    "grace_period = 5 is more than num_evaluations = 3": {"num_evaluations": 3, "grace_period": 5},
}


@pytest.mark.parametrize("message", REFUSED)
def test_impossible_spaces_are_refused(message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(TuningConfig, REFUSED[message])


def test_a_key_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown key tokenizer.latent_dm; did you mean tokenizer.latent_dim\?"):
        apply(RunConfig(), {"tokenizer.latent_dm": 3}, 10)


IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "tuning.space is empty": {},
    r"unknown key tokenizer.latent_dm; did you mean tokenizer.latent_dim\?": {"tokenizer.latent_dm": {"choices": [1]}},
    "tokenizer.dropout = 1.5: Input should be less than 1": {"tokenizer.dropout": {"low": 0, "high": 1.5}},
    "set tuning.space.tokenizer.latent_dim: integer = true": {"tokenizer.latent_dim": {"low": 4, "high": 32}},
    "tokenizer.kind = 'rqvea': there is no module": {"tokenizer.kind": {"choices": ["rqvae", "rqvea"]}},
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_a_space_that_no_trial_could_use_is_refused_before_the_first(message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        require_possible(RunConfig(), build(TuningConfig, {"space": IMPOSSIBLE[message]}))


def test_a_search_may_be_over_kinds() -> None:
    search = build(TuningConfig, {"space": {"tokenizer.kind": {"choices": ["rqvae", "rkmeans", "opq"]}}})
    require_possible(load(RunConfig, "beauty", [], CONFIGS), search)


class Noted:
    """A journal of other trials."""

    def __init__(self, *values: dict[str, Any]) -> None:
        evaluations = [{"objective": 0.1, "training_iteration": 1}]
        self.trials = [{"trial": n, "values": given, "evaluations": evaluations} for n, given in enumerate(values)]


FIRST = {
    "integer choices for a float key": ({"tokenizer.dropout": {"choices": [0, 0.1, 0.2]}}, {"tokenizer.dropout": 0}),
    "a float bound for an integer key": (
        {"tokenizer.latent_dim": {"low": 0, "high": 32, "integer": True}},
        {"tokenizer.latent_dim": 0},
    ),
    "lists": (
        {"tokenizer.hidden_dims": {"choices": [[8], [512, 256, 128]]}},
        {"tokenizer.hidden_dims": [512, 256, 128]},
    ),
    "no choice of the space": ({"tokenizer.dropout": {"choices": [0.1, 0.2]}}, {"tokenizer.dropout": 0}),
    "outside of the range": (
        {"tokenizer.commitment_weight": {"low": 0.5, "high": 1}},
        {"tokenizer.commitment_weight": 0.25},
    ),
}


@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("name", FIRST)
def test_the_configuration_as_it_stands_is_tried_first(name: str, sampler: str) -> None:
    """Also after a kill with another trial in the journal; and once only."""
    space, standing = FIRST[name]
    run, search = load(RunConfig, None, [], CONFIGS), build(TuningConfig, {"space": space, "sampler": sampler})
    require_possible(run, search)
    (key,) = space
    others = [json.dumps(choice) for choice in space[key].get("choices", []) if choice != standing[key]]
    other = {key: others[0] if others else 7 if "integer" in space[key] else 0.75}
    for journal in (Noted(), Noted(other), Noted(other, other)):
        searcher = tune_sampler.searcher_of(run, search, journal)
        values = [searcher.suggest(f"t{n}") for n in range(3)]
        assert tune_journal.decoded(values[0], search) == standing
        for n, given in enumerate(values):
            searcher.on_trial_result(f"t{n}", {"objective": n, "training_iteration": 1})
            searcher.on_trial_complete(f"t{n}", {"objective": n})
            apply(run, tune_journal.decoded(given, search), search.num_evaluations)
    tried = Noted(other, tune_sampler.base_values(run, search)[0])
    assert all(tune_sampler.searcher_of(run, search, tried).suggest(f"t{n}") is not None for n in range(2))
    if "choices" not in space[key]:
        assert tune_sampler.searcher_of(run, search, tried).suggest("t")[key] != standing[key]


def test_resources_do_not_make_another_sweep() -> None:
    def sweep(**changes: Any) -> TuningStageConfig:
        search = build(TuningConfig, {"space": {"tokenizer.latent_dim": {"choices": [8, 16]}}} | changes)
        return TuningStageConfig(tokenizer=RunConfig().tokenizer, tuning=search)

    assert sweep(max_concurrent_trials=3).identity() == sweep().identity()
    for resource in ("min_workers", "max_workers", "cpus", "gpus"):
        assert sweep(resources={resource: 1}).identity() == sweep().identity()
    for key, value in {
        "num_trials": 99,
        "sampler": "random",
        "num_evaluations": 9,
        "grace_period": 1,
        "reduction_factor": 2,
        "seed": 1,
    }.items():
        assert sweep(**{key: value}).identity() != sweep().identity()
        assert (sweep(**{key: value}).family("e") == sweep().family("e")) == (key == "num_trials")
    assert sweep().family("e") != sweep().family("f")


def sweep_folder(root: Path, name: str, family: str, trials: int, finished: bool) -> None:
    folder = Folder(str(root / name))
    entries = [{"trial": n, "values": {"a": n}, "evaluations": [], "status": "finished"} for n in range(trials)]
    if finished:
        folder.write_json("journal.json", {"family": family, "trials": entries})
        return
    folder.child("scratch").write_json("family.json", family)
    for n, entry in enumerate(entries):
        folder.child("scratch/trials").write_json(f"{n:05d}.json", entry)


def test_a_sweep_of_more_trials_begins_with_those_of_its_family(tmp_path: Path) -> None:
    for n, (family, trials, finished) in enumerate(
        [("ours", 3, True), ("ours", 5, False), ("ours", 4, True), ("another", 9, True), ("another", 9, False)]
    ):
        sweep_folder(tmp_path, f"tuning-{n:08d}", family, trials, finished)
    (tmp_path / "tuning-00000009").mkdir()
    (tmp_path / "tuning-00000009" / "journal.json").write_text("{")
    (tmp_path / "tuning-note.txt").write_text("not a folder")
    for at_most, kept in ((12, 5), (2, 2)):
        target = Folder(str(tmp_path / f"tuning-{at_most:08d}-own"))
        tune_journal.inherit_trials(target, "ours", at_most)
        names = [f"{n:05d}.json" for n in range(kept)]
        assert list(target.child("scratch/trials").files()) == names
        assert [target.child("scratch/trials").read_json(name)["values"] for name in names] == [
            {"a": n} for n in range(kept)
        ]
    target.child("scratch/trials").write_json("00002.json", {"trial": 2, "values": {"a": 99}})
    tune_journal.inherit_trials(target, "ours", 3)  # our own are as many
    assert target.child("scratch/trials").read_json("00002.json")["values"] == {"a": 99}
    fresh = Folder(str(tmp_path / "tuning-fresh"))
    tune_journal.inherit_trials(fresh, "of nobody", 3)
    assert not fresh.child("scratch/trials").files()


def test_a_journal_of_an_earlier_version_is_refused_and_not_inherited(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry = {"trial": 0, "values": {"a": 0}, "looks": [], "status": "finished"}
    own, other = Folder(str(tmp_path / "tuning-own/scratch/trials")), Folder(str(tmp_path / "tuning-other"))
    own.write_json("00000.json", entry)
    with pytest.raises(ArtifactError, match=r"tuning-own/scratch/trials: .* earlier version .*; delete the folder"):
        tune_journal.Journal(own, TuningConfig())
    other.write_json("journal.json", {"family": "ours", "trials": [entry]})
    fresh = Folder(str(tmp_path / "tuning-fresh"))
    tune_journal.inherit_trials(fresh, "ours", 3)
    assert not fresh.child("scratch/trials").files()
    assert "tuning-other/journal.json is skipped" in caplog.text


def test_a_failure_is_recorded_with_its_class_and_shown_as_its_message() -> None:
    failed = {"objective": -1e9, "epochs": 0.0, "time_this_iter_s": 1.0, "failure": json.dumps(BAD.to_record())}
    trial = {"trial": 0, "values": {}, "evaluations": [failed], "status": "failed"}
    (row,) = tune_journal.trial_rows([trial], TuningConfig())
    assert (row["failure"], row["status"], row["evaluations"], row["objective"]) == (str(BAD), "failed", 1, None)


def test_trials_that_train_nothing_end_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Residual k-means has no epochs."""
    from tiger.pipeline import tune as job

    row = {"unique_ratio": 0.9, "reconstruction_error": 0.3, "objective": 1.0, "overlap@1": 0.5, "evaluations": 1}
    row |= {"epochs": 0.0, "seconds": 1.0, "status": "finished", "failure": None}
    rows = [row | {"trial": n, "tokenizer.distance": value} for n, value in enumerate(["cosine", "mixed"])]
    monkeypatch.setattr(job, "tune_tokenizer", lambda *_: pa.Table.from_pylist(rows))
    monkeypatch.setattr(job, "load_embeddings", lambda _: None)
    monkeypatch.setattr(Artifact, "verify", lambda self: None)
    run = load(RunConfig, None, ["tokenizer.kind=rkmeans", f"root={tmp_path}"], CONFIGS)
    search = build(TuningConfig, {"num_trials": 2, "space": {"tokenizer.distance": {"choices": ["cosine", "mixed"]}}})
    embeddings = Artifact(Folder(str(tmp_path)), {"fingerprint": "00000000", "kind": "embeddings"})
    artifacts_read: list[Any] = []
    monkeypatch.setattr(artifacts, "open_artifact", lambda home, **_: artifacts_read.append(home) or home)
    job.tune(run, search, embeddings)
    manifest = artifacts_read[-1].read_json("manifest.json")
    assert manifest["metrics"]["epochs_spent"] == 0
    best = load(RunConfig, f"{artifacts_read[-1].path}/best.toml", [], CONFIGS)
    assert best.tokenizer == run.tokenizer


@pytest.mark.parametrize("name", ["sample", "beauty"])
def test_a_configuration_written_as_toml_comes_back(name: str) -> None:
    run = load(RunConfig, name, [], CONFIGS)
    again = build(RunConfig, tomllib.loads(dump_toml(run.model_dump(mode="json", serialize_as_any=True))))
    assert again == run
    assert with_override({"a": {"b": 1, "c": 2}}, "a.b", 5) == {"a": {"b": 5, "c": 2}}


def test_neighbors_against_the_definition() -> None:
    vectors = clusters()
    items, nearest = nearest_neighbors(vectors, k=5, sample=30)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for item, found in zip(items, nearest, strict=True):
        others = np.delete(np.arange(400), item)
        expected = others[np.argsort(-(unit[others] @ unit[item]))[:5]]
        assert set(found) == set(expected)
    codes = np.random.default_rng(0).integers(0, 3, (400, 2))
    overlap = neighbor_prefix_agreement(codes, (items, nearest))
    first = np.mean([[codes[n, 0] == codes[i, 0] for n in row] for i, row in zip(items, nearest, strict=True)])
    both = np.mean([[(codes[n] == codes[i]).all() for n in row] for i, row in zip(items, nearest, strict=True)])
    assert (overlap["overlap@1"], overlap["overlap@2"]) == pytest.approx((first, both))


def test_uniqueness_bought_with_noise_does_not_win() -> None:
    """Random codes are all unique, codes of the clusters are not; overlap and error tell which ones are good."""
    vectors, rng = clusters(), np.random.default_rng(1)
    neighbors = nearest_neighbors(vectors)
    noise = np.stack(np.unravel_index(rng.permutation(8**3)[:400], (8, 8, 8)), axis=1)
    honest = np.stack([np.arange(400) // 20 % 8, np.arange(400) // 20 // 8, rng.integers(0, 8, 400)], axis=1)
    scores = {}
    for name, codes, error in (("noise", noise, 1.0), ("honest", honest, 0.1)):
        figures = code_metrics(codes, 8) | {"reconstruction_error": error}
        scores[name] = judge(Weights(), neighbors)(codes, figures)["objective"], figures["unique_ratio"]
    assert scores["noise"][1] > scores["honest"][1]
    assert scores["honest"][0] > scores["noise"][0]


def test_the_plot_has_a_panel_per_key_and_a_dot_per_trial() -> None:
    trials = [{"a": 0.001 * 10**n, "b": ["x", "y"][n % 2], "objective": n / 4} for n in range(4)]
    svg = plot_trials([*trials, {"a": 1, "b": "x", "objective": None}], ["a", "b"])
    assert [svg.count(f'id="trial-{key}"') for key in ("a", "b")] == [4, 4]
    xml.etree.ElementTree.fromstring(svg)
    for words in (">a<", ">b<", ">x<", ">y<", "--ink:"):
        assert words in svg


def test_the_table_stands_in_columns_and_leaves_out_what_a_trial_has_not() -> None:
    keys = ["tokenizer.hidden_dims", "tokenizer.training.learning_rate"]
    known = {"objective": 1.25, "unique_ratio": 0.875, "reconstruction_error": 0.25, "overlap@1": 0.625, "epochs": 40.0}
    rows = [
        {"trial": 11, "status": "finished", "evaluations": 10, **known, keys[0]: [512, 256], keys[1]: 0.00123},
        {"trial": None, "status": "running", "evaluations": 0, "epochs": 0.0, "objective": None}
        | {keys[0]: [8], keys[1]: 0.1},
    ]
    head, first, second = table(rows, keys)
    assert head.split()[-2:] == ["hidden_dims", "learning_rate"]
    assert " ".join(first.split()) == "11 finished 10 40 1.2500 0.8750 0.2500 0.6250 [512, 256] 0.00123"
    assert " ".join(second.split()) == "running 0 0 [8] 0.1"
    assert len(head) == len(first) == len(second)
