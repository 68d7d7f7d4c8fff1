"""Reading a request's body: no longer, and no larger, than is allowed; and of all bodies together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

from serve.http.faults import ClientGone, Refused, busy

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class BodyMemory:
    """Bytes of all bodies that are in memory at once, counted as they arrive.

    Announced lengths count for nothing: who announces much and sends slowly would keep out everybody else.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0

    @contextlib.contextmanager
    def account(self) -> Iterator[Callable[[int], None]]:
        """A function to add bytes by; they are given back at the end. It raises `Refused` (503)."""
        own = 0

        def add(num_bytes: int) -> None:
            nonlocal own
            if self.num_bytes + num_bytes > self._max_bytes:
                raise busy("the images that are being sent fill the memory for them")
            own += num_bytes
            self.num_bytes += num_bytes

        try:
            yield add
        finally:
            self.num_bytes -= own


async def read_body(
    receive: Receive, max_bytes: int, seconds: float, account: Callable[[int], None]
) -> bytes:
    """All of a body.

    Raises:
        Refused: it is larger (413), comes more slowly (408), or there is no memory for it (503).
        ClientGone: the client left before its end.
    """
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                chunk = message.get("body", b"")
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise too_large(max_bytes)
                account(len(chunk))
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
    except TimeoutError:
        raise Refused(
            408, "too_slow", f"The body did not arrive within {seconds:g} seconds: send it faster."
        ) from None


def too_large(max_bytes: int) -> Refused:
    size = f"{max_bytes >> 20} MiB" if max_bytes >= 1 << 20 else f"{max_bytes:,} bytes"
    return Refused(413, "too_large", f"The request is larger than {size}: send a smaller image, or fewer.")


async def discard(receive: Receive, seconds: float, max_bytes: int) -> None:
    """Read what a client still sends after its answer, so that it reads the answer and not a reset."""
    num_bytes = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while num_bytes <= max_bytes:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
