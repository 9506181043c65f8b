"""Downloads against a real HTTP server on loopback that can break off, lie, and refuse."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from tiger.download import download
from tiger.errors import DataError

CONTENT = bytes(range(256)) * 4000


class Handler(BaseHTTPRequestHandler):
    fail_first: ClassVar[int] = 0  # answers that break off half way
    ranges: ClassVar[bool] = True
    status: ClassVar[int] = 200
    requests: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        type(self).requests.append(wanted)
        if self.status != 200:
            self.send_error(self.status)
            return
        begin = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted and self.ranges else 0
        body = CONTENT[begin:]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if type(self).fail_first > 0:
            type(self).fail_first -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.fail_first, Handler.ranges, Handler.status, Handler.requests = 0, True, 200, []
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
    with pytest.raises(DataError, match=r"5 times; what came is kept"):
        download(server, tmp_path, pause=0.01)
    assert download(server, tmp_path).read_bytes() == CONTENT
    assert int(re.findall(r"\d+", Handler.requests[-1] or "0")[0]) > len(CONTENT) * 0.9


def test_a_refusal_says_so_at_once(server: str, tmp_path: Path) -> None:
    Handler.status = 404
    with pytest.raises(DataError, match=r"the server answered 404 Not Found; check the address"):
        download(server, tmp_path, pause=0.01)
    assert len(Handler.requests) == 1


def test_an_unreachable_server(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the connection failed"):
        download("http://127.0.0.1:9/x.gz", tmp_path, pause=0.001)
