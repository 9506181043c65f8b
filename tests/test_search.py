"""The search: its space, its objective, and a real sweep on a local Ray that is killed and goes on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tiger.config import build, dump_toml, load, with_override
from tiger.diagnostics import code_figures, nearest_neighbours, neighbour_overlap
from tiger.errors import ConfigError
from tiger.run import RunConfig
from tiger.search import SearchConfig, Weights, apply, judge, picture, table

CONFIGS = Path(__file__).parents[1] / "jobs/configs"
SEARCHES = sorted(CONFIGS.glob("*.search.toml"))


@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: path.stem)
def test_every_shipped_search_fits_its_configuration(path: Path) -> None:
    search = load(SearchConfig, str(path), [], CONFIGS)
    run = load(RunConfig, path.stem.removesuffix(".search"), [], CONFIGS)
    for key, space in search.space.items():
        for value in space.choices or [space.low, space.high]:
            apply(run, {key: value}, search.looks)


REFUSED: dict[str, dict[str, Any]] = {
    "low must be less": {"space": {"tokenizer.latent": {"low": 2, "high": 1}}},
    "needs low > 0": {"space": {"tokenizer.latent": {"low": 0, "high": 1, "log": True}}},
    "either choices, or low and high": {"space": {"tokenizer.latent": {"low": 1}}},
    "model.d_ff is no key": {"space": {"model.d_ff": {"choices": [1]}}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_impossible_spaces_are_refused(message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(SearchConfig, REFUSED[message])


def test_a_key_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown key tokenizer.latnt; did you mean tokenizer.latent\?"):
        apply(RunConfig(), {"tokenizer.latnt": 3}, 10)


@pytest.mark.parametrize("name", ["sample", "beauty"])
def test_a_configuration_written_as_toml_comes_back(name: str) -> None:
    run = load(RunConfig, name, [], CONFIGS)
    again = build(RunConfig, tomllib.loads(dump_toml(run.model_dump(mode="json", serialize_as_any=True))))
    assert again == run
    assert with_override({"a": {"b": 1, "c": 2}}, "a.b", 5) == {"a": {"b": 5, "c": 2}}


def clusters() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(20, 8)).repeat(20, axis=0) + 0.2 * rng.normal(size=(400, 8))).astype(np.float32)


def test_neighbours_against_the_definition() -> None:
    vectors = clusters()
    items, nearest = nearest_neighbours(vectors, k=5, sample=30)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for item, found in zip(items, nearest, strict=True):
        others = np.delete(np.arange(400), item)
        expected = others[np.argsort(-(unit[others] @ unit[item]))[:5]]
        assert set(found) == set(expected)
    codes = np.random.default_rng(0).integers(0, 3, (400, 2))
    overlap = neighbour_overlap(codes, (items, nearest))
    first = np.mean([[codes[n, 0] == codes[i, 0] for n in row] for i, row in zip(items, nearest, strict=True)])
    both = np.mean([[(codes[n] == codes[i]).all() for n in row] for i, row in zip(items, nearest, strict=True)])
    assert (overlap["overlap@1"], overlap["overlap@2"]) == pytest.approx((first, both))


def test_uniqueness_bought_with_noise_does_not_win() -> None:
    """Random codes are all unique, codes of the clusters are not; overlap and error tell which ones are good."""
    vectors, rng = clusters(), np.random.default_rng(1)
    neighbours = nearest_neighbours(vectors)
    noise = np.stack(np.unravel_index(rng.permutation(8**3)[:400], (8, 8, 8)), axis=1)
    honest = np.stack([np.arange(400) // 20 % 8, np.arange(400) // 20 // 8, rng.integers(0, 8, 400)], axis=1)
    scores = {}
    for name, codes, error in (("noise", noise, 1.0), ("honest", honest, 0.1)):
        figures = code_figures(codes, 8) | {"reconstruction_error": error}
        scores[name] = judge(Weights(), neighbours)(codes, figures)["objective"], figures["unique_ratio"]
    assert scores["noise"][1] > scores["honest"][1]
    assert scores["honest"][0] > scores["noise"][0]


def test_the_picture_has_a_panel_a_key_and_a_dot_a_trial() -> None:
    trials = [{"a": 0.001 * 10**n, "b": ["x", "y"][n % 2], "objective": n / 4} for n in range(4)]
    svg = picture([*trials, {"a": 1, "b": "x", "objective": None}], ["a", "b"])
    assert svg.count("<circle") == 8
    assert len(re.findall('fill="#1f6feb"', svg)) == 2


def test_the_table_stands_in_columns_and_leaves_out_what_a_trial_has_not() -> None:
    keys = ["tokenizer.hidden", "tokenizer.training.learning_rate"]
    known = {"objective": 1.25, "unique_ratio": 0.875, "reconstruction_error": 0.25, "overlap@1": 0.625, "epochs": 40.0}
    rows = [
        {"trial": 11, "status": "finished", "looks": 10, **known, keys[0]: [512, 256], keys[1]: 0.00123},
        {"trial": None, "status": "running", "looks": 0, "epochs": 0.0, "objective": None, keys[0]: [8], keys[1]: 0.1},
    ]
    head, first, second = table(rows, keys)
    assert head.split()[-2:] == ["hidden", "learning_rate"]
    assert " ".join(first.split()) == "11 finished 10 40 1.2500 0.8750 0.2500 0.6250 [512, 256] 0.00123"
    assert " ".join(second.split()) == "running 0 0 [8] 0.1"
    assert len(head) == len(first) == len(second)


def toy_sweep(folder: Path, search: str) -> list[str]:
    """The command of a sweep over 400 items' embeddings."""
    names = [f"item {n:03d}" for n in range(400)]
    pq.write_table(pa.table({"item_id": names, "vector": list(clusters())}), folder / "vectors.parquet")
    (folder / "x.toml").write_text(
        f'root = "{folder}/runs"\n[embedding]\nvectors = "{folder}/vectors.parquet"\n'
        "[tokenizer]\ncodebook_size = 16\n[tokenizer.training]\nepochs = 6\nbatch_size = 64\n"
    )
    (folder / "x.search.toml").write_text(
        f'looks = 3\ngrace = 1\n{search}\n[space."tokenizer.dropout"]\nchoices = [0.1, 0.0]\n'
        '[space."tokenizer.latent"]\nlow = 4\nhigh = 32\ninteger = true\n'
    )
    return [sys.executable, "-m", "jobs.tune", str(folder / "x.toml")]


ENDED = re.compile(r"tune: trial \d+ finished")


def journal(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("runs/sweep-*/scratch/trials/*.json"))}


@pytest.mark.slow
def test_a_sweep_that_was_killed_goes_on(tmp_path: Path) -> None:
    """The driver is killed after two trials; the same command runs the others, and none of the two again."""
    command = toy_sweep(tmp_path, "trials = 5\nconcurrent = 1")
    root = CONFIGS.parents[1]
    first = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert first.stderr
    ended = 0
    for line in first.stderr:
        ended += bool(ENDED.search(line))
        if ended == 2:
            break
    assert ended == 2, "the sweep ended before it could be killed"
    first.kill()
    first.wait()
    kept = journal(tmp_path)
    assert 2 <= len(kept) < 5
    second = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-3000:]
    assert f"{len(kept)} of 5 trials are in the journal" in second.stderr
    assert len(ENDED.findall(second.stderr)) == 5 - len(kept)
    sweep = Path(json.loads(second.stdout.splitlines()[-1])["artifact"])
    rows = pq.read_table(sweep / "trials.parquet").to_pylist()
    assert sorted(row["trial"] for row in rows) == list(range(5))
    for name, content in kept.items():
        entry = json.loads(content)
        row = next(row for row in rows if row["trial"] == int(name.removesuffix(".json")))
        assert row["tokenizer.latent"] == entry["values"]["tokenizer.latent"]
        assert row["objective"] == max(look["objective"] for look in entry["looks"])
    assert rows[0]["objective"] == max(row["objective"] for row in rows)
    best = load(RunConfig, str(sweep / "best.toml"), [], CONFIGS)
    assert best.tokenizer.model_dump()["latent"] == rows[0]["tokenizer.latent"]
    assert (sweep / "search.svg").read_text().count("<circle") == 10


@pytest.mark.slow
def test_trials_as_process_groups_find_what_single_ones_find(tmp_path: Path) -> None:
    """Dropout off, so that the sum over a batch is the same however it is shared out."""
    found = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        command = toy_sweep(folder, f"trials = 2\nconcurrent = 1\nsampler = 'random'\nworkers_per_trial = {workers}")
        search = folder / "x.search.toml"
        search.write_text(search.read_text().replace("[0.1, 0.0]", "[0.0]"))
        done = subprocess.run(command, cwd=CONFIGS.parents[1], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        sweep = Path(json.loads(done.stdout.splitlines()[-1])["artifact"])
        rows = pq.read_table(sweep / "trials.parquet").to_pylist()
        found.append({row["tokenizer.latent"]: row["objective"] for row in rows})
    assert found[0].keys() == found[1].keys()
    assert list(found[0].values()) == pytest.approx(list(found[1].values()), abs=0.05)
