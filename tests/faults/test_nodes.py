"""A cluster of three nodes on one machine that loses one in the middle of each stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.large_catalogs import evaluate_shop, ids_in_memory, shop
from tests.paths import ROOT
from tests.trainings import group
from tests.workers import NODE_TRAINING
from tiger.core.config import build
from tiger.pipeline.prepare import prepare
from tiger.run import RunConfig

pytestmark = pytest.mark.nightly


def on_three_nodes(stage: str, folder: Path) -> Any:
    # No `ray_tmp` of pytest's: socket paths have at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as ray_folder:
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        environment |= {"RAY_TMPDIR": ray_folder, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.scripts.lose_a_node", stage, str(folder)]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=1500, env=environment, check=False
        )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    assert (folder / "lost").exists()
    return json.loads((folder / "found.json").read_text())  # Ray prints lines of its own


def test_a_node_lost_while_embedding_loses_and_doubles_nothing(tmp_path: Path) -> None:
    x, y, dead = on_three_nodes("embed", tmp_path)
    assert x == list(range(95))
    assert y == [2 * value for value in x]
    assert dead == 1


def test_a_node_lost_while_training_changes_nothing(tmp_path: Path) -> None:
    truth, _ = group(2, "tokenizer", tmp_path, **NODE_TRAINING)
    found = on_three_nodes("train", tmp_path)
    assert found == {key: truth[key] for key in found}


def test_a_node_lost_while_preparing_changes_no_byte(tmp_path: Path) -> None:
    truth = prepare(build(RunConfig, shop(tmp_path, megabytes=512)))
    assert on_three_nodes("prepare", tmp_path) == truth.manifest["files"]


def test_a_node_lost_while_tokenizing_changes_no_id(tmp_path: Path) -> None:
    assert on_three_nodes("tokenize", tmp_path) == ids_in_memory().codes.tolist()


@pytest.mark.usefixtures("local_ray")
def test_a_node_lost_while_evaluating_changes_no_figure(tmp_path: Path) -> None:
    truth = evaluate_shop(tmp_path / "truth")
    assert on_three_nodes("evaluate", tmp_path) == truth
    assert truth["splits"]["test"]["methods"].keys() == {"markov_chain", "popularity"}
