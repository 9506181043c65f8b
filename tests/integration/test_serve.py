"""The server that `python -m jobs.serve` starts, on a Ray of its own, and next to one that runs already.

It is asked over HTTPS, with a token, by a client that checks its certificate.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.paths import ROOT
from tests.pipelines import TINY
from tests.processes import below, free_ports
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
        self.port, self.address = port, f"https://localhost:{port}"
        key = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        key += ["-addext", "subjectAltName=DNS:localhost", "-keyout", f"{root}/key.pem", "-out", f"{root}/cert.pem"]
        subprocess.run(key, check=True, capture_output=True)
        self.tls = ssl.create_default_context(cafile=f"{root}/cert.pem")
        command = [sys.executable, "-m", "jobs.serve", *TINY, f"root={root}/runs", f"serve.port={port}"]
        command += [f"serve.token_file={self.token}", "decoding.beam=20", "serve.resources.max_workers=2"]
        command += [f"serve.tls_cert_file={root}/cert.pem", f"serve.tls_key_file={root}/key.pem"]
        self.environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.environment["RAY_TMPDIR"] = ray_folder
        self.log = root / "serve.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=output, stderr=output)
        deadline = time.monotonic() + 1200
        while "RAY_ADDRESS=" not in self.log.read_text() or self.ask("/healthz")[0] != 200:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.5)
        self.environment["RAY_ADDRESS"] = self.log.read_text().partition("RAY_ADDRESS=")[2].split()[0]

    def swap(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `tiger swap`."""
        return subprocess.run(
            [sys.executable, "-m", "tiger", "swap", *arguments],
            cwd=ROOT, env=self.environment, capture_output=True, text=True,
        )  # fmt: skip

    def ask(self, path: str, body: Any = None, token: str = "") -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        try:
            asked = urllib.request.Request(self.address + path, data, headers)
            with urllib.request.urlopen(asked, timeout=60, context=self.tls) as found:
                return found.status, json.loads(found.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"{}")
        except urllib.error.URLError:
            return 0, {}

    def recommend(self, token: str = TOKEN, **body: Any) -> tuple[int, Any]:
        return self.ask("/recommend", body, token)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as ray_folder:
        server = Running(tmp_path_factory.mktemp("served"), ray_folder)
        try:
            yield server
        finally:
            server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    assert "serving: stopped" in server.log.read_text()


@pytest.fixture(scope="module")
def model(server: Running) -> Artifact:
    return newest(f"{server.log.parent}/runs", "model")


@pytest.mark.slow
def test_a_real_server(server: Running, model: Artifact, record_property: Any) -> None:
    _answers_are_those_of_the_recommender(server, model)
    _filters_and_several_users(server, model)
    refused = _what_cannot_be_answered_says_why(server)
    _prometheus_has_the_metrics(server, model)
    _half_sent_bodies_hold_no_place(server, model)
    _a_killed_copy_costs_no_wrong_answer(server, model)
    record_property("injections", refused + 1)


@pytest.mark.slow
def test_models_are_swapped_under_load(server: Running, model: Artifact, tmp_path: Path) -> None:
    """No request fails; an altered model is refused, and the one before is one command away."""
    other, altered = (_copy(model, tmp_path / name) for name in ("other", "altered"))
    weights = altered / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    catalog = Catalog(model.inputs["catalog"])
    histories = [[catalog.source_ids[item] for item in catalog.histories.of(user)] for user in range(40)]
    statuses: Counter[int] = Counter()
    stop = threading.Event()

    def client(number: int) -> None:
        while not stop.is_set():
            statuses[server.recommend(history=histories[(number + statuses[200]) % 40], k=5)[0]] += 1

    with ThreadPoolExecutor(4) as clients:
        asked = [clients.submit(client, number) for number in range(4)]
        try:
            done = [server.swap(str(other)), server.swap("--back"), server.swap(str(altered)), server.swap("--back")]
        finally:
            stop.set()
        for each in asked:
            each.result()
    first, back, refused, again = done
    assert [each.returncode for each in done] == [0, 0, 4, 0], [each.stderr for each in done]
    assert json.loads(first.stdout).items() >= {"model": str(other), "previous": model.home.uri, "replicas": 2}.items()
    assert json.loads(back.stdout)["model"] == model.home.uri
    assert "2 of 2 replicas refuse the model" in refused.stderr
    assert f"{model.home.uri} keeps answering: {altered}: model.safetensors was altered" in refused.stderr
    assert len(refused.stderr.strip().splitlines()[-1]) < 400
    assert json.loads(again.stdout)["model"] == str(other)
    assert statuses.keys() == {200}
    assert statuses[200] > 100
    status = server.ask("/status", token=TOKEN)[1]
    assert (status["model"], status["swap"]["state"]) == (f"model-{model.fingerprint}", "done")


def _copy(model: Artifact, root: Path) -> Path:
    for each in model.lineage():
        shutil.copytree(each.home.uri, root / each.home.uri.rpartition("/")[2])
    return root / model.home.uri.rpartition("/")[2]


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


def _filters_and_several_users(server: Running, model: Artifact) -> None:
    catalog, recommender = Catalog(model.inputs["catalog"]), Recommender.load(model)
    histories = [catalog.histories.of(user).tolist() for user in range(8)]
    names = [[catalog.source_ids[item] for item in history] for history in histories]
    allowed = list(range(0, catalog.n_items, 3))
    filters = {"allow": [catalog.source_ids[item] for item in allowed], "deny": [catalog.source_ids[allowed[0]]]}
    status, answer = server.recommend(histories=names, k=5, filters=filters, exclude_seen=False)
    found = recommender.recommend(histories, k=5, beam=20, exclude_seen=False, allowed_items=allowed[1:])
    assert status == 200
    assert [[each["item"] for each in row["items"]] for row in answer["answers"]] == found.ids
    status, item = server.ask(f"/items/{catalog.source_ids[7]}", token=TOKEN)
    assert (status, item["title"]) == (200, catalog.titles[7])
    word = catalog.titles[7].split()[0]
    assert any(word in each["title"] for each in server.ask(f"/search?q={word}", token=TOKEN)[1]["items"])
    assert server.ask("/prefix", token=TOKEN)[1]["num_items"] == catalog.n_items


def _prometheus_has_the_metrics(server: Running, model: Artifact) -> None:
    """As a node exports them, next to those of Ray."""
    address = server.environment["RAY_ADDRESS"]
    command = [sys.executable, "-m", "tests.scripts.metrics_port"]
    ran = subprocess.run(command, cwd=ROOT, env=server.environment, capture_output=True, text=True, check=True)
    host = address.rpartition(":")[0]
    wanted = ["request_seconds_count", "batch_size_count", "decode_seconds_count", "lists_total", "popular_lists_total"]
    wanted += ["unknown_items_total", "model"]
    deadline = time.monotonic() + 60
    missing = wanted
    while missing:  # exported every few seconds
        assert time.monotonic() < deadline, missing
        with urllib.request.urlopen(f"http://{host}:{int(ran.stdout)}/metrics", timeout=30) as found:
            lines = found.read().decode().splitlines()
        own = [
            line
            for line in lines
            if line.startswith("ray_tiger_serve_") and f'model="model-{model.fingerprint}"' in line
        ]
        missing = [name for name in wanted if not any(line.startswith(f"ray_tiger_serve_{name}{{") for line in own)]
        time.sleep(1)
    assert any('path="/recommend"' in line and 'status="200"' in line for line in own)


def _what_cannot_be_answered_says_why(server: Running) -> int:
    """Asks what must be refused; returns how often."""
    of_a_field = [
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
    request = (
        f"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
        f"Authorization: Bearer {TOKEN}\r\n\r\n{{"
    )
    with contextlib.ExitStack() as open_ones:
        plain = [socket.create_connection(("localhost", server.port), 60) for _ in range(300)]
        held = [open_ones.enter_context(server.tls.wrap_socket(each, server_hostname="localhost")) for each in plain]
        for one in held:
            one.sendall(request.encode())
        begin = time.monotonic()
        catalog = Catalog(model.inputs["catalog"])
        assert server.recommend(history=[catalog.source_ids[0]])[0] == 200
        assert time.monotonic() - begin < 2 * ServeConfig().request_seconds
        assert {one.recv(12) for one in held} <= {b"HTTP/1.1 408", b"HTTP/1.1 429"}


def _a_killed_copy_costs_no_wrong_answer(server: Running, model: Artifact) -> None:
    catalog = Catalog(model.inputs["catalog"])
    body = {"history": [catalog.source_ids[item] for item in catalog.histories.of(0)], "k": 5}

    def names(answer: tuple[int, Any]) -> list[str]:  # scores depend on the batch, in their last digits
        return [each["item"] for each in answer[1]["items"]]

    right = names(server.recommend(**body))
    copies = [pid for pid in below(server.process.pid) if "ServeReplica" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(copies) == 2
    with ThreadPoolExecutor(4) as clients:
        under_way = [clients.submit(server.recommend, **body) for _ in range(100)]
        os.kill(copies[0], signal.SIGKILL)
        answers = [each.result() for each in under_way]
    good = [answer for answer in answers if answer[0] == 200]
    assert len(good) >= 96  # four clients: the killed copy was working on four requests at most
    assert all(names(answer) == right for answer in good)
    assert names(server.recommend(**body)) == right
