"""A web server for the download tests: files with Range and faults, the Hub's and Kaggle's few endpoints."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REVISION = "a" * 40
HUB = "/datasets/ILSVRC/imagenet-1k/resolve"
KAGGLE_CALL = "/v1/competitions.CompetitionApiService/DownloadDataFiles"
SIGNATURE = "signed-by-storage"


@dataclass
class Served:
    content: bytes
    etag: str | None = '"one"'
    ranges: bool = True
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    range: str | None
    authorization: str | None


class DownloadServer:
    """Serves `files`. Each GET of one first takes a fault from `faults`, if there is one:

    "503": that status; "drop:N": the connection ends after N bytes; "flip": one byte is another one.
    """

    def __init__(self) -> None:
        self.files: dict[str, Served] = {}
        self.endpoints: dict[str, Callable[[Asked], tuple[int, dict[str, str], bytes]]] = {}
        self.faults: list[str] = []
        self.bytes_per_second: float | None = None
        self.asked: list[Asked] = []
        self.sent_bytes = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        # Storages are another host than the one that signs their addresses, and must not get its tokens.
        self.storage_url = f"http://localhost:{port}/storage"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def gets(self, path: str) -> list[str | None]:
        """The Range of each GET of a path."""
        return [asked.range for asked in self.asked if asked.method == "GET" and asked.path == path]

    def serve_kaggle(self, content: bytes, token: str, hashes: tuple[str, ...] = ("md5",)) -> None:
        """A competition whose one zip lies in a storage with signed addresses."""
        digests = {"md5": hashlib.md5(content).digest(), "crc32c": _crc32c(content)}
        header = ",".join(f"{name}={base64.b64encode(digests[name]).decode()}" for name in hashes)
        self.files["/storage/c.zip"] = Served(content, headers={"x-goog-hash": header} if hashes else {})

        def call(asked: Asked) -> tuple[int, dict[str, str], bytes]:
            if asked.authorization != f"Bearer {token}":
                return 401, {"Content-Type": "application/json"}, b'{"code": 401, "message": "who?"}'
            return 302, {"Location": f"{self.storage_url}/c.zip?X-Signature={SIGNATURE}"}, b""

        self.endpoints[KAGGLE_CALL] = call

    def refuse_kaggle(self, status: int) -> None:
        body = json.dumps({"code": status, "message": "You must accept this competition's rules"}).encode()
        self.endpoints[KAGGLE_CALL] = lambda asked: (status, {"Content-Type": "application/json"}, body)

    def serve_hub(self, files: dict[str, bytes], token: str) -> None:
        """The gated dataset: its description, its file tree, and files that lie in a storage of their own."""
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        tree = [
            {
                "type": "file",
                "path": name,
                "size": len(content),
                "oid": "0" * 40,
                "lfs": {"oid": digests[name], "size": len(content), "pointerSize": 134},
            }
            for name, content in files.items()
        ]
        api = "/api/datasets/ILSVRC/imagenet-1k"
        self.endpoints[api] = lambda asked: _json({"id": "ILSVRC/imagenet-1k", "sha": REVISION})
        self.endpoints[f"{api}/tree/{REVISION}/data"] = lambda asked: _json(tree)
        for name, content in files.items():
            self.files[f"/storage/{name}"] = Served(content, etag=f'"{digests[name]}"')

            def resolve(asked: Asked, name: str = name) -> tuple[int, dict[str, str], bytes]:
                if asked.authorization != f"Bearer {token}":
                    return (403 if asked.authorization else 401), {"X-Error-Code": "GatedRepo"}, b""
                return (
                    302,
                    {
                        "Location": f"{self.storage_url}/{name}",
                        "X-Repo-Commit": REVISION,
                        "X-Linked-Etag": f'"{digests[name]}"',
                        "X-Linked-Size": str(len(files[name])),
                    },
                    b"",
                )

            self.endpoints[f"{HUB}/{REVISION}/{name}"] = resolve

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                self._answer()

            def do_HEAD(self) -> None:
                self._answer()

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._answer()

            def _answer(self) -> None:
                path = unquote(urlsplit(self.path).path)
                asked = Asked(
                    self.command, path, self.headers.get("Range"), self.headers.get("Authorization")
                )
                server.asked.append(asked)
                if path in server.endpoints:
                    status, headers, body = server.endpoints[path](asked)
                    self._send(status, headers, body)
                elif path in server.files:
                    self._send_file(server.files[path])
                else:
                    self._send(404, {}, b"")

            def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def _send_file(self, served: Served) -> None:
                fault = server.faults.pop(0) if server.faults and self.command == "GET" else ""
                if fault.isdigit():
                    return self._send(int(fault), {}, b"")
                content, first = served.content, 0
                headers = {**served.headers, **({"ETag": served.etag} if served.etag else {})}
                if served.ranges:
                    headers["Accept-Ranges"] = "bytes"
                    wanted = (self.headers.get("Range") or "").removeprefix("bytes=").rstrip("-")
                    first = int(wanted) if wanted else 0
                if first and first >= len(content):
                    return self._send(416, {**headers, "Content-Range": f"bytes */{len(content)}"}, b"")
                if first:
                    headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
                body = bytearray(content[first:])
                self.send_response(206 if first else 200)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "HEAD":
                    return None
                if fault == "flip":
                    body[len(body) // 2] ^= 1
                if fault.startswith("drop:"):
                    del body[int(fault.removeprefix("drop:")) :]
                    self.close_connection = True
                return self._write(body)

            def _write(self, body: bytearray) -> None:
                step = 16 << 10 if server.bytes_per_second else 1 << 20
                for start in range(0, len(body), step):
                    try:
                        self.wfile.write(body[start : start + step])
                    except OSError:
                        self.close_connection = True
                        return  # the client was killed
                    server.sent_bytes += len(body[start : start + step])
                    if server.bytes_per_second:
                        time.sleep(step / server.bytes_per_second)

        return Handler


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _crc32c(content: bytes) -> bytes:
    import google_crc32c

    return int(google_crc32c.value(content)).to_bytes(4, "big")
