"""Recommendations to many users, killed in the middle: every user is there once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.batches_of_users import SHARD_USERS, USERS, recommend_slowly, write_histories
from tests.paths import ROOT
from tiger.data.user_tables import shard_files


@pytest.mark.slow
def test_a_killed_batch_continues_and_no_user_is_missing_or_doubled(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories = write_histories(tmp_path / "histories.parquet")
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run(
        [sys.executable, "-m", "tests.scripts.killed_batch", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    (home,) = (tmp_path / "runs").glob("recommendations-*")
    assert not (home / "manifest.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in (home / "recommendations").glob("*.parquet")}
    assert 3 <= len(before) < USERS // SHARD_USERS
    # What the second run sets in this process is undone after the test.
    monkeypatch.setattr("tiger.data.user_tables.SHARD_USERS", SHARD_USERS)
    monkeypatch.setattr("tiger.on_ray.recommend.RecommendShard", None)
    found = recommend_slowly(tmp_path)
    for name, written in before.items():
        assert (home / "recommendations" / name).stat().st_mtime_ns == written  # not made again
    table = found.folder.read_table("recommendations")
    assert Counter(table["user"].to_pylist()) == Counter(histories.keys())
    assert (tmp_path / "runs/died").exists()  # an actor was lost, too
    for user, ids in zip(table["user"].to_pylist(), table["ids"].to_pylist(), strict=True):
        assert len(ids) == len(set(ids)) == 10
        assert not set(ids) & set(histories[user])
    lines = [
        json.loads(line)
        for file in shard_files(found.folder.child("recommendations"))
        for line in found.folder.read_bytes(f"json_lines/{file.removesuffix('.parquet')}.jsonl").splitlines()
    ]
    assert [line["user"] for line in lines] == table["user"].to_pylist()
    assert [[item["item"] for item in line["items"]] for line in lines] == table["ids"].to_pylist()
    assert found.metrics["users"] == USERS
    assert found.metrics["unknown"] == 6 * USERS - sum(map(len, histories.values()))
    assert set(found.metrics["unknown_examples"]) <= {"i30", "i31", "i32"}
