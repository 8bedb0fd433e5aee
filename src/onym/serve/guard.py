"""Who may ask, and how much: what every request passes before anything else sees it.

A page of another site can make its reader's browser send requests here, and by rebinding its own name to this machine's
address even read the answers. So a request is refused whose ``Host`` is a name that is not ours (an address cannot be rebound),
and one whose ``Origin`` is another site. ``Content-Type`` must be JSON, which a plain form cannot send.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import socket
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onym.serve.errors import ApiError, error_response

MOST_BODY_BYTES = 1 << 20
BODY_SECONDS = 30.0
"""In which a body has to arrive."""
OPEN_PATHS = ("/", "/runs", "/health", "/ready")
"""What needs no key: the pages, which hold nothing, and whether the server lives."""

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""Of every answer."""


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    key: str | None = None
    """Which every request has to bring, as ``Authorization: Bearer KEY``."""
    hosts: Collection[str] = ()
    """Further names that this server is reached by; ``*`` for any."""
    origins: Collection[str] = ()
    """Sites whose pages may read the answers (CORS), as ``https://example.org``; ``*`` for any."""


class Guard:
    """ASGI middleware. (Starlette's ``BaseHTTPMiddleware`` would hide from the app that a client has left.)"""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access
        self._names = {"localhost", socket.gethostname().lower(), *(host.lower() for host in access.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        shared = origin is not None and (origin in self.access.origins or "*" in self.access.origins)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    answered.setdefault(name, value)
                if shared and origin is not None:
                    answered["Access-Control-Allow-Origin"] = origin
                    answered["Access-Control-Expose-Headers"] = "Retry-After"
                    answered.add_vary_header("Origin")
                else:
                    answered.setdefault("Cross-Origin-Resource-Policy", "same-origin")
            await send(message)

        try:
            self._require_host(headers.get("host", ""))
            self._require_origin(headers, scope["path"], shared)
            if scope["method"] == "OPTIONS" and shared:
                await _preflight(headers.get("access-control-request-headers", ""), send_guarded)
                return
            self._require_key(headers, scope["path"])
        except ApiError as error:
            await error_response(error)(scope, receive, send_guarded)
            return
        await self.app(scope, receive, send_guarded)

    def _require_host(self, host: str) -> None:
        name = _without_port(host)
        if "*" in self._names or name in self._names or name.endswith(".localhost") or _is_address(name):
            return
        raise ApiError(
            421,
            f"This server is not known as {name[:100]!r}: reach it by its address, or start it with --allow-host NAME.",
            code="wrong_host",
        )

    def _require_origin(self, headers: Headers, path: str, shared: bool) -> None:
        origin = headers.get("origin")
        same = origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower()
        # A picture of another page is a GET without an Origin, and could have models opened; a link to a page may be followed.
        cross_site = not _is_open(path) and headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
        if shared or (same and not cross_site):
            return
        raise ApiError(
            403,
            "A page of another site may not ask this server. If yours should, start it with --allow-origin SITE.",
            code="wrong_origin",
        )

    def _require_key(self, headers: Headers, path: str) -> None:
        if self.access.key is None or _is_open(path):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.access.key.encode()):
            raise ApiError(
                401,
                "The API key is missing or wrong: send it as Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


async def read_json(request: Request) -> dict[str, Any]:
    """The object in a request's body.

    Raises:
        ApiError: it is no JSON object, too large, or does not arrive.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "The body must be JSON: send Content-Type: application/json.")
    too_large = ApiError(413, f"The body is larger than {MOST_BODY_BYTES >> 20} MiB: send less at once.")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and (len(length) > 12 or int(length) > MOST_BODY_BYTES):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > MOST_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {BODY_SECONDS:.0f} seconds.") from None
    except ClientDisconnect:  # nobody reads this
        raise ApiError(400, "The client left before its body had arrived.") from None
    try:
        values = json.loads(body, parse_constant=_refuse)
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply to be read.") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ApiError(400, f"The body is no JSON ({str(error)[:100]}).") from None
    if not isinstance(values, dict):
        raise ApiError(400, "The body must be a JSON object.")
    return values


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith("/page/")


async def _preflight(asked: str, send: Send) -> None:
    headers = [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", asked.encode("latin-1")),  # OpenAI's client sends some of its own
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _without_port(host: str) -> str:
    """
    >>> _without_port("LocalHost:8000"), _without_port("[::1]:8000"), _without_port("::1")
    ('localhost', '::1', '::1')
    """
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host if host.count(":") > 1 else host.partition(":")[0]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
