"""Artifacts, checkpoints and raw data on a real S3-compatible server on loopback, and on Google's emulator."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.object_stores import Proxy, publish_small
from tests.paths import ROOT
from tests.pipelines import digests
from tests.publishing import Killed, checkpoint_state, equal_states, publish_as, require_whole
from tests.raw_data import amazon_folder, read
from tiger.core import publishing
from tiger.core.artifacts import Artifact, newest, open_artifact
from tiger.core.errors import DataError
from tiger.core.storage import Folder, StorageError
from tiger.data.sources.base import expand
from tiger.training.checkpoints import CheckpointStore

pytestmark = pytest.mark.slow


def test_an_artifact_is_published_found_and_skipped(root: str) -> None:
    artifact = publish_small(root)
    artifact.verify()
    again = newest(root, "catalog")
    assert again.manifest == artifact.manifest
    assert publish_small(root).folder.uri == artifact.folder.uri
    assert artifact.folder.read_table("table")["x"].to_pylist()[-1] == 49_999
    local = _local_fingerprint()
    assert artifact.fingerprint == local  # the root is not in it


def _local_fingerprint() -> str:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return publish_small(folder).fingerprint


# --- raw data ---------------------------------------------------------------------------------------------------


def _raw(root: str, tmp_path: Path) -> tuple[Path, str]:
    """Write raw data to a folder and to the store; return both."""
    here = tmp_path / "raw"
    amazon_folder(_made(here / "amazon"))
    pq.write_table(
        pa.table({"item_id": ["a", "b", "c"], "name": ["mint tea", "plain soap", "a comb"]}),
        _made(here) / "items.parquet",
    )
    head = b"user_id,item_id,timestamp\n"
    rows = [b"u,%c,140000000%d\n" % (item, number) for number, item in enumerate(b"acbac")]
    events = _made(here / "events")
    (events / "part-0.csv").write_bytes(head + rows[0])
    (events / "part-1.csv.gz").write_bytes(gzip.compress(head + b"".join(rows[1:])))
    (events / "_SUCCESS").touch()
    store = Folder(f"{root}/raw")
    for path in sorted(here.rglob("*")):
        if path.is_file():
            store.write_bytes(str(path.relative_to(here)), path.read_bytes())
    return here, store.uri


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("events", ["events", "events/", "events/part-*", "**/part-*"])
def test_raw_tables_in_a_store_are_read_as_local_ones(events: str, root: str, tmp_path: Path) -> None:
    here, there = _raw(root, tmp_path)
    tables = [
        read({"kind": "tables", "items": [f"{base}/items.parquet"], "interactions": [f"{base}/{events}"]}, tmp_path)
        for base in (str(here), there)
    ]
    for local, remote in zip(tables[0][:2], tables[1][:2], strict=True):
        assert remote.equals(local)
    assert tables[1][1]["item"].to_pylist() == ["a", "c", "b", "a", "c"]


def test_amazon_files_in_a_store_are_read_as_local_ones(root: str, tmp_path: Path) -> None:
    here, there = _raw(root, tmp_path)
    tables = [read({"kind": "amazon", "path": f"{base}/amazon"}, tmp_path) for base in (str(here), there)]
    for local, remote in zip(tables[0][:2], tables[1][:2], strict=True):
        assert remote.equals(local)
    assert len(tables[1][0]) == 2


def test_the_catalog_of_files_in_a_store_is_the_same_artifact(root: str, tmp_path: Path) -> None:
    def prepare(base: str, where: str) -> Artifact:
        command = [sys.executable, "-m", "jobs.prepare", "data.kind=tables", f"root={where}", "catalog.k_core=0",
                   "catalog.duplicates=all",
                   f'data.items=["{base}/items.parquet"]', f'data.interactions=["{base}/events"]',
                   'catalog.text_fields=["name"]']  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return open_artifact(json.loads(done.stdout.splitlines()[-1])["artifact"])

    here, there = _raw(root, tmp_path)
    local, remote = prepare(str(here), str(tmp_path / "runs")), prepare(there, f"{root}/runs")
    assert remote.fingerprint == local.fingerprint
    assert digests(remote) == digests(local)


@pytest.mark.parametrize(("what", "name", "message"), [
    ("tables", "{}/none.csv", r"{}/none.csv does not exist; correct data.interactions"),
    ("tables", "{}/none-*.csv", r"no file matches {}/none-\*.csv; correct data.interactions"),
    ("tables", "s3://no-such-bucket/x.csv", r"s3://no-such-bucket/x.csv does not exist; correct data.interactions"),
    ("tables", "s3://no-such-bucket/*.csv", r"no file matches s3://no-such-bucket/\*.csv; correct data.interactions"),
    ("tables", "s3://", r"s3://.*; correct data.interactions"),
    ("amazon", "{}/none", r"{}/none does not exist; correct data.path"),
    ("amazon", "{}/items.parquet", r"{}/items.parquet is a file, not a folder; correct data.path"),
    ("amazon", "{}/events", r"{}/events needs meta_.*it contains _SUCCESS, part-0.csv.*; correct data.path"),
    ("amazon", "s3://no-such-bucket/x", r"s3://no-such-bucket/x does not exist; correct data.path"),
])  # fmt: skip
def test_missing_raw_data_in_a_store_is_one_line(what: str, name: str, message: str, root: str, tmp_path: Path) -> None:
    _, there = _raw(root, tmp_path)
    values = {"kind": "amazon", "path": name.format(there)}
    if what == "tables":
        values = {"kind": "tables", "items": [f"{there}/items.parquet"], "interactions": [name.format(there)]}
    with pytest.raises(DataError, match=message.format(there)) as error:
        read(values, tmp_path)
    assert "\n" not in str(error.value)


def test_an_object_that_vanishes_after_it_was_found_is_one_line(root: str, tmp_path: Path) -> None:
    _, there = _raw(root, tmp_path)
    (file,) = expand([f"{there}/items.parquet"], "data.items")
    file.filesystem.delete_file(file.path)
    with pytest.raises(DataError, match=f"{there}/items.parquet: cannot be read: .*; or correct data.items"):
        file.open()


def test_a_root_in_a_bucket_that_does_not_exist_is_one_line(proxy: Proxy, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"^s3://no-such-bucket/[^\n]*; check the address[^\n]*$"):
        publish_small("s3://no-such-bucket/runs")


# --- Google's store ---------------------------------------------------------------------------------------------


def test_google_uris(google: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish, find, skip, continue a killed attempt, read raw data."""

    monkeypatch.setattr(publishing, "_SILENT_SECONDS", 0.0)
    with monkeypatch.context() as killing:
        real = Folder.write_json

        def kill(folder: Folder, name: str, value: object) -> None:
            if name == "notes.json":
                raise Killed
            real(folder, name, value)

        killing.setattr(Folder, "write_json", kill)
        with pytest.raises(Killed):
            publish_as(f"{google}/runs", "A")
    artifact = publish_as(f"{google}/runs", "B")
    require_whole(artifact)
    assert artifact.folder.read_table("table")["by"].to_pylist() == ["A", "A"]
    assert [attempt.name for attempt in publishing._attempts(artifact.home)] == [artifact.manifest["attempt"]]
    assert publish_as(f"{google}/runs", "C").manifest == newest(f"{google}/runs", "model").manifest == artifact.manifest
    here, there = _raw(google, tmp_path)
    for where in (str(here), there):
        values = {"kind": "tables", "items": [f"{where}/items.parquet"], "interactions": [f"{where}/events"]}
        assert read(values, tmp_path)[1]["item"].to_pylist() == ["a", "c", "b", "a", "c"]
    with pytest.raises(DataError, match=f"{there}/none.csv does not exist; correct data.items"):
        expand([f"{there}/none.csv"], "data.items")
    with pytest.raises(StorageError, match=r"^gs://no-such-bucket/[^\n]*; check the path and the bucket$"):
        publish_small("gs://no-such-bucket/runs")


def test_snapshots_on_googles_store(google: str) -> None:

    snapshots = CheckpointStore(Folder(f"{google}/snapshots"), {"a": 1})
    for step in (1, 2, 3):
        snapshots.save(checkpoint_state(step), {"step": step})
    assert equal_states(snapshots.load(), checkpoint_state(3))
    assert sorted(info.base_name for info in Folder(f"{google}/snapshots").entries(recursive=False)) == [
        "newest.json", "step-00000002", "step-00000003",
    ]  # fmt: skip
