"""Around all routes: what is refused before they are asked, one log line and the metrics after."""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serve.http import bodies, logs
from serve.http.faults import Refused, shutting_down
from serve.http.keys import ApiKeys
from serve.http.metrics import Metrics
from serve.http.settings import Settings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

LINGER_SECONDS = 2.0  # for a client to read an answer that came before its body's end
LINGER_BYTES = 64 << 20
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
PATHS = ("/predict", "/healthz", "/healthz/live", "/healthz/ready", "/metrics", "/openapi.json", "/docs")
BEHIND_KEY = ("/predict", "/metrics")
SECURITY_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


class Guard:
    """An ASGI application around another one.

    Attributes:
        is_stopping: from the signal on; new requests are refused.
        num_open: requests that are being answered.
    """

    def __init__(self, app: Application, settings: Settings, metrics: Metrics, keys: ApiKeys) -> None:
        self._app, self.settings, self.metrics, self._keys = app, settings, metrics, keys
        self.is_stopping = False
        self.num_open = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self)
        self.num_open += 1
        try:
            await self._answer(exchange)
        finally:
            self.num_open -= 1
            self._record(exchange)

    async def _answer(self, exchange: _Exchange) -> None:
        try:
            self._check(exchange)
            await self._app(exchange.scope, exchange.receive, exchange.send)
        except Refused as refused:
            await exchange.refuse(refused)
        except Exception as error:  # it has been answered with 500
            logs.failure("failure", error, request_id=exchange.request_id, path=exchange.path)
            if not exchange.is_complete:
                raise

    def _check(self, exchange: _Exchange) -> None:
        """What is refused by its headers alone."""
        scope, values = exchange.scope, exchange.values
        if self.is_stopping and not exchange.path.startswith("/healthz"):
            raise shutting_down()
        if scope["http_version"] not in ("1.0", "1.1"):
            raise Refused(505, "bad_http", "This server speaks HTTP/1.1.")
        if b"content-length" in values and b"transfer-encoding" in values:
            # Two lengths: a proxy before this server may believe the other one.
            raise Refused(400, "two_lengths", "Send Content-Length or Transfer-Encoding, not both.")
        if scope["path"] in BEHIND_KEY and not self._keys.allows(scope["headers"]):
            raise Refused(401, "no_key", "Send a valid API key: Authorization: Bearer KEY.")
        length = values.get(b"content-length", b"0")
        if len(length) > 15 or int(length) > self.settings.max_request_bytes:
            raise bodies.too_large(self.settings.max_request_bytes)
        if scope["path"] != "/predict" and exchange.has_body:
            raise Refused(413, "no_body_here", "This path takes no body: POST images to /predict.")

    def _record(self, exchange: _Exchange) -> None:
        status, seconds = exchange.status or 500, exchange.clock.seconds
        path = exchange.path if exchange.path in PATHS else "other"
        self.metrics.requests.add(path, str(status))
        if path == "/predict" and status == 200:
            self.metrics.request_seconds.observe(seconds)
        if path.startswith("/healthz") and status == 200:
            return  # every few seconds, for ever
        client = exchange.scope.get("client")
        logs.event(
            "request",
            request_id=exchange.request_id,
            client=client[0] if client else None,
            method=exchange.scope["method"],
            path=exchange.path[:100],
            status=status,
            seconds=round(seconds, 4),
            bytes_in=exchange.bytes_in,
            **exchange.facts,
        )


class _Exchange:
    """One request and its answer, watched on the way in and out."""

    def __init__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send, guard: Guard) -> None:
        self.scope, self._receive, self._send, self._guard = scope, receive, send, guard
        self.clock = logs.Stopwatch()
        self.path: str = scope["path"]
        self.values: dict[bytes, bytes] = dict(scope["headers"])
        given = self.values.get(b"x-request-id", b"").decode("latin-1")
        self.request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        self.has_body = (
            self.values.get(b"content-length", b"0").strip(b"0") != b"" or b"transfer-encoding" in self.values
        )
        self.body_is_read = not self.has_body
        self.bytes_in = 0
        self.status: int | None = None
        self.is_complete = False
        self._is_odd = False
        # What routes add to the log line: numbers and words of theirs.
        self.facts: dict[str, Any] = {}
        scope["state"] = {**scope.get("state", {}), "facts": self.facts}

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self.bytes_in += len(message.get("body", b""))
            self.body_is_read = self.body_is_read or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", []), (b"x-request-id", self.request_id.encode())]
            headers += SECURITY_HEADERS
            if not self.body_is_read or self._guard.is_stopping or self._is_odd:
                headers.append((b"connection", b"close"))
            await self._send({**message, "headers": headers})
            return
        if message.get("more_body", False) or self.body_is_read:
            await self._send(message)
            self.is_complete = not message.get("more_body", False)
            return
        self.is_complete = True
        # The answer is whole for the client; the connection ends when it has had time to read it.
        await self._send({**message, "more_body": True})
        await bodies.discard(self.receive, LINGER_SECONDS, LINGER_BYTES)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def refuse(self, refused: Refused) -> None:
        body = refused.body()
        headers = [*refused.headers(), (b"content-length", str(len(body)).encode())]
        self.facts["code"] = refused.code
        self._is_odd = refused.status in (400, 505)  # what follows on this connection is none of its requests
        await self.send({"type": "http.response.start", "status": refused.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})
