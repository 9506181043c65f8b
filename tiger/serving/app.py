"""The HTTP application: routes, errors that say why, CORS, the page. Plain ASGI, around any `Service`.

Text of users and of the catalog is sent as JSON only; the page puts it into text nodes, and its
Content-Security-Policy allows no code but its own file.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, HTTPException, Query
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tiger.core.config import MAX_LISTED
from tiger.core.errors import HealthError
from tiger.models.decoding import DecodingConfig
from tiger.serving import model as served
from tiger.serving.guard import RequestGuard
from tiger.serving.model import Ranked, ServedModel
from tiger.serving.schemas import (
    MAX_NAME,
    Answer,
    Answers,
    Found,
    ItemDetails,
    PrefixDetails,
    RankedList,
    Ready,
    Request,
    Status,
    Swap,
)

_PROBE_SECONDS = 1.0  # a probe's result is reused for this long, so that health checks cost little

_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Metrics(Protocol):
    """Where the application counts; `tiger.on_ray.replica` sends it to Prometheus."""

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a response: the route's path, its status, and the seconds from request to response."""

    def lists(self, model: str, *, unknown_items: int, empty: int, by_popularity: int, count: int) -> None:
        """Count the lists of one request."""


class Service(Protocol):
    """What the application asks: the model of the moment, and lists of recommendations."""

    @property
    def model(self) -> ServedModel:
        """The model that answers."""

    @property
    def options(self) -> DecodingConfig:
        """What a request leaves out."""

    @property
    def swap(self) -> Swap | None:
        """The last change of the model."""

    @property
    def metrics(self) -> Metrics:
        """Where to count."""

    async def decode(self, query: served.Query) -> Ranked:
        """Return the list of one query; queries of the same moment may be decoded in one batch."""


def build_app(service: Service, token: str | None = None, allowed_origins: list[str] | None = None) -> ASGIApp:
    """Return the application.

    Args:
        service: the model and its decoding.
        token: the bearer token of requests; None: none is needed.
        allowed_origins: origins whose pages may ask from a browser (CORS); none by default.
    """
    api = FastAPI(title="TIGER on Ray", description="The next items after a history.", docs_url=None, redoc_url=None)
    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_exception_handler(StarletteHTTPException, _refused)
    _add_page(api)
    _add_health(api, service)
    _add_recommend(api, service)
    _add_catalog(api, service)
    api.add_middleware(RequestGuard, token=token)
    if allowed_origins:  # outside of the guard: browsers ask for permission without a token
        api.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["retry-after"],
        )
    api.add_middleware(_Timed, metrics=service.metrics, paths=[getattr(route, "path", "") for route in api.routes])
    return api


# --- routes -----------------------------------------------------------------------------------------------------


def _add_recommend(api: FastAPI, service: Service) -> None:
    @api.post("/recommend", response_model=Answer | Answers)
    async def recommend(request: Request) -> Response:
        """Recommend the next items after one history, or after the histories of several users."""
        model = service.model
        try:
            queries, ignored = model.queries(request, service.options)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        ranked = await asyncio.gather(*(service.decode(query) for query in queries))
        lists = [
            RankedList(items=model.recommendations(each), by_popularity=each.by_popularity, ignored=unknown)
            for each, unknown in zip(ranked, ignored, strict=True)
        ]
        service.metrics.lists(
            model.name,
            unknown_items=sum(map(len, ignored)),
            empty=sum(not each.items for each in lists),
            by_popularity=sum(each.by_popularity for each in lists),
            count=len(lists),
        )
        common = {"model": model.name, "unknown_in_filters": model.items.unknown(request.filters)}
        if request.histories is not None:
            return _json(Answers(answers=lists, **common))
        beam = model.explain(queries[0], ranked[0]) if request.explain else None
        return _json(Answer(**dict(lists[0]), **common, beam=beam))


def _add_catalog(api: FastAPI, service: Service) -> None:
    @api.get("/items/{item:path}")
    async def item(item: str, neighbors: Annotated[int, Query(ge=0, le=100)] = 10) -> ItemDetails:
        """Return an item of the catalog, with its neighbors in ID space."""
        model = service.model
        index = model.items.index.get(item)
        if index is None:
            raise HTTPException(404, f"{_printable(item)!r} is not an item id of the catalog")
        if model.is_deleted(index):
            raise HTTPException(404, f"{_printable(item)!r} was deleted from the catalog")
        tree, prices = model.tree, model.items.prices
        price = None if prices is None or prices[index] != prices[index] else float(prices[index])
        return ItemDetails(
            item=item,
            title=model.items.titles[index],
            semantic_id=tree.codes(index) if tree else None,
            price=price,
            categories=model.items.categories_of(index),
            seen_in_training=int(model.counts[index]),
            neighbors=tree.neighbors(index, neighbors) if tree and neighbors else [],
            model=model.name,
        )

    @api.get("/search", response_model_exclude_none=True)
    async def search(
        q: Annotated[str, Query(max_length=MAX_NAME)], limit: Annotated[int, Query(ge=1, le=100)] = 10
    ) -> Found:
        """Return items by words of their titles, or by their id."""
        model = service.model
        return Found(items=model.summaries(model.find(q, limit)))

    @api.get("/prefix")
    async def prefix(
        codes: Annotated[str, Query(pattern=r"^(\d{1,5}(,\d{1,5}){0,31})?$")] = "",
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> PrefixDetails:
        """Return what is below a prefix of semantic IDs, such as `3,141`; below the root without one."""
        model = service.model
        if model.tree is None:
            raise HTTPException(404, f"{model.name} has no semantic IDs")
        wanted = tuple(int(code) for code in codes.split(",") if code)
        # In a thread: the words of many prefixes take a moment when they are asked for the first time.
        found = await asyncio.to_thread(model.prefix, wanted, limit)
        if found is None:
            raise HTTPException(404, f"no item has a semantic ID that begins with {list(wanted)}")
        return found


def _add_health(api: FastAPI, service: Service) -> None:
    checked: dict[str, Any] = {"model": None, "at": -_PROBE_SECONDS, "error": None}

    @api.get("/healthz")
    async def healthz() -> Response:
        """Decode a probe: 200 if the model recommends items with finite scores, else 503."""
        model = service.model
        if checked["model"] != model.name or time.monotonic() - checked["at"] > _PROBE_SECONDS:
            checked.update(model=model.name, at=time.monotonic(), error=None)
            try:
                model.probe(probes=1)
            except HealthError as error:
                checked["error"] = str(error)
        if checked["error"]:
            return JSONResponse({"status": "failed", "model": model.name, "detail": checked["error"]}, 503)
        return JSONResponse({"status": "ok", "model": model.name})

    @api.get("/readyz")
    async def readyz() -> Ready:
        """Return the model that answers."""
        return Ready(status="ready", model=service.model.name, semantic_ids=service.model.ids_name)

    @api.get("/status")
    async def status() -> Status:
        """Return what the model can do, and the last change of the model."""
        model = service.model
        return Status(
            model=model.name,
            semantic_ids=model.ids_name,
            num_items=model.num_items,
            beam=service.options.beam,
            has_semantic_ids=model.tree is not None,
            has_prices=model.items.prices is not None,
            has_categories=model.items.categories is not None,
            needs_users=model.recommender.needs_users,
            swap=service.swap,
        )


def _add_page(api: FastAPI) -> None:
    for path, (name, kind) in _PAGE.items():
        api.add_route(path, _static(name, kind), include_in_schema=False)


def _static(name: str, kind: str) -> Callable[[HTTPRequest], Awaitable[Response]]:
    content = (resources.files("tiger.serving") / "page" / name).read_bytes()

    async def endpoint(request: HTTPRequest) -> Response:
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    return endpoint


# --- responses --------------------------------------------------------------------------------------------------


def _json(content: BaseModel) -> Response:
    """Serialize once: FastAPI would validate the model again."""
    return Response(content.model_dump_json(), media_type="application/json")


async def _invalid(request: HTTPRequest, error: Exception) -> JSONResponse:
    """Respond with location and reason, but not the input: NaN, infinity and lone surrogates cannot be encoded."""
    assert isinstance(error, RequestValidationError)
    detail = [
        {"type": found["type"], "loc": [_printable(part) for part in found["loc"]], "msg": _printable(found["msg"])}
        for found in error.errors()[:MAX_LISTED]
    ]
    return JSONResponse({"detail": detail}, 422)


async def _refused(request: HTTPRequest, error: Exception) -> JSONResponse:
    """Respond with the reason; 422 if a body cannot be parsed, such as integers of thousands of digits."""
    assert isinstance(error, StarletteHTTPException)
    if error.status_code == 400:
        return JSONResponse({"detail": "the request body is not valid JSON"}, 422)
    return JSONResponse({"detail": _printable(error.detail)}, error.status_code, headers=error.headers)


def _printable(part: Any) -> Any:
    return part if isinstance(part, int) else str(part)[:MAX_NAME].encode("utf-8", "backslashreplace").decode("utf-8")


class _Timed:
    """ASGI middleware: counts and times responses by route."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: list[str]) -> None:
        self.app, self.metrics = app, metrics
        self.paths = {path for path in paths if "{" not in path}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.monotonic(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            path = scope["path"]
            known = path if path in self.paths else "/items" if path.startswith("/items/") else "other"
            self.metrics.request(known, status, time.monotonic() - begin)
