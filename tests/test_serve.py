"""A trained model behind HTTP: a real server, asked by a real client; who is let in, and how much is read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
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
import pytest
from test_jobs import ROOT, TINY
from test_submit import free_ports

from tiger.artifacts import Artifact, newest
from tiger.catalog import Catalog
from tiger.config import load
from tiger.errors import ConfigError, SecurityError
from tiger.recommender import Recommender
from tiger.run import RunConfig, ServeConfig
from tiger.scale.serve import MAX_BODY, TOKEN_FILE, Gate, application, read_token, serve_until_stopped

TOKEN = "a-token-of-the-test"


def token_file(folder: Path, content: str = TOKEN, mode: int = 0o600) -> str:
    path = folder / "token"
    path.write_text(content + "\n")
    path.chmod(mode)
    return str(path)


def through(gate: Gate, path: str = "/recommend", token: str = "", parts: tuple[int, ...] = (10,)) -> tuple[int, int]:
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
    gate = Gate(reads_all)
    for wrong in ("", "another", TOKEN + "x", TOKEN[:-1]):
        assert through(gate, token=wrong) == (401, 0)
    assert through(gate, token=TOKEN) == (200, 10)
    assert through(gate, path="/healthz") == (200, 10)


def test_a_body_is_read_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_FILE, raising=False)
    gate = Gate(reads_all)
    assert through(gate, parts=(MAX_BODY // 2, MAX_BODY // 2)) == (200, MAX_BODY)
    assert through(gate, parts=(MAX_BODY, 1, 50_000, 50_000)) == (413, MAX_BODY + 1)
    assert through(gate, path="/healthz", parts=(MAX_BODY + 1,)) == (413, MAX_BODY + 1)


def test_a_token_is_a_secret(tmp_path: Path) -> None:
    assert read_token(None) is None
    assert read_token(token_file(tmp_path)) == TOKEN
    with pytest.raises(SecurityError, match="every user of the machine can read: chmod 600"):
        read_token(token_file(tmp_path, mode=0o604))
    with pytest.raises(SecurityError, match="token is empty: openssl rand"):
        read_token(token_file(tmp_path, content=""))
    with pytest.raises(SecurityError, match="cannot be read .*No such file"):
        read_token(str(tmp_path / "none"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "tiger.example.org"])
def test_an_open_port_needs_a_token(host: str) -> None:
    with pytest.raises(SecurityError, match="is open to others: set serve.token_file"):
        serve_until_stopped(None, ServeConfig(host=host), ScaleConfig())  # type: ignore[arg-type]


def test_ray_s_other_proxy_ignores_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(SecurityError, match="set serve.token_file"):
        serve_until_stopped(None, ServeConfig(), ScaleConfig())  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [{}, {"beam": "5"}, {"model": "m", "modle": "m"}])
def test_arguments_of_a_service_are_checked(arguments: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="args of the application are model and beam"):
        application(arguments)


@pytest.mark.parametrize("beam", ["ten", "", "0", "-1", "5.5", 0])
def test_a_beam_is_a_number(beam: Any) -> None:
    with pytest.raises(ConfigError, match="of the application: a whole number from 1 is needed"):
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
        ({"history": ["a", "b"]}, 422, "history: none of its 2 names is an item of the catalog"),
        ({"history": ["a"], "k": 21}, 422, "k: this server's beam is 20, at most so many items come back"),
        ({"history": ["a" * 200] * 400}, 413, "a body of at most 64 KiB is read"),
    ]
    for body, status, detail in of_a_value:
        assert server.recommend(**body) == (status, {"detail": detail})
    broken = (b"", b"{", b"\xff\xfe", b"[" * 30_000)
    for body in broken:
        assert server.ask("/recommend", body, TOKEN)[0] in (400, 422)
    for token in ("", "wrong"):
        assert server.recommend(token=token, history=["a"])[0] == 401
    assert server.ask("/recommend", token=TOKEN)[0] == 405
    assert server.ask("/elsewhere", token=TOKEN)[0] == 404
    return len(of_a_field) + len(of_a_value) + len(broken) + 4


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
    run = load(RunConfig, None, ["serve.port=9000", "serve.replicas=2"], ROOT / "jobs/configs")
    assert (run.serve.host, run.serve.port, run.serve.replicas, run.serve.beam) == ("127.0.0.1", 9000, 2, 50)
