"""Sweeps for a tokenizer by the command line: killed, continued, and in process groups."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.factories import clusters
from tests.paths import CONFIGS, ROOT
from tiger.core.config import load
from tiger.run import RunConfig


def toy_sweep(folder: Path, search: str) -> list[str]:
    """The command of a sweep over 400 items' embeddings."""
    names = [f"item {n:03d}" for n in range(400)]
    pq.write_table(pa.table({"item_id": names, "vector": list(clusters())}), folder / "vectors.parquet")
    (folder / "x.toml").write_text(
        f'root = "{folder}/runs"\n[embedding]\nimport_path = "{folder}/vectors.parquet"\n'
        "[tokenizer]\ncodebook_size = 16\n[tokenizer.training]\nepochs = 6\nbatch_size = 64\n"
    )
    (folder / "x.tune.toml").write_text(
        f'num_evaluations = 3\ngrace_period = 1\n{search}\n[space."tokenizer.dropout"]\nchoices = [0.1, 0.0]\n'
        '[space."tokenizer.latent_dim"]\nlow = 4\nhigh = 32\ninteger = true\n'
    )
    return [sys.executable, "-m", "jobs.tune", str(folder / "x.toml")]


ENDED = re.compile(r"tune: trial \d+ finished")


def journal(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("runs/tuning-*/scratch/trials/*.json"))}


@pytest.mark.slow
def test_a_sweep_that_was_killed_resumes(tmp_path: Path) -> None:
    """The driver is killed after two trials; the same command runs the others, and none of the two again."""
    command = toy_sweep(tmp_path, "num_trials = 5\nmax_concurrent_trials = 1")
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
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
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-3000:]
    assert f"{len(kept)} of 5 trials are in the journal" in second.stderr
    assert len(ENDED.findall(second.stderr)) == 5 - len(kept)
    sweep = Path(json.loads(second.stdout.splitlines()[-1])["artifact"])
    rows = pq.read_table(sweep / "trials.parquet").to_pylist()
    assert sorted(row["trial"] for row in rows) == list(range(5))
    for name, content in kept.items():
        entry = json.loads(content)
        row = next(row for row in rows if row["trial"] == int(name.removesuffix(".json")))
        assert row["tokenizer.latent_dim"] == entry["values"]["tokenizer.latent_dim"]
        assert row["objective"] == max(evaluation["objective"] for evaluation in entry["evaluations"])
    assert rows[0]["objective"] == max(row["objective"] for row in rows)
    best = load(RunConfig, str(sweep / "best.toml"), [], CONFIGS)
    assert best.tokenizer.model_dump()["latent_dim"] == rows[0]["tokenizer.latent_dim"]
    assert (sweep / "tuning.svg").read_text().count('id="trial-') == 10


@pytest.mark.slow
def test_a_finished_sweep_is_continued_with_more_trials_and_other_resources(tmp_path: Path) -> None:
    """Over residual k-means, which has nothing to train."""
    command = toy_sweep(tmp_path, "")
    (tmp_path / "x.toml").write_text((tmp_path / "x.toml").read_text().partition("[tokenizer.training]")[0])
    (tmp_path / "x.tune.toml").write_text(
        'num_trials = 2\nsampler = "random"\n[space."tokenizer.distance"]\nchoices = ["mixed", "cosine", "euclidean"]\n'
    )
    command.append("tokenizer.kind=rkmeans")
    found: list[list[dict[str, Any]]] = []
    for changes, made in (
        (["tuning.max_concurrent_trials=1"], 2),
        (["tuning.resources.cpus=2"], 0),
        (["tuning.num_trials=4"], 2),
    ):
        done = subprocess.run([*command, *changes], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(ENDED.findall(done.stderr)) == made, done.stderr[-3000:]
        sweep = Path(json.loads(done.stdout.splitlines()[-1])["artifact"])
        rows = pq.read_table(sweep / "trials.parquet").to_pylist()
        found.append(sorted(rows, key=lambda row: row["trial"]))
        assert load(RunConfig, str(sweep / "best.toml"), [], CONFIGS).tokenizer.kind == "rkmeans"
    assert found[0] == found[1] == found[2][:2]
    assert len(found[2]) == 4
    assert found[0][0]["tokenizer.distance"] == "cosine"  # the configuration as it stands
    assert "continuing with 2 trials of" in done.stderr


@pytest.mark.slow
def test_trials_as_process_groups_find_what_single_ones_find(tmp_path: Path) -> None:
    """Dropout off, so that the sum over a batch is the same however it is shared out."""
    found = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        command = toy_sweep(
            folder, f"num_trials = 2\nmax_concurrent_trials = 1\nsampler = 'random'\nresources.max_workers = {workers}"
        )
        search = folder / "x.tune.toml"
        search.write_text(search.read_text().replace("[0.1, 0.0]", "[0.0]"))
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        sweep = Path(json.loads(done.stdout.splitlines()[-1])["artifact"])
        rows = pq.read_table(sweep / "trials.parquet").to_pylist()
        found.append({row["tokenizer.latent_dim"]: row["objective"] for row in rows})
    assert found[0].keys() == found[1].keys()
    assert list(found[0].values()) == pytest.approx(list(found[1].values()), abs=0.05)
