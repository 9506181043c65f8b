"""A trained model behind HTTP: a real server, asked by a real client; who is let in, and how much is read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi import FastAPI

from tests.integration.test_jobs import ROOT, TINY
from tests.integration.test_submit import free_ports
from tiger.core.artifacts import Artifact, newest
from tiger.core.config import load
from tiger.core.errors import ConfigError, ResourceError, SecurityError
from tiger.core.storage import Folder
from tiger.data.catalog import Catalog
from tiger.models.recommender import Recommender
from tiger.on_ray import serve as tiger_serve
from tiger.on_ray.serve import MAX_BODY, TOKEN_FILE, Request, RequestGuard, api, application, read_token, serve_forever
from tiger.run import ResourcesConfig, RunConfig, ServeConfig

TOKEN = "a-token-of-the-test"


def token_file(folder: Path, content: str = TOKEN, mode: int = 0o600) -> str:
    path = folder / "token"
    path.write_text(content + "\n")
    path.chmod(mode)
    return str(path)


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


UNREADABLE = {
    "NaN": b'{"history": ["a"], "k": NaN}',
    "infinity": b'{"history": ["a"], "k": 1e400}',
    "minus infinity": b'{"history": [-Infinity]}',
    "a lone surrogate": b'{"history": ["\\ud800"]}',
    "a lone surrogate as a user": b'{"history": ["a"], "user": "\\udfff"}',
    "a lone surrogate as a key": b'{"history": ["a"], "\\ud800": 1}',
    "an unknown key with NaN": b'{"history": ["a"], "x": NaN}',
    "an integer of 400 digits": b'{"history": ["a"], "k": ' + b"9" * 400 + b"}",
    "an integer of 4,000 digits": b'{"history": ["a"], "k": ' + b"9" * 4000 + b"}",
    "an integer of 6,000 digits": b'{"history": ["a"], "k": ' + b"9" * 6000 + b"}",
    "integers as names": b'{"history": [' + b"9" * 6000 + b"]}",
    "nothing but NaN": b"NaN",
    "a surrogate alone": b'"\\ud800"',
    "deep nesting": b"[" * 30_000,
    "a deep value": b'{"history": ' + b"[" * 9000 + b"]" * 9000 + b"}",
    "bytes that are not UTF-8": b'{"history": ["\xff\xfe"]}',
    "NUL": b'{"history": [1, "\\u0000"]}',
    "a long key": b'{"history": ["a"], "' + b"k" * 60_000 + b'": 1}',
    "many keys": b'{"history": ["a"], ' + b", ".join(b'"k%d": 1' % n for n in range(3000)) + b"}",
}


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


@pytest.mark.slow
def test_a_serve_that_runs_already_is_left_alone(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another team's application, on an address of its own, answers before, during and after."""
    from ray import serve

    @serve.deployment(ray_actor_options={"num_cpus": 0})
    class Other:
        def __call__(self, request: Any) -> str:
            return "other team"

    def answers(path: str = "/other") -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as found:
                return found.read() == b"other team"
        except urllib.error.URLError:
            return False

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    port, wanted = free_ports(2)
    model = Artifact(Folder(str(tmp_path / "model-00000000")), {"kind": "model"})
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(Other.bind(), name="other", route_prefix="/other")
        assert answers()
        with pytest.raises(SecurityError, match=rf"on 127.0.0.1:{port}, but .* are 127.0.0.1:{wanted}"):
            serve_forever(model, ServeConfig(port=wanted), ResourcesConfig())
        with pytest.raises(SecurityError, match="Ray Serve runs other on this cluster already"):
            serve_forever(model, ServeConfig(port=port), ResourcesConfig())
        assert answers()
        assert set(serve.status().applications) == {"other"}

        serve.run(Other.bind(), name="tiger", route_prefix="/tiger")  # as if theirs had come to a Serve of ours
        tiger_serve._stop(was_running=False)
        assert set(serve.status().applications) == {"other"}
        assert answers()

        serve.delete("other")
        assert tiger_serve._require_no_other_address(ServeConfig(port=port))
        serve.run(Other.bind(), name="tiger", route_prefix="/tiger")
        tiger_serve._stop(was_running=True)
        assert serve.context._get_global_client(raise_if_no_controller_running=False) is not None
        serve.run(Other.bind(), name="tiger", route_prefix="/tiger")
        with pytest.raises(SecurityError, match="Ray Serve runs tiger on this cluster already"):
            serve_forever(model, ServeConfig(port=port), ResourcesConfig())
        assert answers("/tiger")
        tiger_serve._stop(was_running=False)
        assert serve.context._get_global_client(raise_if_no_controller_running=False) is None

        with socket.create_server(("127.0.0.1", 0)) as taken:
            number = taken.getsockname()[1]
            with pytest.raises(ResourceError, match=f"^127.0.0.1:{number} cannot be served: Failed to bind .*; set"):
                serve_forever(model, ServeConfig(port=number), ResourcesConfig())
        assert serve.context._get_global_client(raise_if_no_controller_running=False) is None
    finally:
        serve.shutdown()


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
        serve_forever(None, ServeConfig(host=host), ResourcesConfig())  # type: ignore[arg-type]


def test_ray_s_other_proxy_ignores_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(SecurityError, match="set serve.token_file"):
        serve_forever(None, ServeConfig(), ResourcesConfig())  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [{}, {"beam": "5"}, {"model": "m", "modle": "m"}])
def test_arguments_of_a_service_are_checked(arguments: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="args of the application must be model and beam"):
        application(arguments)


@pytest.mark.parametrize("beam", ["ten", "", "0", "-1", "5.5", 0])
def test_a_beam_is_a_number(beam: Any) -> None:
    with pytest.raises(ConfigError, match="of the application: must be an integer >= 1"):
        application({"model": "m", "beam": beam})
    assert application({"model": "m", "beam": 20}) and application({"model": "m", "beam": "20"})


class Running:
    """`python -m jobs.serve` in a process of its own, on a port of its own."""

    def __init__(self, root: Path, ray_folder: str) -> None:
        self.token = token_file(root)
        (port,) = free_ports(1)
        self.address = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "jobs.serve", *TINY, f"root={root}/runs", f"serve.port={port}"]
        command += [f"serve.token_file={self.token}", "serve.beam=20", "serve.replicas=2"]
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        environment["RAY_TMPDIR"] = ray_folder
        self.log = root / "serve.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        deadline = time.monotonic() + 1200
        while "serving " not in self.log.read_text() or self.ask("/healthz")[0] != 200:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.5)

    def children(self) -> list[int]:
        """All processes below ours."""
        parents = {}
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        found = [self.process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found[1:]

    def ask(self, path: str, body: Any = None, token: str = "") -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.address + path, data, headers), timeout=60
            ) as found:
                return found.status, json.loads(found.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"{}")

    def recommend(self, token: str = TOKEN, **body: Any) -> tuple[int, Any]:
        return self.ask("/recommend", body, token)


@pytest.mark.slow
def test_a_real_server(tmp_path: Path, record_property: Any) -> None:
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as ray_folder:
        server = Running(tmp_path, ray_folder)
        try:
            model = newest(f"{tmp_path}/runs", "model")
            _answers_are_those_of_the_recommender(server, model)
            refused = _what_cannot_be_answered_says_why(server)
            _half_sent_bodies_hold_no_place(server, model)
            _a_killed_copy_costs_no_wrong_answer(server, model)
            record_property("injections", refused + 1)
        finally:
            server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    assert "serving: stopped" in server.log.read_text()


def _answers_are_those_of_the_recommender(server: Running, model: Artifact) -> None:
    catalog, recommender = Catalog(model.inputs["catalog"]), Recommender.load(model)
    histories = [catalog.histories.of(user).tolist() for user in range(60)]
    bodies = [
        {"history": [catalog.source_ids[item] for item in history], "k": 1 + row % 20, "exclude_history": row % 3 > 0}
        for row, history in enumerate(histories)
    ]
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda body: server.recommend(**body), bodies))
    for history, body, (status, answer) in zip(histories, bodies, answers, strict=True):
        assert status == 200
        found = recommender.recommend([history], body["k"], beam=20, exclude_history=body["exclude_history"])
        wanted = [item for item in found.items[0] if item >= 0]
        assert [each["item"] for each in answer["items"]] == [catalog.source_ids[item] for item in wanted]
        assert [each["title"] for each in answer["items"]] == [catalog.titles[item] for item in wanted]
        scores = [each["score"] for each in answer["items"]]
        np.testing.assert_allclose(scores, found.scores[0][: len(wanted)], atol=1e-4)
        assert (answer["ignored"], answer["model"]) == ([], f"model-{model.fingerprint}")
    known = catalog.source_ids[0]
    assert server.recommend(history=["who?", known])[1] == server.recommend(history=[known])[1] | {"ignored": ["who?"]}


def _what_cannot_be_answered_says_why(server: Running) -> int:
    """Asks what must be refused; returns how often."""
    of_a_field = [
        ({}, "history"),
        ({"history": []}, "history"),
        ({"history": ["a"] * 201}, "history"),
        ({"history": "a"}, "history"),
        ({"history": [1.5]}, "history"),
        ({"history": ["a" * 257]}, "history"),
        ({"history": ["a"], "k": 0}, "k"),
        ({"history": ["a"], "k": -1}, "k"),
        ({"history": ["a"], "k": "ten"}, "k"),
        ({"history": ["a"], "exclude_history": "no"}, "exclude_history"),
        ({"history": ["a"], "kk": 3}, "kk"),
        ({"history": ["a"], "user": 7}, "user"),
    ]
    for body, where in of_a_field:
        status, said = server.recommend(**body)
        assert (status, said["detail"][0]["loc"][1]) == (422, where), said
    of_a_value = [
        ({"history": ["a", "b"]}, 422, "history: none of its 2 ids is in the catalog"),
        ({"history": ["a"], "k": 21}, 422, "k: must be at most 20, the beam of this server"),
        ({"history": ["a" * 200] * 400}, 413, "request body exceeds 64 KiB"),
    ]
    for body, status, detail in of_a_value:
        assert server.recommend(**body) == (status, {"detail": detail})
    broken = (b"", b"{", b"\xff\xfe", *UNREADABLE.values())
    for body in broken:
        assert server.ask("/recommend", body, TOKEN)[0] == 422
    for token in ("", "wrong"):
        assert server.recommend(token=token, history=["a"])[0] == 401
    assert server.ask("/recommend", token=TOKEN)[0] == 405
    assert server.ask("/elsewhere", token=TOKEN)[0] == 404
    return len(of_a_field) + len(of_a_value) + len(broken) + 4


def _half_sent_bodies_hold_no_place(server: Running, model: Artifact) -> None:
    """More of them than both copies have places for; they are sent away, and others are answered."""
    host, _, port = server.address.removeprefix("http://").partition(":")
    request = (
        f"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
        f"Authorization: Bearer {TOKEN}\r\n\r\n{{"
    )
    with contextlib.ExitStack() as open_ones:
        held = [open_ones.enter_context(socket.create_connection((host, int(port)), 60)) for _ in range(300)]
        for one in held:
            one.sendall(request.encode())
        begin = time.monotonic()
        catalog = Catalog(model.inputs["catalog"])
        assert server.recommend(history=[catalog.source_ids[0]])[0] == 200
        assert time.monotonic() - begin < 2 * tiger_serve.REQUEST_SECONDS
        assert {one.recv(12) for one in held} <= {b"HTTP/1.1 408", b"HTTP/1.1 503"}


def _a_killed_copy_costs_no_wrong_answer(server: Running, model: Artifact) -> None:
    catalog = Catalog(model.inputs["catalog"])
    body = {"history": [catalog.source_ids[item] for item in catalog.histories.of(0)], "k": 5}

    def names(answer: tuple[int, Any]) -> list[str]:  # scores depend on the batch, in their last digits
        return [each["item"] for each in answer[1]["items"]]

    right = names(server.recommend(**body))
    copies = [pid for pid in server.children() if "ServeReplica" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(copies) == 2
    with ThreadPoolExecutor(4) as clients:
        under_way = [clients.submit(server.recommend, **body) for _ in range(100)]
        os.kill(copies[0], signal.SIGKILL)
        answers = [each.result() for each in under_way]
    good = [answer for answer in answers if answer[0] == 200]
    assert len(good) >= 96  # four clients: the killed copy was working on four requests at most
    assert all(names(answer) == right for answer in good)
    assert names(server.recommend(**body)) == right


def test_the_configuration_knows_the_server() -> None:
    run = load(RunConfig, None, ["serve.port=9000", "serve.replicas=2"], ROOT / "tiger/configs")
    assert (run.serve.host, run.serve.port, run.serve.replicas, run.serve.beam) == ("127.0.0.1", 9000, 2, 50)
