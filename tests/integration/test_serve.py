"""The server that `python -m jobs.serve` starts, on a Ray of its own, and next to one that runs already.

It is asked over HTTPS, with a token, by a client that checks its certificate.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.paths import ROOT
from tests.processes import below, free_ports
from tests.served import Running, under_load
from tests.serving import TOKEN, UNREADABLE, documented_metrics
from tiger.core.artifacts import MANIFEST, Artifact, _digest, newest, open_artifact
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
    with under_load(server, model) as answers:
        done = [server.swap(str(other)), server.swap("--back"), server.swap(str(altered)), server.swap("--back")]
    first, back, refused, again = done
    assert [each.returncode for each in done] == [0, 0, 4, 0], [each.stderr for each in done]
    before = {"model": model.home.uri, "semantic_ids": None}
    assert json.loads(first.stdout).items() >= {"model": str(other), "previous": before, "replicas": 2}.items()
    assert json.loads(back.stdout)["model"] == model.home.uri
    assert "2 of 2 replicas refuse the model" in refused.stderr
    assert f"{model.home.uri} keeps answering: {altered}: model.safetensors was altered" in refused.stderr
    assert len(refused.stderr.strip().splitlines()[-1]) < 400
    assert json.loads(again.stdout)["model"] == str(other)
    assert {status for status, _ in answers} == {200}
    assert answers.total() > 100
    status = server.ask("/status", token=TOKEN)[1]
    assert (status["model"], status["swap"]["state"]) == (f"model-{model.fingerprint}", "done")


@pytest.mark.slow
def test_appended_items_are_served_under_load_and_taken_back(server: Running, model: Artifact, tmp_path: Path) -> None:
    """No request fails; every answer names the IDs that it has; those of another model are refused."""
    first = Catalog(model.inputs["catalog"]).items.slice(0, 1).to_pylist()[0]
    price, text = str(first["price"] or ""), first["description"] or ""
    rows = [["sku", "title", "brand", "categories", "price", "description"]]
    rows += [[f"new-{n}", f"Zyxomat {first['title']}", first["brand"], "Zyxomats", price, text] for n in range(3)]
    with (tmp_path / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    keys = ["data.kind=tables", "data.item_id=sku", f'append.items=["{tmp_path}/new.csv"]']
    ran = server.tiger("append", model.home.uri, *keys)
    assert ran.returncode == 0, ran.stderr
    appended = json.loads(ran.stdout.splitlines()[-1])["artifact"]
    server.swap(model.home.uri)  # whatever the tests before have left
    with under_load(server, model) as answers:
        refused = server.swap("--semantic-ids", _of_another_model(model.inputs["semantic_ids"]))
        kept = server.ask("/readyz")[1]
        taken = server.swap("--semantic-ids", appended)
        found = server.ask("/search?q=zyxomat", token=TOKEN)[1]["items"]
        item = server.ask("/items/new-1", token=TOKEN)[1]
        new = server.recommend(history=[first["source_id"]], k=3, filters={"only_new": True, "category": "Zyxomats"})[1]
        grown = server.ask("/readyz")[1]
        back = server.swap("--back")
    done = [refused, taken, back]
    assert [each.returncode for each in done] == [4, 0, 0], [each.stderr for each in done]
    assert {status for status, _ in answers} == {200}
    assert "but the model was trained with" in refused.stderr
    assert refused.stderr.count("error: ") == 1
    trained, ids = model.inputs["semantic_ids"].home, open_artifact(appended)
    plain, version = f"model-{model.fingerprint}", f"model-{model.fingerprint}+semantic_ids-{ids.fingerprint}"
    assert kept == {"status": "ready", "model": plain, "semantic_ids": trained.uri.rpartition("/")[2]}
    assert grown == {"status": "ready", "model": version, "semantic_ids": f"semantic_ids-{ids.fingerprint}"}
    assert {name for _, name in answers} == {plain, version}
    expected = {"model": model.home.uri, "semantic_ids": appended}
    assert json.loads(taken.stdout).items() >= (expected | {"replicas": 2}).items()
    assert json.loads(back.stdout).items() >= {"semantic_ids": None, "previous": expected}.items()
    assert {each["item"] for each in found} == {each["item"] for each in new["items"]} == {"new-0", "new-1", "new-2"}
    assert (item["seen_in_training"], item["categories"], item["model"]) == (0, ["Zyxomats"], version)
    assert server.ask("/items/new-1", token=TOKEN)[0] == 404
    _prometheus_has_the_metrics(server, plain, version)


def _of_another_model(ids: Artifact) -> str:
    """Copy semantic IDs under another fingerprint, as another tokenizer would have made them; return their folder."""
    folder = ids.home.parent.child("semantic_ids-00000000")
    shutil.copytree(ids.home.uri, folder.uri, dirs_exist_ok=True)
    manifest = ids.manifest | {"fingerprint": "00000000"}
    folder.write_json(MANIFEST, manifest | {"digest": _digest(manifest)})
    return folder.uri


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


def _prometheus_has_the_metrics(server: Running, *versions: str) -> None:
    """A node exports every metric that docs/serving.md names, next to those of Ray."""
    server.recommend(history=["who?"], filters={"allow": []})  # an empty list, of the most popular items
    command = [sys.executable, "-m", "tests.scripts.metrics_port"]
    ran = subprocess.run(command, cwd=ROOT, env=server.environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    address = server.environment["RAY_ADDRESS"].rpartition(":")[0]
    deadline, missing = time.monotonic() + 60, documented_metrics()
    while missing:  # exported every few seconds
        assert time.monotonic() < deadline, missing
        with urllib.request.urlopen(f"http://{address}:{int(ran.stdout)}/metrics", timeout=30) as found:
            lines = [line for line in found.read().decode().splitlines() if line.startswith("ray_tiger_serve_")]
        exported = {line.partition("{")[0].removesuffix("_count") for line in lines}
        missing = documented_metrics() - exported
        time.sleep(1)
    for version in versions:
        of_version = [line for line in lines if f'model="{version}"' in line]
        assert any('path="/recommend"' in line and 'status="200"' in line for line in of_version)
        ids = version.rpartition("+")[2] if "+" in version else "semantic_ids-"
        assert any(line.startswith("ray_tiger_serve_model{") and f'semantic_ids="{ids}' in line for line in of_version)


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
