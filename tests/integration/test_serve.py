"""The server that `python -m jobs.serve` starts, on a Ray of its own, and next to one that runs already."""

from __future__ import annotations

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
import pytest

from tests.paths import ROOT
from tests.pipelines import TINY
from tests.processes import free_ports
from tests.serving import TOKEN, UNREADABLE, token_file
from tiger.core.artifacts import Artifact, newest
from tiger.core.errors import ResourceError, SecurityError
from tiger.core.storage import Folder
from tiger.data.catalog import Catalog
from tiger.models.decoding import DecodingConfig
from tiger.models.recommender import Recommender
from tiger.on_ray import serve as tiger_serve
from tiger.on_ray.serve import serve_forever
from tiger.run import ResourcesConfig, ServeConfig


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
            serve_forever(model, ServeConfig(port=wanted), DecodingConfig(), ResourcesConfig())
        with pytest.raises(SecurityError, match="Ray Serve runs other on this cluster already"):
            serve_forever(model, ServeConfig(port=port), DecodingConfig(), ResourcesConfig())
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
            serve_forever(model, ServeConfig(port=port), DecodingConfig(), ResourcesConfig())
        assert answers("/tiger")
        tiger_serve._stop(was_running=False)
        assert serve.context._get_global_client(raise_if_no_controller_running=False) is None

        with socket.create_server(("127.0.0.1", 0)) as taken:
            number = taken.getsockname()[1]
            with pytest.raises(ResourceError, match=f"^127.0.0.1:{number} cannot be served: Failed to bind .*; set"):
                serve_forever(model, ServeConfig(port=number), DecodingConfig(), ResourcesConfig())
        assert serve.context._get_global_client(raise_if_no_controller_running=False) is None
    finally:
        serve.shutdown()


class Running:
    """`python -m jobs.serve` in a process of its own, on a port of its own."""

    def __init__(self, root: Path, ray_folder: str) -> None:
        self.token = token_file(root)
        (port,) = free_ports(1)
        self.address = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "jobs.serve", *TINY, f"root={root}/runs", f"serve.port={port}"]
        command += [f"serve.token_file={self.token}", "decoding.beam=20", "serve.resources.max_workers=2"]
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
        {"history": [catalog.source_ids[item] for item in history], "k": 1 + row % 20, "exclude_seen": row % 3 > 0}
        for row, history in enumerate(histories)
    ]
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda body: server.recommend(**body), bodies))
    for history, body, (status, answer) in zip(histories, bodies, answers, strict=True):
        assert status == 200
        found = recommender.recommend([history], k=body["k"], beam=20, exclude_seen=body["exclude_seen"])
        wanted = [item for item in found.items[0] if item >= 0]
        assert [each["item"] for each in answer["items"]] == [catalog.source_ids[item] for item in wanted]
        assert [each["title"] for each in answer["items"]] == [catalog.titles[item] for item in wanted]
        scores = [each["score"] for each in answer["items"]]
        np.testing.assert_allclose(scores, found.scores[0][: len(wanted)], atol=1e-4)
        assert (answer["by_popularity"], answer["ignored"]) == (False, [])
        assert answer["model"] == f"model-{model.fingerprint}"
    known = catalog.source_ids[0]
    for unknown in ([], ["who?", "what?"]):
        status, answer = server.recommend(history=unknown, k=7)
        found = recommender.recommend([[]], k=7)
        assert (status, answer["by_popularity"], answer["ignored"]) == (200, True, unknown)
        assert [each["item"] for each in answer["items"]] == [catalog.source_ids[item] for item in found.items[0]]
    assert server.recommend(history=["who?", known])[1] == server.recommend(history=[known])[1] | {"ignored": ["who?"]}


def _what_cannot_be_answered_says_why(server: Running) -> int:
    """Asks what must be refused; returns how often."""
    of_a_field = [
        ({}, "history"),
        ({"history": ["a"] * 201}, "history"),
        ({"history": "a"}, "history"),
        ({"history": [1.5]}, "history"),
        ({"history": ["a" * 257]}, "history"),
        ({"history": ["a"], "k": 0}, "k"),
        ({"history": ["a"], "k": -1}, "k"),
        ({"history": ["a"], "k": "ten"}, "k"),
        ({"history": ["a"], "exclude_seen": "no"}, "exclude_seen"),
        ({"history": ["a"], "kk": 3}, "kk"),
        ({"history": ["a"], "user": 7}, "user"),
    ]
    for body, where in of_a_field:
        status, said = server.recommend(**body)
        assert (status, said["detail"][0]["loc"][1]) == (422, where), said
    of_a_value = [
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
