"""Who may ask the service: a bearer token, kept in a file; and how much of a request is read."""

from __future__ import annotations

import hmac
import ipaddress
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from tiger.core.errors import SecurityError
from tiger.serving.body_limit import BODY_SECONDS, MAX_BODY, limit_body, refuse

PUBLIC_PATHS = ("/", "/healthz", "/readyz", "/page/app.js", "/page/style.css")
"""Answered without a token: the page, which asks for it, and what a load balancer asks."""


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


def is_loopback(host: str) -> bool:
    """Return whether an address to listen on can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class RequestGuard:
    """ASGI middleware: rejects requests without a token (401), and bodies that are too large or too slow (413, 408)."""

    def __init__(self, app: ASGIApp, token: str | None, body_seconds: float = BODY_SECONDS) -> None:
        self.app, self.token, self.body_seconds = app, token, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application, or reject it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif scope["path"] in PUBLIC_PATHS or self._knows(dict(scope["headers"]).get(b"authorization", b"")):
            await limit_body(self.app, scope, receive, send, MAX_BODY, self.body_seconds)
        else:
            await refuse(send, 401, b"bearer token required", (b"www-authenticate", b"Bearer"))

    def _knows(self, authorization: bytes) -> bool:
        return self.token is None or hmac.compare_digest(authorization, f"Bearer {self.token}".encode())
