"""A trained model behind HTTP: a real server, asked by a real client; who is let in, and how much is read."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fastapi import FastAPI

from tests.paths import ROOT
from tests.serving import TOKEN, UNREADABLE, token_file
from tiger.core.artifacts import Artifact
from tiger.core.config import load
from tiger.core.errors import ConfigError, SecurityError
from tiger.core.storage import Folder
from tiger.data.catalog import Catalog
from tiger.models.decoding import DecodingConfig
from tiger.on_ray import serve as tiger_serve
from tiger.on_ray.serve import MAX_BODY, TOKEN_FILE, Request, RequestGuard, api, application, read_token, serve_forever
from tiger.run import ResourcesConfig, RunConfig, ServeConfig


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


def test_who_brings_no_token_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_FILE, token_file(tmp_path))
    gate = RequestGuard(reads_all)
    for wrong in ("", "another", TOKEN + "x", TOKEN[:-1]):
        assert through(gate, token=wrong) == (401, 0)
    assert through(gate, token=TOKEN) == (200, 10)
    assert through(gate, path="/healthz") == (200, 10)


def test_a_body_is_read_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_FILE, raising=False)
    gate = RequestGuard(reads_all)
    assert through(gate, parts=(MAX_BODY // 2, MAX_BODY // 2)) == (200, MAX_BODY)
    assert through(gate, parts=(MAX_BODY, 1, 50_000, 50_000)) == (413, MAX_BODY + 1)
    assert through(gate, path="/healthz", parts=(MAX_BODY + 1,)) == (413, MAX_BODY + 1)


@pytest.mark.parametrize("path", ["/recommend", "/healthz"])
def test_a_half_sent_body_times_out(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """130 clients that never finish would otherwise hold all places of a replica."""
    monkeypatch.delenv(TOKEN_FILE, raising=False)
    monkeypatch.setattr(tiger_serve, "BODY_SECONDS", 0.2)
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
    asyncio.run(RequestGuard(reads_all)({"type": "http", "path": path, "headers": []}, receive, send))
    assert time.monotonic() - begin < 5
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]


def test_an_answer_may_take_longer_than_a_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the body an application waits for the client to hang up, for as long as it computes."""
    monkeypatch.delenv(TOKEN_FILE, raising=False)
    monkeypatch.setattr(tiger_serve, "BODY_SECONDS", 0.1)
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

    asyncio.run(RequestGuard(computes)({"type": "http", "path": "/recommend", "headers": []}, receive, send))
    assert sent[0]["status"] == 200


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_sent_back_is_refused_without_it(name: str) -> None:
    """By the handlers of the server's application, around an endpoint of the same model."""
    app = FastAPI(exception_handlers=dict(api.exception_handlers))

    @app.post("/recommend")
    async def recommend(request: Request) -> dict[str, str]:
        return {}

    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": UNREADABLE[name], "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/recommend", "raw_path": b"/recommend", "method": "POST", "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")], "server": ("h", 1), "scheme": "http"}
    asyncio.run(app(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent)
    assert sent[0]["status"] == 422, body
    assert len(body) < 8000
    for found in json.loads(body.decode())["detail"] if b"loc" in body else []:
        assert set(found) == {"type", "loc", "msg"}


def test_items_have_the_names_and_titles_of_the_catalog(tmp_path: Path) -> None:
    """Read without the texts, which are the most of it."""
    folder = Folder(str(tmp_path))
    table = pa.table({"item_id": [0, 1, 2], "source_id": ["a", "b", "c"], "text": ["one " * 30, "two", ""]})
    catalog = Catalog(Artifact(folder, {"kind": "catalog", "metrics": {"items": 3}}))
    for titles in (None, [None, "", "three"], ["é", "x", None]):
        if titles is not None:
            table = table.drop_columns("title") if "title" in table.column_names else table
            table = table.append_column("title", pa.array(titles))
        folder.write_table("items.parquet", table, row_group_size=2)
        for cached in ("items", "source_ids", "titles"):
            catalog.__dict__.pop(cached, None)
        assert tiger_serve._names_and_titles(folder) == (["a", "b", "c"], catalog.titles)


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


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "tiger.example.org"])
def test_an_open_port_needs_a_token(host: str) -> None:
    with pytest.raises(SecurityError, match="is open to others: set serve.token_file"):
        serve_forever(None, ServeConfig(host=host), DecodingConfig(), ResourcesConfig())  # type: ignore[arg-type]


def test_ray_s_other_proxy_ignores_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(SecurityError, match="set serve.token_file"):
        serve_forever(None, ServeConfig(), DecodingConfig(), ResourcesConfig())  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [{}, {"beam": "5"}, {"model": "m", "modle": "m"}])
def test_arguments_of_a_service_are_checked(arguments: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="model is missing|unknown key decoding"):
        application(arguments)


@pytest.mark.parametrize("beam", ["ten", "", "0", "-1", "5.5", 0])
def test_a_beam_is_a_number(beam: Any) -> None:
    with pytest.raises(ConfigError, match="decoding.beam"):
        application({"model": "m", "beam": beam})
    assert application({"model": "m", "beam": 20}) and application({"model": "m", "beam": "20"})


def test_the_configuration_knows_the_server() -> None:
    run = load(RunConfig, None, ["serve.port=9000", "serve.resources.max_workers=2"], ROOT / "tiger/configs")
    assert (run.serve.host, run.serve.port, run.serve.resources.max_workers, run.decoding.beam) == (
        "127.0.0.1",
        9000,
        2,
        50,
    )
