"""HTTP serving of a trained model: a Ray Serve deployment around `Recommender` with dynamic batching.

Ray's token does not protect Serve's port, and Serve accepts requests of any size. So a bearer token is required unless
the port is bound to loopback, the size of request bodies and the time to read them are limited, and so is `k`. Bodies
are limited in the replicas and, if this process starts Ray, in Serve's proxy in front of them, which buffers bodies
while all replicas are busy; for other clusters see `tiger.on_ray.body_limit`.
"""

# `serve.ingress` pickles the class when it is decorated: everything its methods use must be defined above it, and its
# annotations must not be strings, which rules out `from __future__ import annotations`.

import hmac
import ipaddress
import logging
import os
import signal
import time
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
import ray
import torch
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from ray import serve
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tiger.core.artifacts import Artifact, open_artifact
from tiger.core.config import MAX_LISTED, build
from tiger.core.device import assigned_device
from tiger.core.errors import ConfigError, ResourceError, SecurityError, last_line
from tiger.core.storage import Folder
from tiger.models.decoding import DecodingConfig
from tiger.models.recommender import Recommender
from tiger.on_ray import cluster, placement
from tiger.on_ray.body_limit import BODY_SECONDS, MAX_BODY, PROXY_CALLBACK, PROXY_MIDDLEWARES, limit_body, refuse
from tiger.run import ResourcesConfig, ServeConfig

log = logging.getLogger(__name__)

os.environ.setdefault(PROXY_CALLBACK, PROXY_MIDDLEWARES)  # for the proxy of a Ray that this process starts later

TOKEN_FILE = "TIGER_SERVE_TOKEN_FILE"
"""Environment variable of the replicas: a file with the bearer token."""

REQUEST_SECONDS = 30.0  # from the proxy's first byte to the response, including the wait for a replica
_MAX_HISTORY, _MAX_NAME = 200, 256
_BATCH, _BATCH_SECONDS = 64, 0.005

Name = Annotated[str, StringConstraints(max_length=_MAX_NAME)]


class Request(BaseModel):
    """A user's history, as the catalog's original item ids in time order."""

    model_config = ConfigDict(extra="forbid", strict=True)

    history: list[Name] = Field(
        max_length=_MAX_HISTORY,
        description="catalog item ids, oldest first; without a known one: the most popular items",
    )
    k: int = Field(10, ge=1, le=2**31 - 1, description="number of items to return, at most the server's beam")
    exclude_seen: bool | None = Field(
        None, description="exclude the items of the history; none: as the server is configured"
    )
    user: Name | None = Field(None, description="user id, for a model with user tokens")


class Recommendation(BaseModel):
    """One item with its score of the beam search."""

    item: str
    title: str
    score: float


class Answer(BaseModel):
    """The top items, best first; unknown ids in the history (`ignored`); the model artifact.

    `by_popularity` marks the most popular items, with the logarithms of their frequencies as scores: what a history
    without a known item gets.
    """

    items: list[Recommendation]
    by_popularity: bool
    ignored: list[str]
    model: str


def read_token(file: str | None) -> str | None:
    """Read the token in a file; None without a file.

    Raises:
        SecurityError: the file cannot be read, can be read by others, or is empty.
    """
    if file is None:
        return None
    try:
        if Path(file).stat().st_mode & 0o007:
            raise SecurityError(f"{file} contains a token that every user of the machine can read: chmod 600 it")
        token = Path(file).read_text("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SecurityError(f"the token file {file} cannot be read ({error})") from None
    if not token:
        raise SecurityError(f"the token file {file} is empty; create a token with openssl rand -hex 32")
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class RequestGuard:
    """ASGI middleware: rejects requests without a token (401), and bodies that are too large or too slow (413, 408)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.token = app, read_token(os.environ.get(TOKEN_FILE))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application, or reject it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["path"] == "/healthz" or self._knows(dict(scope["headers"]).get(b"authorization", b"")):
            await limit_body(self.app, scope, receive, send, MAX_BODY, BODY_SECONDS)
        else:
            await refuse(send, 401, b"bearer token required", (b"www-authenticate", b"Bearer"))

    def _knows(self, authorization: bytes) -> bool:
        return self.token is None or hmac.compare_digest(authorization, f"Bearer {self.token}".encode())


api = FastAPI(title="TIGER on Ray", description="The next items after a history.", docs_url=None, redoc_url=None)
api.add_middleware(RequestGuard)


@api.exception_handler(RequestValidationError)
async def _invalid(request: HTTPRequest, error: RequestValidationError) -> JSONResponse:
    """Respond with location and reason, but not the input: NaN, infinity and lone surrogates cannot be encoded."""
    detail = [
        {"type": found["type"], "loc": [_printable(part) for part in found["loc"]], "msg": _printable(found["msg"])}
        for found in error.errors()[:MAX_LISTED]
    ]
    return JSONResponse({"detail": detail}, 422)


@api.exception_handler(StarletteHTTPException)
async def _refused(request: HTTPRequest, error: StarletteHTTPException) -> JSONResponse:
    """Respond with the reason; 422 if a body cannot be parsed, such as integers of thousands of digits."""
    if error.status_code == 400:
        return JSONResponse({"detail": "the request body is not valid JSON"}, 422)
    return JSONResponse({"detail": error.detail}, error.status_code, headers=error.headers)


def _printable(part: Any) -> Any:
    return part if isinstance(part, int) else str(part)[:_MAX_NAME].encode("utf-8", "backslashreplace").decode("utf-8")


def _names_and_titles(folder: Folder) -> tuple[list[str], list[str]]:
    """Return the source id and the display title of every item, streaming the texts to save memory."""
    names: list[str] = []
    titles: list[str] = []
    with folder.open_input("items.parquet") as source:
        file = pq.ParquetFile(source)
        wanted = [name for name in ("source_id", "title", "text") if name in file.schema_arrow.names]
        for batch in file.iter_batches(columns=wanted):
            columns = batch.to_pydict()
            names += columns["source_id"]
            shown = columns.get("title", [None] * len(batch))
            texts = columns["text"]
            titles += [
                str(title or text[:80] or name)
                for name, title, text in zip(columns["source_id"], shown, texts, strict=True)
            ]
    return names, titles


@serve.ingress(api)
class Server:
    """Serve deployment class: the model, its trie, and the ids and titles of its items."""

    def __init__(self, model: str, decoding: dict[str, Any], token_needed: bool) -> None:
        if token_needed and not read_token(os.environ.get(TOKEN_FILE)):
            raise SecurityError(f"the server would accept unauthenticated requests; set {TOKEN_FILE} to a token file")
        torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
        artifact = open_artifact(model, expected_kind="model")
        self.recommender = Recommender.load(artifact, device=str(assigned_device(ray.get_gpu_ids())))
        self.options = build(DecodingConfig, decoding)
        self.names, self.titles = _names_and_titles(artifact.inputs["catalog"].folder)
        self.item_of = {name: item for item, name in enumerate(self.names)}
        self.model = f"{artifact.kind}-{artifact.fingerprint}"

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """Respond once the model is loaded."""
        return {"status": "ok", "model": self.model}

    @api.post("/recommend")
    async def recommend(self, request: Request) -> Answer:
        """Recommend the next items after a history."""
        if request.k > self.options.beam:
            raise HTTPException(422, f"k: must be at most {self.options.beam}, the beam of this server")
        if self.recommender.needs_users and request.user is None:
            raise HTTPException(422, "user: required, because this model has user tokens")
        history = [self.item_of[name] for name in request.history if name in self.item_of]
        best, by_popularity = await self._decode((request, history))
        items = [Recommendation(item=self.names[item], title=self.titles[item], score=score) for item, score in best]
        ignored = [name for name in request.history if name not in self.item_of]
        return Answer(items=items, by_popularity=by_popularity, ignored=ignored, model=self.model)

    @serve.batch(max_batch_size=_BATCH, batch_wait_timeout_s=_BATCH_SECONDS)
    async def _decode(self, asked: list[tuple[Request, list[int]]]) -> list[tuple[list[tuple[int, float]], bool]]:
        """Return the top items with their scores, and whether they are the most popular ones, for every request.

        The histories are item ids.

        It does not run in a separate thread: the search consists of about 1,000 small operations, each of which would
        contend for the GIL with the request thread, which halves the throughput of a replica (LOG.md). Health checks
        are not delayed much: a batch takes at most a second.
        """
        best: list[tuple[list[tuple[int, float]], bool]] = [([], False)] * len(asked)
        for exclude in (False, True):
            rows = [row for row, (request, _) in enumerate(asked) if self._excludes(request) == exclude]
            if not rows:
                continue
            found = self.recommender.recommend(
                [asked[row][1] for row in rows],
                self.options.model_copy(
                    update={"k": max(asked[row][0].k for row in rows), "exclude_seen": exclude, "batch_size": _BATCH}
                ),
                users=[asked[row][0].user or "" for row in rows],
            )
            columns = (found.items.tolist(), found.scores.tolist(), found.by_popularity.tolist())
            for row, items, scores, by_popularity in zip(rows, *columns, strict=True):
                real = [(item, score) for item, score in zip(items, scores, strict=True) if item >= 0]
                best[row] = real[: asked[row][0].k], by_popularity
        return best

    def _excludes(self, request: Request) -> bool:
        return self.options.exclude_seen if request.exclude_seen is None else request.exclude_seen


_NAME = "tiger"  # name of the application
_ENVIRONMENT = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}  # of a replica, for the reason in `_decode`

_deployment: Any = serve.deployment(
    ray_actor_options={"runtime_env": {"env_vars": _ENVIRONMENT}},
    max_ongoing_requests=2 * _BATCH,  # the default of 5 would limit batches to 5 requests
    max_queued_requests=8 * _BATCH,  # further requests get 503 at once
    health_check_timeout_s=30,
)(Server)


def application(arguments: dict[str, Any]) -> serve.Application:
    """Build the application of a RayService's `import_path`; its `args` are `model` (a URI) and options of `decoding`.

    The service's port is open to its network, so replicas require a token.

    Raises:
        ConfigError: an argument is missing, unknown, or out of its range.
    """
    if "model" not in arguments:
        raise ConfigError(f"args of the application: model is missing, found {', '.join(arguments) or 'none'}")
    options = build(DecodingConfig, {key: value for key, value in arguments.items() if key != "model"}, "decoding.")
    return _deployment.bind(arguments["model"], options.model_dump(mode="json"), token_needed=True)


def serve_forever(model: Artifact, config: ServeConfig, decoding: DecodingConfig, scale: ResourcesConfig) -> None:
    """Serve a model artifact on this cluster until interrupted; requests in progress are finished first.

    If Serve runs on this cluster already, at the same address and without applications, it is used and left running.

    Raises:
        SecurityError: the port would be open beyond loopback without a token, the token file can be read by others, or
            Serve runs already at another address or for another application.
        ResourceError: the cluster has too few CPUs or GPUs for the replicas, or the port is in use.
    """
    # The HAProxy of Ray Serve listens on all addresses, regardless of the configured host.
    is_open = not _is_loopback(config.host) or os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
    if is_open and not config.token_file:
        raise SecurityError(
            f"serve.host = {config.host} is open to others: set serve.token_file, or serve on 127.0.0.1"
        )
    read_token(config.token_file)  # fail here and not in replicas, which would be restarted repeatedly
    cluster.connect(model.home.parent)
    cluster.wait_for_gpus(scale.gpus, "serve", scale.wait_minutes)
    resources = config.resources
    plan = placement.plan_replicas(
        cluster.shape(), replicas=resources.num_workers or 1, cpus=resources.cpus or 1.0, gpus=resources.gpus,
        scale_gpus=scale.gpus,
    )  # fmt: skip
    cluster.wait_for(plan.at_once, "serve", scale.wait_minutes)
    environment = {TOKEN_FILE: str(Path(config.token_file).resolve())} if config.token_file else {}
    replica = {
        "num_cpus": plan.bundle.cpus,
        "num_gpus": plan.bundle.gpus,
        "runtime_env": {"env_vars": _ENVIRONMENT | environment},
    }
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how a supervisor interrupts; Ray has set its own before
    was_running = _require_no_other_address(config)
    http = {"host": config.host, "port": config.port, "request_timeout_s": REQUEST_SECONDS}
    try:
        serve.start(http_options=http)
    except (RuntimeError, OSError) as error:
        if not was_running:
            _stop(was_running)
        reason = last_line(error).removeprefix("RuntimeError: ").rstrip(".")
        raise ResourceError(f"{config.host}:{config.port} cannot be served: {reason}; set serve.port") from error
    _require_no_other_address(config)  # if another server has started Serve meanwhile, our options were ignored
    try:
        deployment = _deployment.options(num_replicas=plan.minimum, ray_actor_options=replica)
        options = decoding.model_dump(mode="json")
        token_needed = config.token_file is not None
        serve.run(deployment.bind(model.folder.uri, options, token_needed=token_needed), name=_NAME)
        log.info("serving %s on http://%s:%d/recommend", model.folder.uri, config.host, config.port)
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        log.info("serving: stopped")
    finally:
        _stop(was_running)


def _stop(was_running: bool) -> None:
    """Stop the application; stop Serve as a whole only if it was not running before and has no other application."""
    if was_running or set(serve.status().applications) - {_NAME}:
        serve.delete(_NAME)
    else:
        serve.shutdown()


def _require_no_other_address(config: ServeConfig) -> bool:
    """Return whether Serve runs on this cluster already; its address cannot be changed, and others may depend on it.

    Raises:
        SecurityError: it listens on another address than the one that was checked, or serves an application.
    """
    client = serve.context._get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return False
    options = client.http_config
    if (options.host, options.port) != (config.host, config.port):
        raise SecurityError(
            f"Ray Serve runs on this cluster already, on {options.host}:{options.port}, but serve.host and serve.port "
            f"are {config.host}:{config.port}: set them to that address, with a token if it is open to others, or "
            "stop that Serve (`serve shutdown`)"
        )
    if names := list(serve.status().applications):
        raise SecurityError(
            f"Ray Serve runs {', '.join(names[:MAX_LISTED])} on this cluster already, at the same address; "
            "use another cluster, or stop that application"
        )
    return True
