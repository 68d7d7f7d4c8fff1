"""uvicorn's HTTP/1.1 connection with what it lacks: deadlines for headers and for taking the answer, a bound
on the number of connections, JSON for requests that are no HTTP, and an unhurried end.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from serve.http import logs
from serve.http.faults import Refused, busy
from serve.http.guard import Guard

LINGER_SECONDS = 1.0
IDLE_AT_STOP_SECONDS = 1.0  # a request may have been sent before the signal came
MAX_HEADER_BYTES = 16 << 10


class Connection(H11Protocol):
    """One connection of a client."""

    def __init__(self, config: Any, *args: Any, **keywords: Any) -> None:
        super().__init__(config, *args, **keywords)
        assert isinstance(config.app, Guard)
        self._guard = config.app
        self._settings = config.app.settings
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Answers are small: a client that takes none of one is noticed by the first bytes that stay.
        transport.set_write_buffer_limits(high=64 << 10)
        if len(self.connections) > 2 * self._settings.max_connections:
            transport.abort()  # not even an answer each
        elif len(self.connections) > self._settings.max_connections:
            self._refuse(busy(f"{self._settings.max_connections} connections are open"), "too_many")
        else:
            self._header_timer = self.loop.call_later(self._settings.header_seconds, self._headers_are_late)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._header_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return  # read and forgotten, until the connection ends
        super().data_received(data)
        if self._is_refused or self.transport.is_closing():
            return
        if self.conn.their_state is not h11.IDLE:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None
        elif self._header_timer is None and self.conn.trailing_data[0]:
            # The beginning of another request on this connection.
            self._header_timer = self.loop.call_later(self._settings.header_seconds, self._headers_are_late)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._write_timer is None and self.transport.get_write_buffer_size():
            self._write_timer = self.loop.call_later(self._settings.write_seconds, self._answer_is_stuck)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._settings.write_seconds, self._answer_is_stuck)

    def _answer_is_stuck(self) -> None:
        self._write_timer = None
        if self.transport.get_write_buffer_size():
            self._count("takes_no_answer")
            self.transport.abort()

    def _headers_are_late(self) -> None:
        self._header_timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            seconds = f"{self._settings.header_seconds:g}"
            self._refuse(
                Refused(408, "too_slow", f"The request's headers did not arrive within {seconds} seconds."),
                "slow_headers",
            )

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this, in an `except`, for what is no HTTP."""
        error = sys.exc_info()[1]
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            size = f"{MAX_HEADER_BYTES >> 10} KiB"
            refused = Refused(431, "headers_too_large", f"The headers are larger than {size}.")
        else:
            refused = Refused(400, "bad_http", "This is no valid HTTP request.")
        self._refuse(refused, refused.code)

    def _refuse(self, refused: Refused, reason: str) -> None:
        """Answer without a request, and end the connection when the client has had time to read that."""
        self._is_refused = True
        self._count(reason)
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # amid an answer
            return
        body = refused.body()
        headers = [
            *refused.headers(),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        events = [
            h11.Response(status_code=refused.status, headers=headers, reason=STATUS_PHRASES[refused.status]),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ]
        for event in events:
            self.transport.write(self.conn.send(event))  # type: ignore[arg-type]
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def _count(self, reason: str) -> None:
        self._guard.metrics.refused_connections.add(reason)
        logs.event("connection_refused", client=self.client[0] if self.client else None, reason=reason)

    def shutdown(self) -> None:
        """uvicorn calls this for every connection after the signal."""
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(IDLE_AT_STOP_SECONDS, self._close_if_idle)
        else:
            self.cycle.keep_alive = False

    def _close_if_idle(self) -> None:
        if self.transport.is_closing() or self._is_refused:
            return
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
