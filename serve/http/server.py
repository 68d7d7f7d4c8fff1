"""One process: the model loaded and warmed, the port opened, and everything ended in order.

SIGTERM or Ctrl+C: `/healthz` says 503, new requests are refused with `Connection: close`, the port is closed,
what is in flight is finished within `grace_seconds`; exit code 0.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from serve.http import logs
from serve.http.app import build_app
from serve.http.guard import Guard
from serve.http.keys import ApiKeys
from serve.http.protocol import MAX_HEADER_BYTES, Connection
from serve.http.settings import Settings
from serve.portable.limits import Limits
from serve.portable.onnx_classifier import OnnxClassifier

LAME_DUCK_SECONDS = 0.3  # connections that the kernel has accepted already are answered, not reset
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(folder: Path, form: str, host: str, port: int, settings: Settings, keys: ApiKeys) -> int:
    """Answer requests until a signal.

    Raises:
        ValueError: the folder holds no usable model.
        OSError: the address cannot be listened on.
    """
    # A process-wide one, as threads share the filters; the limits here are checked before decoding.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    limits = Limits(settings.max_bytes, settings.max_pixels, settings.formats)
    classifier = OnnxClassifier(folder, form, limits, settings.threads or None)
    side = classifier.info.preprocessing.resolution
    for size in {1, settings.max_batch}:  # onnxruntime takes its memory now, not at the first request
        classifier.logits(np.zeros((size, side, side, 3), np.uint8))
    listener = listen(host, port)
    logs.set_up()
    digest = hashlib.sha256(classifier.path.read_bytes()).hexdigest()
    guard = build_app(classifier, settings, keys, digest)
    config = uvicorn.Config(
        guard,
        loop="asyncio",
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=settings.grace_seconds,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )
    shown = f"[{host}]" if ":" in host else host
    facts = {
        "address": f"http://{shown}:{listener.getsockname()[1]}",
        "model": classifier.info.title,
        "model_sha256": digest,
        "classes": len(classifier.info.class_names),
        "key_wanted": bool(keys),
    }
    Server(config, guard, facts).run(sockets=[listener])
    logs.event("stopped")
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. ValueError, OSError: one sentence."""
    if not 0 <= port <= 65535:
        raise ValueError(f"--port is {port}: it must be from 0 (any free one) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"{host}, port {port}, cannot be listened on ({reason}): take another --port") from None
    listener.setblocking(False)
    return listener


class Server(uvicorn.Server):
    """uvicorn's, with an end in order and exit code 0."""

    def __init__(self, config: uvicorn.Config, guard: Guard, facts: dict[str, Any]) -> None:
        super().__init__(config)
        self._guard, self._facts = guard, facts

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        logs.event("listening", **self._facts)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._guard.is_stopping = True
        logs.event("stopping", open_requests=self._guard.num_open)
        await asyncio.sleep(LAME_DUCK_SECONDS)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True  # Ctrl+C again
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's raises the signal again after its orderly end, which then looks like a death.
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
