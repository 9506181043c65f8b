"""Artifacts on a real S3-compatible server on loopback (moto), with a proxy in front that plants a store's faults."""

from __future__ import annotations

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
import pytest
from pyarrow import fs as pafs
from test_jobs import ROOT, TINY, digests
from test_publish import Property, _require_whole, _writer
from test_submit import free_ports

from tiger import artifacts
from tiger.artifacts import MANIFEST, Artifact, Draft, Folder, build, newest, open_artifact
from tiger.config import Config
from tiger.errors import ArtifactError
from tiger.snapshots import Snapshots

pytestmark = pytest.mark.slow
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
    draft.figures = {"rows": 50_000}


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
    with pytest.raises(OSError, match=r"(?i)error"):
        _publish(root)
    proxy.faults.clear()
    assert not _publish(root).folder.exists("manifest.json.partial")


def test_altered_objects_are_named(root: str) -> None:
    artifact = _publish(root)
    artifact.folder.write_bytes("notes.json", b'{"a": 2}\n')
    with pytest.raises(ArtifactError, match="notes.json"):
        open_artifact(artifact.folder.uri).verify()
    artifact.home.filesystem.delete_file(artifact.home.join(MANIFEST))
    with pytest.raises(ArtifactError, match="holds no finished artifact"):
        open_artifact(artifact.home.uri)


@pytest.mark.parametrize("others_seem_dead", [False, True])
def test_two_writers_never_touch_each_others_objects(
    others_seem_dead: bool, root: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, record_property: Property
) -> None:
    """One writer up to its n-th request, then the other from beginning to end, then the rest of the first.

    A request that is held up for so long is sent again by the client, and arrives twice.
    """
    monkeypatch.setattr(artifacts, "_SETTLE_SECONDS", 0.0)
    if others_seem_dead:
        monkeypatch.setattr(artifacts, "_SILENT_SECONDS", 0.0)
    else:
        monkeypatch.setattr(artifacts, "_watch", lambda home, suspects, kind: {attempt.name for attempt in suspects})
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
        for attempt in artifacts._attempts(first.home, but=named):
            # Only one that has been named itself may be left, or a sign of life that arrived twice.
            assert MANIFEST in attempt.files or set(attempt.files) <= {artifacts._ALIVE}
    assert at >= 40
    record_property("injections", at)


def test_a_killed_attempt_is_continued(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a driver that really is killed: its last sign of life is fresh, so the next run watches it first."""
    code = (
        "import os, sys; sys.path.insert(0, 'tests')\n"
        "from test_publish import _writer; from tiger.artifacts import Folder; real = Folder.write_json\n"
        "def write(folder, name, value):\n"
        "    if name == 'notes.json': os.kill(os.getpid(), 9)\n"
        "    real(folder, name, value)\n"
        f"Folder.write_json = write\n_writer({root!r}, 'A')\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=300).returncode == -signal.SIGKILL
    monkeypatch.setattr(artifacts, "_SILENT_SECONDS", 6.0)
    artifact = _writer(root, "B")
    _require_whole(artifact)
    assert artifact.folder.read_table("table")["by"].to_pylist() == ["A", "A"]
    assert len(artifacts._attempts(artifact.home)) == 1


def test_snapshots_go_on_from_a_store(root: str, proxy: Proxy) -> None:
    from test_publish import _equal, _state

    snapshots = Snapshots(Folder(root), {"a": 1})
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
