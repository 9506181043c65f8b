"""Artifacts on a real S3-compatible server on loopback (moto), with a proxy in front that plants a store's faults."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from tests.object_stores import Proxy, publish_small
from tests.paths import ROOT
from tests.pipelines import TINY, digests
from tests.publishing import Property, checkpoint_state, equal_states, publish_as, require_whole
from tiger.core import publishing
from tiger.core.artifacts import Artifact, open_artifact
from tiger.core.errors import ArtifactError
from tiger.core.storage import MANIFEST, Folder, StorageError
from tiger.training.checkpoints import CheckpointStore

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("fault", ["500", "503", "reset", "cut"])
@pytest.mark.parametrize("times", [1, 2])
def test_what_passes_by_itself_is_tried_again(
    fault: str, times: int, root: str, proxy: Proxy, record_property: Property
) -> None:
    for place in range(0, 12, 3):  # at different requests of a publish
        proxy.faults[:] = [""] * place + [fault] * times
        publish_small(f"{root}-{place}").verify()
        assert not proxy.faults
    assert proxy.planted == 4 * times
    record_property("injections", proxy.planted)


def test_a_store_that_stays_away_is_an_error_and_nothing_is_published(root: str, proxy: Proxy) -> None:
    proxy.faults[:] = ["500"] * 10_000
    with pytest.raises(
        StorageError, match=r"s3://bucket/.*error.*; check the address, the credentials, and the server"
    ):
        publish_small(root)
    proxy.faults.clear()
    assert not publish_small(root).folder.exists("manifest.json.partial")


def test_altered_objects_are_named(root: str) -> None:
    artifact = publish_small(root)
    artifact.folder.write_bytes("notes.json", b'{"a": 2}\n')
    with pytest.raises(ArtifactError, match="notes.json"):
        open_artifact(artifact.folder.uri).verify()
    artifact.home.filesystem.delete_file(artifact.home.join(MANIFEST))
    with pytest.raises(ArtifactError, match="is not a finished artifact"):
        open_artifact(artifact.home.uri)


@pytest.mark.nightly
@pytest.mark.parametrize("others_seem_dead", [False, True])
def test_two_writers_never_touch_each_others_objects(
    others_seem_dead: bool, root: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, record_property: Property
) -> None:
    """One writer up to its n-th request, then the other from beginning to end, then the rest of the first.

    A request that is held up for so long is sent again by the client, and arrives twice.
    """
    monkeypatch.setattr(publishing, "_SETTLE_SECONDS", 0.0)
    if others_seem_dead:
        monkeypatch.setattr(publishing, "_SILENT_SECONDS", 0.0)
    else:
        monkeypatch.setattr(publishing, "_watch", lambda home, suspects, kind: {attempt.name for attempt in suspects})
    for at in range(1, 500):
        own, others = f"{root}-{others_seem_dead}-{at}", list[Artifact]()
        proxy.requests = 0
        proxy.meanwhile[at] = lambda own=own, others=others: others.append(publish_as(own, "B"))
        first = publish_as(own, "A")
        if proxy.meanwhile:
            break
        for artifact in [first, *others, open_artifact(first.home), publish_as(own, "C")]:
            require_whole(artifact)
            assert artifact.folder.read_json("notes.json")["by"] in ("A", "B")
        assert len(others) == 1
        named = open_artifact(first.home).manifest["attempt"]
        for attempt in publishing._attempts(first.home, but=named):
            # Only one that has been named itself may be left, or a sign of life that arrived twice.
            assert MANIFEST in attempt.files or set(attempt.files) <= {publishing._ALIVE}
    assert at >= 40
    record_property("injections", at)


def test_a_killed_attempt_is_continued(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a driver that really is killed: its last sign of life is fresh, so the next run watches it first."""
    command = [sys.executable, "-m", "tests.scripts.killed_publish", root]
    assert subprocess.run(command, cwd=ROOT, timeout=300).returncode == -signal.SIGKILL
    monkeypatch.setattr(publishing, "_SILENT_SECONDS", 6.0)
    artifact = publish_as(root, "B")
    require_whole(artifact)
    assert artifact.folder.read_table("table")["by"].to_pylist() == ["A", "A"]
    assert len(publishing._attempts(artifact.home)) == 1


def test_snapshots_go_on_from_a_store(root: str, proxy: Proxy) -> None:

    snapshots = CheckpointStore(Folder(root), {"a": 1})
    assert snapshots.load() is None
    for step in (1, 2, 3):
        proxy.faults[:] = ["", "503", "", "reset"]
        snapshots.save(checkpoint_state(step), {"step": step})
    assert equal_states(snapshots.load(), checkpoint_state(3))
    folder = Folder(root)
    names = folder.filesystem.get_file_info(pafs.FileSelector(folder.path))
    assert sorted(info.base_name for info in names if "step" in info.base_name) == ["step-00000002", "step-00000003"]


def test_a_store_that_is_killed_and_comes_back_changes_nothing(
    root: str, proxy: Proxy, tmp_path: Path, record_property: Property
) -> None:
    """Once while embeddings are written, once while the tokenizer's training writes a snapshot."""

    def run(where: str) -> Artifact:
        command = [sys.executable, "-m", "jobs.semantic_ids", *TINY, f"root={where}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stderr[-3000:]
        return open_artifact(json.loads(done.stdout.splitlines()[-1])["artifact"])

    alone = run(str(tmp_path))
    proxy.outages[:] = ["vectors/part-", "snapshots/step-"]
    disturbed = run(root)
    assert not proxy.outages
    record_property("injections", proxy.planted)
    for artifact in disturbed.lineage():
        artifact.verify()
    assert digests(disturbed) == digests(alone)
