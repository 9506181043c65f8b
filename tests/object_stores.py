"""Object stores on this machine: an S3 server (moto) behind a proxy that plants faults, and Google's emulator."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pytest
from pyarrow import fs as pafs

from tests.processes import free_ports
from tiger.core.artifacts import Artifact, Draft, build
from tiger.core.config import Config

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


def publish_small(root: str) -> Artifact:
    return build(root, "catalog", Knobs(), {}, _fill)


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
