"""Downloads against a real HTTP server on loopback that can break off, lie, and refuse."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from tests.paths import ROOT
from tiger.core.errors import DataError
from tiger.core.storage import StorageError
from tiger.data import download as module
from tiger.data.download import download

CONTENT = bytes(range(256)) * 4000


class Handler(BaseHTTPRequestHandler):
    content: ClassVar[bytes] = CONTENT
    fail_first: ClassVar[int] = 0  # answers that break off half way
    ranges: ClassVar[bool] = True
    status: ClassVar[int] = 200
    etag: ClassVar[str | None] = None
    modified: ClassVar[str | None] = None
    knows_if_range: ClassVar[bool] = True
    knows_head: ClassVar[bool] = True
    seconds: ClassVar[float] = 0.0  # that an answer takes
    requests: ClassVar[list[str | None]] = []  # the ranges that were asked for
    methods: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        type(self).methods.append(self.command)
        if self.command == "GET":
            type(self).requests.append(wanted)
        if self.status != 200:
            self.send_error(self.status)
            return
        body, begin = self.content, 0
        condition = self.headers.get("If-Range")
        if wanted and self.ranges and (not self.knows_if_range or condition in (None, self.etag, self.modified)):
            begin = int(re.match(r"bytes=(\d+)-", wanted)[1])
        if self.command == "HEAD" and self.etag and self.headers.get("If-None-Match") == self.etag:
            self.send_response(304)
            self.end_headers()
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        if self.etag:
            self.send_header("ETag", self.etag)
        if self.modified:
            self.send_header("Last-Modified", self.modified)
        body = body[begin:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if type(self).fail_first > 0:
            type(self).fail_first -= 1
            body = body[: len(body) // 2]
        time.sleep(self.seconds)
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        if self.knows_head:
            self.do_GET()
        else:
            type(self).methods.append("HEAD")
            self.send_error(501)

    def log_message(self, *arguments: object) -> None:
        pass


DEFAULTS = {name: value for name, value in vars(Handler).items() if name in Handler.__annotations__}


@pytest.fixture
def server() -> Iterator[str]:
    for name, value in DEFAULTS.items():
        setattr(Handler, name, [] if isinstance(value, list) else value)
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/meta_X.json.gz"
    http.shutdown()


def test_a_file_comes_whole_and_once(server: str, tmp_path: Path) -> None:
    path = download(server, tmp_path)
    assert path.name == "meta_X.json.gz"
    assert path.read_bytes() == CONTENT
    assert download(server, tmp_path) == path
    assert len(Handler.requests) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_transfer_is_taken_up_again(server: str, ranges: bool, tmp_path: Path) -> None:
    Handler.fail_first, Handler.ranges = 3, ranges
    assert download(server, tmp_path, pause=0.01).read_bytes() == CONTENT
    assert len(Handler.requests) == 4
    assert Handler.requests[1] == f"bytes={len(CONTENT) // 2}-"


def test_what_came_is_kept_for_the_next_run(server: str, tmp_path: Path) -> None:
    Handler.fail_first = 5
    with pytest.raises(DataError, match=r"5 times; the partial download is kept"):
        download(server, tmp_path, pause=0.01)
    assert download(server, tmp_path).read_bytes() == CONTENT
    assert int(re.findall(r"\d+", Handler.requests[-1] or "0")[0]) > len(CONTENT) * 0.9


def test_a_refusal_says_so_at_once(server: str, tmp_path: Path) -> None:
    Handler.status = 404
    with pytest.raises(DataError, match=r"the server answered 404 Not Found; check the URL"):
        download(server, tmp_path, pause=0.01)
    assert len(Handler.requests) == 1


def test_an_unreachable_server(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the connection failed"):
        download("http://127.0.0.1:9/x.gz", tmp_path, pause=0.001)


NEW = CONTENT[::-1]  # of the same length
VERSIONS = {"etag": ('"1"', '"2"'), "modified": ("Mon, 01 Jan 2024 00:00:00 GMT", "Tue, 02 Jan 2024 00:00:00 GMT")}


@pytest.mark.parametrize("knows_if_range", [True, False])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_that_changed_before_a_resume_is_read_again_and_never_mixed(
    version: str, knows_if_range: bool, server: str, tmp_path: Path
) -> None:
    setattr(Handler, version, VERSIONS[version][0])
    Handler.fail_first, Handler.knows_if_range = 5, knows_if_range
    with pytest.raises(DataError, match="the partial download is kept"):
        download(server, tmp_path, pause=0.01)
    setattr(Handler, version, VERSIONS[version][1])
    Handler.content = NEW
    assert download(server, tmp_path, pause=0.01).read_bytes() == NEW


@pytest.mark.parametrize("version", VERSIONS)
def test_an_unchanged_file_is_resumed_by_its_version(version: str, server: str, tmp_path: Path) -> None:
    setattr(Handler, version, VERSIONS[version][0])
    Handler.fail_first = 5
    with pytest.raises(DataError):
        download(server, tmp_path, pause=0.01)
    partial = next(tmp_path.glob("*/*.partial"))
    os.utime(partial, (0, 0))  # the next day
    have = partial.stat().st_size
    assert download(server, tmp_path).read_bytes() == CONTENT
    assert Handler.requests[-1] == f"bytes={have}-"


@pytest.mark.parametrize("change", ["the next day", "another size", "weak"])
def test_without_a_version_a_file_is_only_resumed_at_once_and_at_its_size(
    change: str, server: str, tmp_path: Path
) -> None:
    Handler.fail_first, Handler.etag = 5, 'W/"1"' if change == "weak" else None
    with pytest.raises(DataError):
        download(server, tmp_path, pause=0.01)
    if change != "another size":
        os.utime(next(tmp_path.glob("*/*.partial")), (0, 0))
    Handler.content = NEW + b"x" if change == "another size" else NEW
    assert download(server, tmp_path, pause=0.01).read_bytes() == Handler.content


@pytest.mark.parametrize("version", [*VERSIONS, "size"])
def test_a_file_in_the_cache_is_asked_about_and_a_changed_one_downloaded_again(
    version: str, server: str, tmp_path: Path
) -> None:
    if version in VERSIONS:
        setattr(Handler, version, VERSIONS[version][0])
    path = download(server, tmp_path)
    assert download(server, tmp_path) == path
    assert Handler.methods == ["GET", "HEAD"]
    Handler.content = NEW if version in VERSIONS else NEW + b"x"
    if version in VERSIONS:
        setattr(Handler, version, VERSIONS[version][1])
    with path.open("rb") as being_read:
        assert download(server, tmp_path).read_bytes() == Handler.content
        assert being_read.read() == CONTENT  # whoever reads the old file reads it to its end
    assert download(server, tmp_path).read_bytes() == Handler.content
    assert Handler.methods == ["GET", "HEAD", "HEAD", "GET", "HEAD"]


def test_a_server_without_head_is_asked_by_a_get_that_is_not_read(server: str, tmp_path: Path) -> None:
    Handler.etag, Handler.knows_head = '"1"', False
    path = download(server, tmp_path)
    written = path.stat().st_mtime_ns
    assert download(server, tmp_path).stat().st_mtime_ns == written
    Handler.etag, Handler.content = '"2"', NEW
    assert download(server, tmp_path).read_bytes() == NEW


@pytest.mark.parametrize("why", ["no network", "503", "404"])
def test_without_an_answer_the_file_in_the_cache_is_used(
    why: str, server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = download(server, tmp_path)
    if why == "no network":

        def away(*_: object, **__: object) -> None:
            raise OSError("Network is unreachable")

        monkeypatch.setattr(module.urllib.request, "urlopen", away)
    else:
        Handler.status = int(why)
    with caplog.at_level(logging.WARNING):
        assert download(server, tmp_path) == path
    assert "using the cached file" in caplog.text


def test_a_kill_between_a_file_and_its_version_costs_a_transfer_and_no_more(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Handler.etag = '"1"'
    download(server, tmp_path)
    Handler.etag, Handler.content = '"2"', NEW
    real = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if path.name.endswith("version.json"):
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        download(server, tmp_path)
    assert download(server, tmp_path).read_bytes() == NEW
    assert download(server, tmp_path).read_bytes() == NEW


def test_processes_download_one_url_at_once(server: str, tmp_path: Path) -> None:
    """One transfers, the others wait and use what it left; all end with the whole file."""
    Handler.etag, Handler.seconds = '"1"', 0.5
    command = [sys.executable, "-m", "tests.scripts.download", server, str(tmp_path)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) for _ in range(3)]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], outputs
    assert {int(out) for out, _ in outputs} == {len(CONTENT)}
    assert Handler.methods.count("GET") == 1


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"/file/.*a component of this path is a file.*TIGER_CACHE sets the folder"):
        download("http://127.0.0.1:9/x.csv", tmp_path / "file")
