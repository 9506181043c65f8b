"""What a replica does when Ray Serve gives it another model: load, refuse, take, go back. Without Ray."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.serving import ask, toy_model
from tiger.core.errors import ArtifactError, ConfigError
from tiger.on_ray import replica
from tiger.on_ray.replica import Replica
from tiger.serving.app import build_app
from tiger.serving.model import ModelVersion, ServedModel
from tiger.serving.schemas import Request

MODELS = {f"runs/model-{seed}": seed for seed in range(3)}


class Counted:
    """In place of Ray's metrics."""

    def __init__(self) -> None:
        self.swaps: list[str] = []
        self.models: list[str] = []
        self.batches: list[tuple[str, int]] = []

    def swap(self, result: str) -> None:
        self.swaps.append(result)

    def current(self, model: str, semantic_ids: str | None) -> None:
        self.models.append(model)

    def batch(self, model: str, size: int, seconds: float) -> None:
        self.batches.append((model, size))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Models load once it is set; runs/bad is altered, and runs/ids-bad continues the IDs of another model."""
    open_ = threading.Event()
    open_.set()
    ready = {ModelVersion(model=uri): toy_model(12, seed) for uri, seed in MODELS.items()}
    for number in range(2):
        appended = toy_model(14 + number, 0)
        appended.name = f"model-0+ids-{number}"
        appended.version = ModelVersion(model="runs/model-0", semantic_ids=f"runs/ids-{number}")
        ready[appended.version] = appended

    def load(uri: str, device: str, semantic_ids: str | None) -> ServedModel:
        open_.wait(20)
        if semantic_ids == "runs/ids-bad":
            raise ArtifactError("runs/ids-bad continues runs/ids-x, but the model was trained with runs/ids-y")
        if uri not in MODELS:
            raise ArtifactError(f"{uri}: model.safetensors was altered")
        return ready[ModelVersion(model=uri, semantic_ids=semantic_ids)]

    monkeypatch.setattr(replica.ServedModel, "load", load)
    return open_


@pytest.fixture
def server(gate: threading.Event) -> Any:
    server = object.__new__(Replica)
    server.threads, server.device, server.metrics = 1, "cpu", Counted()
    server.swap = server._standby = server._loading = None
    return server


async def settled(server: Any) -> None:
    if server._loading is not None:
        await server._loading


def test_a_replica_without_a_model_is_not_healthy(server: Any) -> None:
    with pytest.raises(ConfigError, match="set user_config of the deployment to {model: URI}"):
        server.check_health()
    asyncio.run(server.reconfigure({"model": "runs/model-0"}))
    server.check_health()
    assert server.model.name == "model-0"
    with pytest.raises(ConfigError, match="unknown key user_config.modle"):
        asyncio.run(server.reconfigure({"modle": "runs/model-0"}))


def test_a_new_replica_takes_the_previous_model_if_it_refuses_the_new_one(server: Any) -> None:
    asyncio.run(server.reconfigure({"model": "runs/bad", "previous": "runs/model-1"}))
    assert server.model.name == "model-1"
    assert (server.swap.state, server.swap.model) == ("refused", "runs/bad")
    assert "was altered" in server.swap.reason


def test_a_new_replica_without_a_model_to_serve_does_not_start(server: Any) -> None:
    for config in ({"model": "runs/bad"}, {"model": "runs/bad", "previous": "runs/worse"}):
        with pytest.raises(ArtifactError, match="was altered"):
            asyncio.run(server.reconfigure(config))


def test_the_old_model_answers_until_the_new_one_is_loaded(server: Any, gate: threading.Event) -> None:
    """`reconfigure` returns at once: Ray Serve sends a replica no requests while it runs."""

    async def change() -> None:
        await server.reconfigure({"model": "runs/model-0"})
        gate.clear()
        await asyncio.wait_for(server.reconfigure({"model": "runs/model-1", "previous": "runs/model-0"}), 5)
        await asyncio.sleep(0.05)
        assert (server.model.name, server.swap.state) == ("model-0", "loading")
        gate.set()
        await settled(server)
        assert (server.model.name, server.swap.state) == ("model-1", "done")

    asyncio.run(change())
    assert (server.metrics.swaps, server.metrics.models) == (["done"], ["model-0", "model-1"])


def test_a_refused_model_changes_nothing(server: Any) -> None:
    async def change() -> None:
        await server.reconfigure({"model": "runs/model-0"})
        await server.reconfigure({"model": "runs/bad", "previous": "runs/model-0"})
        await settled(server)
        assert (server.model.name, server.swap.state) == ("model-0", "refused")
        await server.reconfigure({"model": "runs/model-2"})  # the next one is not affected
        await settled(server)
        assert (server.model.name, server.swap.state) == ("model-2", "done")

    asyncio.run(change())
    assert server.metrics.swaps == ["refused", "done"]


def test_a_prepared_model_is_taken_at_once(server: Any, gate: threading.Event) -> None:
    async def change() -> None:
        await server.reconfigure({"model": "runs/model-0"})
        assert "was altered" in await server.prepare("runs/bad")
        assert await server.prepare("runs/model-1") is None
        assert server.model.name == "model-0"
        gate.clear()  # nothing is loaded from here on
        await server.reconfigure({"model": "runs/model-1", "previous": "runs/model-0"})
        assert server.model.name == "model-1"
        assert await server.state() == {
            "model": "runs/model-1",
            "semantic_ids": None,
            "name": "model-1",
            "swap": {"model": "runs/model-1", "semantic_ids": None, "state": "done", "reason": None},
        }
        gate.set()

    asyncio.run(change())


def test_appended_items_are_taken_refused_and_given_back_like_a_model(server: Any, gate: threading.Event) -> None:
    """`model` and `semantic_ids` are one choice: a change of either is a change, and both go back together."""
    first, second, bad = ({"model": "runs/model-0", "semantic_ids": f"runs/ids-{name}"} for name in ("0", "1", "bad"))

    async def change() -> None:
        await server.reconfigure({"model": "runs/model-0"})
        assert await server.prepare(**first) is None
        gate.clear()  # nothing is loaded from here on
        await server.reconfigure(first | {"previous": {"model": "runs/model-0"}})
        assert server.model.name == "model-0+ids-0"
        assert (await server.state()).items() >= first.items()
        gate.set()
        await server.reconfigure(second | {"previous": first})  # of `serve deploy`, without `prepare`
        await settled(server)
        assert (server.model.name, server.swap.state) == ("model-0+ids-1", "done")
        assert "continues runs/ids-x" in await server.prepare(**bad)
        await server.reconfigure(bad | {"previous": second})
        await settled(server)
        assert server.model.name == "model-0+ids-1"
        assert server.swap.model_dump().items() >= (bad | {"state": "refused"}).items()
        await server.reconfigure({"model": "runs/model-0", "semantic_ids": None, "previous": None})
        await settled(server)
        assert server.model.name == "model-0"

    asyncio.run(change())
    assert server.metrics.swaps == ["done", "done", "refused", "refused", "done"]


def test_a_new_replica_takes_the_previous_items_if_it_refuses_the_new_ones(server: Any) -> None:
    previous = {"model": "runs/model-0", "semantic_ids": "runs/ids-0"}
    asyncio.run(server.reconfigure({"model": "runs/model-0", "semantic_ids": "runs/ids-bad", "previous": previous}))
    assert (server.model.name, server.swap.semantic_ids) == ("model-0+ids-0", "runs/ids-bad")
    assert "continues runs/ids-x" in server.swap.reason


def test_a_change_of_mind_while_a_model_loads(server: Any, gate: threading.Event) -> None:
    async def change() -> None:
        await server.reconfigure({"model": "runs/model-0"})
        gate.clear()
        await server.reconfigure({"model": "runs/model-1"})
        await asyncio.sleep(0.01)
        await server.reconfigure({"model": "runs/model-0"})
        gate.set()
        await asyncio.sleep(0.1)
        assert server.model.name == "model-0"
        await server.reconfigure({"model": "runs/model-2"})
        await settled(server)
        assert server.model.name == "model-2"

    asyncio.run(change())


def test_a_replaced_model_is_freed(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By reference counts alone: Ray Serve may exempt the first model from garbage collection."""
    monkeypatch.setattr(replica.ServedModel, "load", lambda uri, *_: toy_model(12, MODELS[uri]))
    server.options, server.metrics.request = replica.DecodingConfig(beam=5), lambda *_: None
    server.metrics.lists = lambda *_, **__: None

    async def decode(query: Any) -> Any:
        return query.model.decode([query])[0]

    server.decode = decode
    asyncio.run(server.reconfigure({"model": "runs/model-0"}))
    client = TestClient(build_app(server))
    gc.collect()
    gc.disable()
    try:
        old, weights = weakref.ref(server.model), weakref.ref(server.model.recommender.model)
        for path in ("/healthz", "/status", "/items/i1", "/search?q=soap", "/prefix", "/prefix?codes=1"):
            assert client.get(path).status_code == 200
        assert ask(client, history=["i1"], k=3, explain=True)["beam"]
        asyncio.run(server.prepare("runs/model-1"))
        asyncio.run(server.reconfigure({"model": "runs/model-1"}))
        assert client.get("/status").json()["model"] == "model-1"
        assert old() is weights() is None
    finally:
        gc.enable()


def test_a_batch_around_a_swap_is_decoded_by_the_model_of_each_request(server: Any) -> None:
    old, new = toy_model(24, 0), toy_model(12, 1)
    options = replica.DecodingConfig(beam=10)
    queries = [
        model.queries(Request(history=[f"i{row}"], k=3), options)[0][0]
        for row, model in enumerate([old, new, old, new, old])
    ]
    found = asyncio.run(Replica._decode.__wrapped__(server, queries))
    assert server.metrics.batches == [("model-0", 3), ("model-1", 2)]
    for query, ranked in zip(queries, found, strict=True):
        assert [item for item, _ in ranked.items] == [item for item, _ in query.model.decode([query])[0].items]
