"""Who is let in, and how much of a request is read."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tiger.on_ray.serve  # noqa: F401  settles Ray's environment
from tests.paths import ROOT
from tests.serving import TOKEN, token_file
from tiger.core.errors import SecurityError
from tiger.serving.body_limit import MAX_BODY, PROXY_CALLBACK, PROXY_MIDDLEWARES, proxy_middlewares
from tiger.serving.guard import PUBLIC_PATHS, RequestGuard, is_loopback, read_token


def through(
    gate: RequestGuard, path: str = "/recommend", token: str = "", parts: tuple[int, ...] = (10,)
) -> tuple[int, int]:
    """Status of one request through the gate, and how many bytes of its body were read."""
    sizes, read, sent = list(parts), 0, []

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += sizes[0]
        return {"type": "http.request", "body": b"x" * sizes.pop(0), "more_body": bool(sizes)}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"authorization", f"Bearer {token}".encode())] if token else []
    asyncio.run(gate({"type": "http", "path": path, "headers": headers}, receive, send))
    return sent[0]["status"], read


async def reads_all(scope: Any, receive: Any, send: Any) -> None:
    while (message := await receive())["type"] == "http.request" and message["more_body"]:
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_who_brings_no_token_is_refused_before_anything_is_read() -> None:
    gate = RequestGuard(reads_all, TOKEN)
    for wrong in ("", "another", TOKEN + "x", TOKEN[:-1]):
        for path in ("/recommend", "/items/a", "/search", "/prefix", "/status", "/openapi.json", "/page/", "/healthz/"):
            assert through(gate, path, token=wrong) == (401, 0)
    assert through(gate, token=TOKEN) == (200, 10)
    for path in PUBLIC_PATHS:
        assert through(gate, path) == (200, 10)


def test_a_body_is_read_up_to_its_limit() -> None:
    gate = RequestGuard(reads_all, None)
    assert through(gate, parts=(MAX_BODY // 2, MAX_BODY // 2)) == (200, MAX_BODY)
    assert through(gate, parts=(MAX_BODY, 1, 50_000, 50_000)) == (413, MAX_BODY + 1)
    assert through(gate, path="/healthz", parts=(MAX_BODY + 1,)) == (413, MAX_BODY + 1)


@pytest.mark.parametrize("path", ["/recommend", "/healthz"])
def test_a_half_sent_body_times_out(path: str) -> None:
    """130 clients that never finish would otherwise hold all places of a replica."""
    sent: list[Any] = []
    received = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive() -> dict[str, Any]:
        if received:
            return received.pop()
        await asyncio.sleep(3600)
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    begin = time.monotonic()
    gate = RequestGuard(reads_all, None, body_seconds=0.2)
    asyncio.run(gate({"type": "http", "path": path, "headers": []}, receive, send))
    assert time.monotonic() - begin < 5
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]


def test_an_answer_may_take_longer_than_a_body() -> None:
    """After the body an application waits for the client to hang up, for as long as it computes."""
    messages = [{"type": "http.request", "body": b"{}", "more_body": False}]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.sleep(0.4)
        return {"type": "http.disconnect"}

    async def computes(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    gate = RequestGuard(computes, None, body_seconds=0.1)
    asyncio.run(gate({"type": "http", "path": "/recommend", "headers": []}, receive, send))
    assert sent[0]["status"] == 200


def test_a_token_is_a_secret(tmp_path: Path) -> None:
    assert read_token(None) is None
    assert read_token(token_file(tmp_path)) == TOKEN
    assert read_token(token_file(tmp_path, content="\ufeff" + TOKEN)) == TOKEN
    with pytest.raises(SecurityError, match="every user of the machine can read: chmod 600"):
        read_token(token_file(tmp_path, mode=0o604))
    with pytest.raises(SecurityError, match="token is empty; create a token with openssl rand"):
        read_token(token_file(tmp_path, content=""))
    with pytest.raises(SecurityError, match="cannot be read .*No such file"):
        read_token(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("host", "own"),
    [("127.0.0.1", 1), ("127.3.2.1", 1), ("::1", 1), ("localhost", 1), ("0.0.0.0", 0), ("::", 0), ("x.y", 0)],
)
def test_loopback_addresses_are_known(host: str, own: int) -> None:
    assert is_loopback(host) == bool(own)


def test_the_proxy_of_a_ray_that_is_started_here_limits_bodies() -> None:
    assert os.environ[PROXY_CALLBACK] == PROXY_MIDDLEWARES
    assert [each.cls.__name__ for each in proxy_middlewares()] == ["BodyLimit"]
    command = [sys.executable, "-X", "importtime", "-m", PROXY_MIDDLEWARES.partition(":")[0]]
    imported = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stderr.split()
    assert "tiger" in imported
    assert not {"ray", "torch"} & set(imported)  # it is imported where Ray starts its proxies
