"""Artifacts on a real S3-compatible server on loopback (moto), with a proxy in front that plants a store's faults."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pafs

from tests.faults.test_publish import Property, _require_whole, _writer
from tests.integration.test_jobs import ROOT, TINY, digests
from tests.integration.test_submit import free_ports
from tests.unit.test_datasets import amazon_folder, read
from tiger.core import publishing
from tiger.core.artifacts import Artifact, Draft, build, newest, open_artifact
from tiger.core.config import Config
from tiger.core.errors import ArtifactError, DataError
from tiger.core.storage import MANIFEST, Folder, StorageError
from tiger.data.sources.base import expand
from tiger.training.checkpoints import CheckpointStore

pytestmark = pytest.mark.slow
GOOGLE = "gcp-storage-emulator==2026.7.19"
MOTO = "moto[server]==5.2.5"  # in an environment of its own: it asks for older packages than Ray's


class Knobs(Config):
    size: int = 1


class Store:
    """The S3 server. It keeps objects in memory, so a copy of them stands for the disk that a real one has."""

    def __init__(self) -> None:
        (self.port,) = free_ports(1)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["uvx", "--from", MOTO, "moto_server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + 600
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("PUT", "/bucket")
                assert connection.getresponse().status == 200
                return
            except OSError:
                assert self.process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.5)

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)

    def crash(self) -> None:
        """Killed, away for some seconds, and back with its disk."""
        direct = pafs.S3FileSystem(endpoint_override=f"127.0.0.1:{self.port}", scheme="http", region="us-east-1")
        infos = direct.get_file_info(pafs.FileSelector("bucket", recursive=True))
        disk = {}
        for info in infos:
            if info.type == pafs.FileType.File:
                with direct.open_input_stream(info.path) as stream:
                    disk[info.path] = stream.read()
        self.kill()
        time.sleep(3)
        self.start()
        for path, content in disk.items():
            with direct.open_output_stream(path) as stream:
                stream.write(content)


class Proxy(ThreadingHTTPServer):
    """Passes everything on to the store; while `faults` is not empty, its next entry decides about a request.

    `outages` are parts of names: when the next one is about to be written, the store crashes.
    """

    daemon_threads = True

    def __init__(self, store: Store) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.store, self.faults, self.outages, self.planted = store, list[str](), list[str](), 0
        self.requests = 0
        self.meanwhile: dict[int, Callable[[], None]] = {}  # what happens before the n-th request is passed on
        self.one_at_a_time = threading.Lock()  # so that a crash is between two requests


class _Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):  # the client has hung up, as clients may
            self.close_connection = True

    def _pass(self) -> None:
        body = self._body()
        with self.server.one_at_a_time:
            self.server.requests += 1
            meanwhile = self.server.meanwhile.pop(self.server.requests, None)
        if meanwhile:
            meanwhile()
        with self.server.one_at_a_time:
            self._pass_on(body)

    def _pass_on(self, body: bytes) -> None:
        outages = self.server.outages
        if self.command == "PUT" and outages and outages[0] in self.path:
            self.server.planted += 1
            self.server.store.crash()
            outages.pop(0)
            self.close_connection = True
            self.connection.close()
            return
        fault = self.server.faults.pop(0) if self.server.faults else ""
        self.server.planted += bool(fault)
        if fault in ("500", "503"):
            code = "InternalError" if fault == "500" else "SlowDown"
            self._answer(int(fault), {}, f"<Error><Code>{code}</Code></Error>".encode())
            return
        if fault == "reset":
            self.close_connection = True
            self.connection.close()
            return
        passed = http.client.HTTPConnection("127.0.0.1", self.server.store.port, timeout=30)
        kept = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "expect")}
        passed.request(self.command, self.path, body, kept | {"Content-Length": str(len(body))})
        answer = passed.getresponse()
        content = answer.read()
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in ("content-length", "transfer-encoding")}
        if self.command == "HEAD":
            headers["Content-Length"] = answer.getheader("Content-Length") or "0"
        self._answer(answer.status, headers, content, cut=fault == "cut")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(pieces)

    def _answer(self, status: int, headers: dict[str, str], content: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True
            self.connection.close()

    def log_message(self, *_: object) -> None:
        pass

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    if not shutil.which("uvx"):
        pytest.skip("uvx, which brings the S3 server, is not installed")
    store = Store()
    store.start()
    server = Proxy(store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing-secret", "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as monkeypatch:
        for key, value in settings.items():
            monkeypatch.setenv(key, value)
        yield server
    server.shutdown()
    store.kill()


@pytest.fixture
def root(proxy: Proxy, request: pytest.FixtureRequest) -> str:
    proxy.faults.clear()
    proxy.outages.clear()
    proxy.meanwhile.clear()
    proxy.planted = 0
    name = "".join(c for c in request.node.name if c.isalnum())
    return f"s3://bucket/{name}"


def _fill(draft: Draft) -> None:
    draft.folder.write_table("table/part-00000.parquet", pa.table({"x": list(range(50_000))}))
    draft.folder.write_json("notes.json", {"a": 1})
    draft.metrics = {"rows": 50_000}


def _publish(root: str) -> Artifact:
    return build(root, "catalog", Knobs(), {}, _fill)


def test_an_artifact_is_published_found_and_skipped(root: str) -> None:
    artifact = _publish(root)
    artifact.verify()
    again = newest(root, "catalog")
    assert again.manifest == artifact.manifest
    assert _publish(root).folder.uri == artifact.folder.uri
    assert artifact.folder.read_table("table")["x"].to_pylist()[-1] == 49_999
    local = _local_fingerprint()
    assert artifact.fingerprint == local  # the root is not in it


def _local_fingerprint() -> str:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return _publish(folder).fingerprint


@pytest.mark.parametrize("fault", ["500", "503", "reset", "cut"])
@pytest.mark.parametrize("times", [1, 2])
def test_what_passes_by_itself_is_tried_again(
    fault: str, times: int, root: str, proxy: Proxy, record_property: Property
) -> None:
    for place in range(0, 12, 3):  # at different requests of a publish
        proxy.faults[:] = [""] * place + [fault] * times
        _publish(f"{root}-{place}").verify()
        assert not proxy.faults
    assert proxy.planted == 4 * times
    record_property("injections", proxy.planted)


def test_a_store_that_stays_away_is_an_error_and_nothing_is_published(root: str, proxy: Proxy) -> None:
    proxy.faults[:] = ["500"] * 10_000
    with pytest.raises(
        StorageError, match=r"s3://bucket/.*error.*; check the address, the credentials, and the server"
    ):
        _publish(root)
    proxy.faults.clear()
    assert not _publish(root).folder.exists("manifest.json.partial")


def test_altered_objects_are_named(root: str) -> None:
    artifact = _publish(root)
    artifact.folder.write_bytes("notes.json", b'{"a": 2}\n')
    with pytest.raises(ArtifactError, match="notes.json"):
        open_artifact(artifact.folder.uri).verify()
    artifact.home.filesystem.delete_file(artifact.home.join(MANIFEST))
    with pytest.raises(ArtifactError, match="is not a finished artifact"):
        open_artifact(artifact.home.uri)


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
        proxy.meanwhile[at] = lambda own=own, others=others: others.append(_writer(own, "B"))
        first = _writer(own, "A")
        if proxy.meanwhile:
            break
        for artifact in [first, *others, open_artifact(first.home), _writer(own, "C")]:
            _require_whole(artifact)
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
    code = (
        "import os, sys; sys.path.insert(0, '.')\n"
        "from tests.faults.test_publish import _writer\n"
        "from tiger.core.storage import Folder; real = Folder.write_json\n"
        "def write(folder, name, value):\n"
        "    if name == 'notes.json': os.kill(os.getpid(), 9)\n"
        "    real(folder, name, value)\n"
        f"Folder.write_json = write\n_writer({root!r}, 'A')\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=300).returncode == -signal.SIGKILL
    monkeypatch.setattr(publishing, "_SILENT_SECONDS", 6.0)
    artifact = _writer(root, "B")
    _require_whole(artifact)
    assert artifact.folder.read_table("table")["by"].to_pylist() == ["A", "A"]
    assert len(publishing._attempts(artifact.home)) == 1


def test_snapshots_go_on_from_a_store(root: str, proxy: Proxy) -> None:
    from tests.faults.test_publish import _equal, _state

    snapshots = CheckpointStore(Folder(root), {"a": 1})
    assert snapshots.load() is None
    for step in (1, 2, 3):
        proxy.faults[:] = ["", "503", "", "reset"]
        snapshots.save(_state(step), {"step": step})
    assert _equal(snapshots.load(), _state(3))
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
        _publish("s3://no-such-bucket/runs")


# --- Google's store ---------------------------------------------------------------------------------------------


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start an emulator of Google Cloud Storage; return the URI of its bucket."""
    if not shutil.which("uvx"):
        pytest.skip("uvx, which brings the emulator, is not installed")
    (port,) = free_ports(1)
    command = ["uvx", "--from", GOOGLE, "gcp-storage-emulator", "start", "--host", "127.0.0.1", "--port", str(port),
               "--in-memory", "--default-bucket", "bucket"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + 600
        while True:
            try:
                http.client.HTTPConnection("127.0.0.1", port, timeout=5).connect()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.5)
        yield "gs://bucket"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


def test_google_uris(google: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish, find, skip, continue a killed attempt, read raw data."""
    from tests.faults.test_publish import Killed

    monkeypatch.setattr(publishing, "_SILENT_SECONDS", 0.0)
    with monkeypatch.context() as killing:
        real = Folder.write_json

        def kill(folder: Folder, name: str, value: object) -> None:
            if name == "notes.json":
                raise Killed
            real(folder, name, value)

        killing.setattr(Folder, "write_json", kill)
        with pytest.raises(Killed):
            _writer(f"{google}/runs", "A")
    artifact = _writer(f"{google}/runs", "B")
    _require_whole(artifact)
    assert artifact.folder.read_table("table")["by"].to_pylist() == ["A", "A"]
    assert [attempt.name for attempt in publishing._attempts(artifact.home)] == [artifact.manifest["attempt"]]
    assert _writer(f"{google}/runs", "C").manifest == newest(f"{google}/runs", "model").manifest == artifact.manifest
    here, there = _raw(google, tmp_path)
    for where in (str(here), there):
        values = {"kind": "tables", "items": [f"{where}/items.parquet"], "interactions": [f"{where}/events"]}
        assert read(values, tmp_path)[1]["item"].to_pylist() == ["a", "c", "b", "a", "c"]
    with pytest.raises(DataError, match=f"{there}/none.csv does not exist; correct data.items"):
        expand([f"{there}/none.csv"], "data.items")
    with pytest.raises(StorageError, match=r"^gs://no-such-bucket/[^\n]*; check the path and the bucket$"):
        _publish("gs://no-such-bucket/runs")


def test_snapshots_on_googles_store(google: str) -> None:
    from tests.faults.test_publish import _equal, _state

    snapshots = CheckpointStore(Folder(f"{google}/snapshots"), {"a": 1})
    for step in (1, 2, 3):
        snapshots.save(_state(step), {"step": step})
    assert _equal(snapshots.load(), _state(3))
    assert sorted(info.base_name for info in Folder(f"{google}/snapshots").entries(recursive=False)) == [
        "newest.json", "step-00000002", "step-00000003",
    ]  # fmt: skip
