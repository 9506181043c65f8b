"""Answers to histories without a known item, and the limits of bodies in Ray Serve's proxy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import model_of_random_ids

from tiger.models.recommender import Recommender
from tiger.on_ray import serve as tiger_serve
from tiger.on_ray.body_limit import MAX_BODY, PROXY_CALLBACK, PROXY_MIDDLEWARES, proxy_middlewares

ITEMS = 24


class Replica:
    """The server's endpoint without Ray: its requests of one moment are one batch."""

    beam, model = 10, "model-1"

    def __init__(self) -> None:
        model = model_of_random_ids(ITEMS)
        model.items.training_counts.copy_(torch.arange(ITEMS) % 7)
        self.recommender = Recommender(model, "cpu")
        self.names = self.titles = [f"i{n}" for n in range(ITEMS)]
        self.item_of = {name: item for item, name in enumerate(self.names)}

    def ask(self, *bodies: dict[str, Any]) -> list[dict[str, Any]]:
        server_class = tiger_serve._deployment.func_or_class
        decode = server_class._decode.__wrapped__  # without Ray Serve's batching
        requests = [tiger_serve.Request.model_validate(body) for body in bodies]
        histories = [[self.item_of[name] for name in one.history if name in self.item_of] for one in requests]
        found = asyncio.run(decode(self, list(zip(requests, histories, strict=True))))

        class One:
            """This replica, whose batch has been decoded."""

            def __init__(self, own: Replica, row: int) -> None:
                self.__dict__ |= vars(own) | {"row": row, "beam": own.beam, "model": own.model}

            async def _decode(self, asked: Any) -> Any:
                return found[self.row]

        return [
            asyncio.run(server_class.recommend(One(self, row), one)).model_dump() for row, one in enumerate(requests)
        ]


@pytest.mark.parametrize("exclude", [True, False])
def test_a_history_without_a_known_item_gets_the_most_popular_ones_and_says_so(exclude: bool) -> None:
    replica = Replica()
    empty, unknown, known, mixed = replica.ask(
        {"history": [], "k": 5, "exclude_history": exclude},
        {"history": ["who?", "what?"], "k": 3, "exclude_history": exclude},
        {"history": ["i3", "i4"], "k": 4, "exclude_history": exclude},
        {"history": ["who?", "i3", "i4"], "k": 4, "exclude_history": exclude},
    )
    popular = np.argsort(-(np.arange(ITEMS) % 7), kind="stable")[:5]
    assert [each["item"] for each in empty["items"]] == [f"i{item}" for item in popular]
    assert unknown["items"] == empty["items"][:3]
    assert [answer["by_popularity"] for answer in (empty, unknown, known, mixed)] == [True, True, False, False]
    assert [answer["ignored"] for answer in (empty, unknown, known, mixed)] == [[], ["who?", "what?"], [], ["who?"]]
    assert [each["item"] for each in mixed["items"]] == [each["item"] for each in known["items"]]
    scores = [each["score"] for each in empty["items"]]
    assert scores == sorted(scores, reverse=True)
    assert all(np.isfinite(scores))


def test_the_proxy_of_a_ray_that_is_started_here_limits_bodies() -> None:
    assert os.environ[PROXY_CALLBACK] == PROXY_MIDDLEWARES
    assert [each.cls.__name__ for each in proxy_middlewares()] == ["BodyLimit"]
    code = (
        f"import sys; from {PROXY_MIDDLEWARES.replace(':', ' import ')}; print({{'ray', 'torch'}} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


BUSY = """
import sys, time
import tiger.on_ray.serve
import ray
from ray import serve

@serve.deployment(max_ongoing_requests=1)
class Busy:
    async def __call__(self, request):
        if request.query_params.get("sleep"):
            import asyncio
            await asyncio.sleep(float(request.query_params["sleep"]))
        return len(await request.body())

ray.init(address="local", num_cpus=2, include_dashboard=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1]), "request_timeout_s": 60})
serve.run(Busy.bind())
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
"""


def _answer(port: int, path: str, body: bytes, length: int) -> tuple[int, float]:
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
            [sys.executable, "-c", BUSY, str(port)], env=environment | {"RAY_TMPDIR": ray_folder},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        try:
            assert server.stdout is not None
            assert any(line == b"ready\n" for line in server.stdout)
            assert _answer(port, "/", b"x" * MAX_BODY, MAX_BODY)[0] == 200
            with ThreadPoolExecutor(1) as clients:
                busy = clients.submit(_answer, port, "/?sleep=20", b"", 0)
                time.sleep(1)
                status, seconds = _answer(port, "/", b"x" * (MAX_BODY + 1), 1 << 30)
                assert (status, seconds < 5) == (413, True)
                status, seconds = _answer(port, "/", b"x", 1000)
                assert (status, 4 < seconds < 12) == (408, True)
                assert not busy.done()
                assert busy.result()[0] == 200
            assert _answer(port, "/", json.dumps([1]).encode(), 3)[0] == 200
        finally:
            server.communicate(b"")
