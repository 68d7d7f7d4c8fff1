"""EC2's metadata service as far as spot notices go: it insists on tokens, and fails as it is told to."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN_PATH = "/latest/api/token"
INTERRUPTION_PATH = "/latest/meta-data/spot/instance-action"
REBALANCE_PATH = "/latest/meta-data/events/recommendations/rebalance"


class FakeMetadata:
    """Context manager; what it says may be changed at any time.

    Attributes:
        notices: path → JSON object; what is not there is answered with 404.
        fault: None, or what is done instead of answering: a status, `hang`, `garbage`, `huge` or `drop`.
        asked: (method, path, status) of all answers so far.
    """

    def __init__(self) -> None:
        self.notices: dict[str, dict[str, Any]] = {}
        self.fault: int | str | None = None
        self.asked: list[tuple[str, str, int]] = []
        self._tokens: set[str] = set()
        self._closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def interrupt(self, action: str = "terminate", time: str = "2030-01-02T03:04:05Z") -> None:
        self.notices[INTERRUPTION_PATH] = {"action": action, "time": time}

    def recommend(self, time: str = "2030-01-02T03:00:00Z") -> None:
        self.notices[REBALANCE_PATH] = {"noticeTime": time}

    def forget_tokens(self) -> None:
        """As after their end: they are refused from now on."""
        self._tokens.clear()

    def __enter__(self) -> FakeMetadata:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def wait_for(self, num_answers: int, path: str = REBALANCE_PATH, seconds: float = 20) -> None:
        """Until it was asked so many more times for a path."""
        until = time.monotonic() + seconds
        wanted = self._count(path) + num_answers
        while self._count(path) < wanted:
            assert time.monotonic() < until, self.asked
            time.sleep(0.01)

    def _count(self, path: str) -> int:
        return sum(asked == path for _, asked, _ in self.asked)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_PUT(self) -> None:
                lifetime = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
                if self.path != TOKEN_PATH or not lifetime.isdigit() or not 1 <= int(lifetime) <= 21600:
                    self._answer(400, b"")
                    return
                token = f"token-{len(fake.asked)}"
                fake._tokens.add(token)
                self._answer(200, token.encode())

            def do_GET(self) -> None:
                if self.headers.get("X-aws-ec2-metadata-token") not in fake._tokens:
                    self._answer(401, b"")
                elif self.path not in fake.notices:
                    self._answer(404, b"<html>404 - Not Found</html>")
                else:
                    self._answer(200, json.dumps(fake.notices[self.path]).encode())

            def _answer(self, status: int, content: bytes) -> None:
                fault = fake.fault
                if fault == "hang":
                    fake._closing.wait(60)
                if isinstance(fault, int):
                    status, content = fault, b""
                elif fault == "garbage":
                    status, content = 200, b'{"action": \xff\xfe'
                elif fault == "huge":
                    status, content = 200, b"[" * (4 << 20)
                fake.asked.append((self.command, self.path, status))
                if fault == "drop":
                    self.close_connection = True
                    return
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:  # whoever asked has left
                    pass

        return Handler
