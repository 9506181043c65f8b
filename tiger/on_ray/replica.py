"""A replica of the service in Ray Serve: batches, metrics, and models that are swapped while requests are answered.

The deployment's `user_config` names what answers: `model`, a URI; `semantic_ids`, that of an append to the model's; and
`previous`, what a new replica takes if it refuses them. Ray Serve sends a replica no requests while it runs
`reconfigure` (ray-project/ray#54509), and replaces one whose `reconfigure` fails. So `reconfigure` only begins to load
another model in a thread and returns; the replica answers with the old model until the new one is loaded, verified and
probed, and keeps the old one if that fails. `tiger swap` loads it in all replicas first (`prepare`), so that
`reconfigure` finds it ready.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

import ray
import torch
from pydantic import Field, field_validator
from ray import serve
from ray.serve import metrics
from starlette.types import ASGIApp

from tiger.core.config import build
from tiger.core.device import assigned_device
from tiger.core.errors import ConfigError, SecurityError, TigerError
from tiger.models.decoding import DecodingConfig
from tiger.serving.app import build_app
from tiger.serving.guard import read_token
from tiger.serving.model import BATCH, ModelVersion, Query, Ranked, ServedModel
from tiger.serving.schemas import Swap

log = logging.getLogger("ray.serve")  # the logger of replicas: its lines go to their log files

TOKEN_FILE = "TIGER_SERVE_TOKEN_FILE"
"""Environment variable of the replicas: a file with the bearer token."""

_BATCH_SECONDS = 0.005  # that a request waits for others to be decoded with it


class ModelConfig(ModelVersion):
    """The deployment's `user_config`: which model answers, with which items."""

    previous: ModelVersion | None = Field(
        None, description="what answered before: what a new replica serves if it refuses this one, and a rollback"
    )

    @field_validator("previous", mode="before")
    @classmethod
    def _uri_of_a_model(cls, value: Any) -> Any:
        """Accept the URI of a model in place of a table."""
        return {"model": value} if isinstance(value, str) else value

    @property
    def version(self) -> ModelVersion:
        """What answers."""
        return ModelVersion(model=self.model, semantic_ids=self.semantic_ids)


class PrometheusMetrics:
    """Ray metrics of a replica, which every node exports to Prometheus with the prefix `ray_`."""

    def __init__(self) -> None:
        seconds = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
        sizes = [1, 2, 4, 8, 16, 32, 64]
        of_model = ("model",)
        self.model, self._answers = "", dict[str, str]()
        self._seconds = metrics.Histogram(
            "tiger_serve_request_seconds", "time from a request to its response", seconds, ("path", "status", "model")
        )
        self._batch = metrics.Histogram("tiger_serve_batch_size", "histories decoded at once", sizes, of_model)
        self._decode = metrics.Histogram("tiger_serve_decode_seconds", "time to decode a batch", seconds, of_model)
        self._lists = metrics.Counter("tiger_serve_lists", "lists of recommendations", of_model)
        self._empty = metrics.Counter("tiger_serve_empty_lists", "lists without an item", of_model)
        self._popular = metrics.Counter("tiger_serve_popular_lists", "lists of the most popular items", of_model)
        self._unknown = metrics.Counter("tiger_serve_unknown_items", "unknown ids in histories", of_model)
        self._swaps = metrics.Counter("tiger_serve_swaps", "changes of the model", ("result",))
        self._current = metrics.Gauge("tiger_serve_model", "1 for the model that answers", ("model", "semantic_ids"))

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a response."""
        self._seconds.observe(seconds, {"path": path, "status": str(status), "model": self.model})

    def lists(self, model: str, *, unknown_items: int, empty: int, by_popularity: int, count: int) -> None:
        """Count the lists of one request."""
        counters = (self._lists, count), (self._empty, empty), (self._popular, by_popularity)
        for counter, number in (*counters, (self._unknown, unknown_items)):
            if number:
                counter.inc(number, {"model": model})

    def batch(self, model: str, size: int, seconds: float) -> None:
        """Count a decoded batch."""
        self._batch.observe(size, {"model": model})
        self._decode.observe(seconds, {"model": model})

    def swap(self, result: str) -> None:
        """Count a change of the model: `done` or `refused`."""
        self._swaps.inc(1, {"result": result})

    def current(self, model: str, semantic_ids: str | None) -> None:
        """Set the model that answers, and its semantic IDs."""
        answers = {"model": model, "semantic_ids": semantic_ids or ""}
        if self._answers and self._answers != answers:
            self._current.set(0, self._answers)
        self.model, self._answers = model, answers
        self._current.set(1, answers)


class Replica:
    """The code of the deployment `Server`: a `tiger.serving.app.Service`, decoding in batches."""

    model: ServedModel

    def __init__(self, decoding: dict[str, Any], token_needed: bool, allowed_origins: list[str]) -> None:
        self.token = read_token(os.environ.get(TOKEN_FILE))
        if token_needed and not self.token:
            raise SecurityError(f"the server would accept unauthenticated requests; set {TOKEN_FILE} to a token file")
        self.threads = max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
        torch.set_num_threads(self.threads)
        self.device = str(assigned_device(ray.get_gpu_ids()))
        self.options = build(DecodingConfig, decoding)
        self.allowed_origins = allowed_origins
        self.metrics = PrometheusMetrics()
        self.swap: Swap | None = None
        self._standby: ServedModel | None = None
        self._loading: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application, once per replica; Ray Serve calls this after the constructor."""
        return build_app(self, self.token, self.allowed_origins)

    def check_health(self) -> None:
        """Fail if the deployment was made without a model; Ray Serve calls this at the start and regularly."""
        if not hasattr(self, "model"):
            raise ConfigError("no model to serve: set user_config of the deployment to {model: URI}")
        self.metrics.current(self.model.name, self.model.ids_name)  # one that is set early may not be exported

    # --- models -------------------------------------------------------------------------------------------------

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Take the model of a new configuration; see the module.

        Raises:
            TigerError: the first model of a replica cannot be loaded or is degenerate, and so is the previous one.
        """
        config = build(ModelConfig, dict(user_config), "user_config.")
        if not hasattr(self, "model"):
            self._use(await self._load_first(config))
            return
        if self._loading is not None:
            self._loading.cancel()
            self._loading = None
        if config.version == self.model.version:
            return
        if self._standby is not None and self._standby.version == config.version:
            self._take(self._standby)
        else:
            self._loading = asyncio.get_running_loop().create_task(self._load_and_take(config.version))

    async def prepare(self, model: str, semantic_ids: str | None = None) -> str | None:
        """Load another model next to the one that answers, verify and probe it; return why it is refused, or None."""
        version = ModelVersion(model=model, semantic_ids=semantic_ids)
        try:
            self._standby = await asyncio.to_thread(self._load, version)
        except TigerError as error:
            self._refuse(version, error)
            return str(error)
        return None

    async def discard(self) -> None:
        """Forget a prepared model."""
        self._standby = None

    async def state(self) -> dict[str, Any]:
        """Return the model that answers, and the last change."""
        swap = self.swap and self.swap.model_dump()
        return self.model.version.model_dump() | {"name": self.model.name, "swap": swap}

    async def _load_first(self, config: ModelConfig) -> ServedModel:
        try:
            return await asyncio.to_thread(self._load, config.version)
        except TigerError as error:
            if config.previous is None:
                raise
            self._refuse(config.version, error)
            return await asyncio.to_thread(self._load, config.previous)

    async def _load_and_take(self, version: ModelVersion) -> None:
        self.swap = Swap(**dict(version), state="loading")
        if (await self.prepare(version.model, version.semantic_ids)) is None and self._standby is not None:
            self._take(self._standby)

    def _load(self, version: ModelVersion) -> ServedModel:
        torch.set_num_threads(self.threads)  # of this thread
        begin = time.monotonic()
        model = ServedModel.load(version.model, self.device, version.semantic_ids)
        log.info("%s loaded in %.1f s", version, time.monotonic() - begin)
        return model

    def _refuse(self, version: ModelVersion, error: TigerError) -> None:
        log.error("%s is refused: %s", version, error)
        self.swap = Swap(**dict(version), state="refused", reason=str(error))
        self.metrics.swap("refused")

    def _take(self, model: ServedModel) -> None:
        """Change to another model, and count the change."""
        self._use(model)
        self.swap = Swap(**dict(model.version), state="done")
        self.metrics.swap("done")

    def _use(self, model: ServedModel) -> None:
        """Answer with another model from the next request on; those in progress keep theirs."""
        self.model, self._standby = model, None
        self.metrics.current(model.name, model.ids_name)
        log.info("%s answers now", model.version)

    # --- requests -----------------------------------------------------------------------------------------------

    async def decode(self, query: Query) -> Ranked:
        """Return the list of one query, decoded together with those of the same moment."""
        ranked: Ranked = await self._decode(query)
        return ranked

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=_BATCH_SECONDS)
    async def _decode(self, queries: list[Query]) -> list[Ranked]:
        """Decode a batch, which may belong to two models around a swap.

        It does not run in a separate thread: the search consists of about 1,000 small operations, each of which would
        contend for the GIL with the request thread, which halves the throughput of a replica (LOG.md). Health checks
        are not delayed much: a batch takes at most a second.
        """
        ranked = [Ranked([], False)] * len(queries)
        for model in {id(query.model): query.model for query in queries}.values():
            rows = [row for row, query in enumerate(queries) if query.model is model]
            begin = time.monotonic()
            for row, found in zip(rows, model.decode([queries[row] for row in rows]), strict=True):
                ranked[row] = found
            self.metrics.batch(model.name, len(rows), time.monotonic() - begin)
        return ranked


ENVIRONMENT = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}  # of a replica, for the reason in `_decode`

Server: Any = serve.ingress()(Replica)

deployment: Any = serve.deployment(
    name="Server",
    ray_actor_options={"runtime_env": {"env_vars": ENVIRONMENT}},
    max_ongoing_requests=2 * BATCH,  # the default of 5 would limit batches to 5 requests
    max_queued_requests=8 * BATCH,  # further requests get 429 at once
    backpressure_config={"status_code": 429, "retry_after_s": 1},
    health_check_timeout_s=30,
)(Server)
