"""The limits of request bodies in the proxy of Ray Serve, on a real server."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.paths import ROOT
from tiger.serving.body_limit import MAX_BODY

ITEMS = 24


def answer(port: int, path: str, body: bytes, length: int) -> tuple[int, float]:
    """Send a body of a given length, as far as it is taken; return the status and the seconds until it came."""
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), 60) as client:
        client.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(body)
        status = int(client.recv(12).split()[1])
    return status, time.monotonic() - begin


@pytest.mark.slow
def test_the_proxy_takes_no_more_than_the_limit_while_all_replicas_are_busy() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as ray_folder:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.scripts.busy_server", str(port)],
            env=environment | {"RAY_TMPDIR": ray_folder},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        try:
            assert server.stdout is not None
            assert any(line == b"ready\n" for line in server.stdout)
            assert answer(port, "/", b"x" * MAX_BODY, MAX_BODY)[0] == 200
            with ThreadPoolExecutor(1) as clients:
                busy = clients.submit(answer, port, "/?sleep=20", b"", 0)
                time.sleep(1)
                status, seconds = answer(port, "/", b"x" * (MAX_BODY + 1), 1 << 30)
                assert (status, seconds < 5) == (413, True)
                status, seconds = answer(port, "/", b"x", 1000)
                assert (status, 4 < seconds < 12) == (408, True)
                assert not busy.done()
                assert busy.result()[0] == 200
            assert answer(port, "/", json.dumps([1]).encode(), 3)[0] == 200
        finally:
            server.communicate(b"")
