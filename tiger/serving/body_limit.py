"""Limits of request bodies, in bytes and seconds, in the replicas of Ray Serve and in its proxy.

Ray Serve 2.60 has no option for the size of a body: while all replicas are busy, its proxy buffers whatever is sent.
But it wraps itself in the ASGI middlewares that a function returns, which is named by an environment variable
(`PROXY_CALLBACK`) of the nodes. A Ray that this process starts has it, see `tiger.on_ray.serve`. A cluster that runs
already must set it to `PROXY_MIDDLEWARES` for its nodes; its proxies must be able to import this module, which imports
neither Ray nor torch.
"""

from __future__ import annotations

import asyncio

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 64 * 1024  # bytes
BODY_SECONDS = 5.0  # to receive a body

PROXY_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Ray's environment variable that names a function without arguments, which returns the proxy's middlewares."""

PROXY_MIDDLEWARES = "tiger.serving.body_limit:proxy_middlewares"


def proxy_middlewares() -> list[Middleware]:
    """Return the middlewares of Ray Serve's proxy."""
    return [Middleware(BodyLimit)]


class BodyLimit:
    """ASGI middleware: rejects bodies that are too large or too slow (413, 408), before they are buffered."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application, or reject it."""
        if scope["type"] == "http":
            await limit_body(self.app, scope, receive, send, MAX_BODY, BODY_SECONDS)
        else:
            await self.app(scope, receive, send)


async def limit_body(
    app: ASGIApp, scope: Scope, receive: Receive, send: Send, max_bytes: int, max_seconds: float
) -> None:
    """Call `app`; respond with 413 or 408, and disconnect, if the body exceeds `max_bytes` or `max_seconds`."""
    read, refused, complete = 0, False, False
    deadline = asyncio.get_running_loop().time() + max_seconds

    async def limited() -> Message:
        nonlocal read, refused, complete
        if refused:
            return {"type": "http.disconnect"}
        if complete:
            return await receive()  # until the client disconnects
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            refused = True
            await refuse(send, 408, b"the request body did not arrive in time", (b"connection", b"close"))
            return {"type": "http.disconnect"}
        read += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if read > max_bytes:
            refused = True
            why = b"request body exceeds %d KiB" % (max_bytes >> 10)
            await refuse(send, 413, why, (b"connection", b"close"))
            return {"type": "http.disconnect"}
        return message

    async def unless_refused(message: Message) -> None:
        if not refused:
            await send(message)

    await app(scope, limited, unless_refused)


async def refuse(send: Send, status: int, why: bytes, header: tuple[bytes, bytes]) -> None:
    """Send a whole response with the reason `why`."""
    headers = [(b"content-type", b"application/json"), header]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b'{"detail": "%s"}' % why})
