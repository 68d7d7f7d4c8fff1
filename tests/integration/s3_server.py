"""An S3 for the tests: moto's server in a process of its own, and a proxy before it that makes faults.

`FaultyS3.rule` is asked about every request and may name a fault (see `Rule`). All that passes is written
down in `asked`, so that a test can count what was transferred again.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest

from tests.conftest import ROOT

SECRET = "a-secret-of-the-user"
MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # ends with the tests, however they end
"""


@dataclass
class Asked:
    """A request: `operation` as boto3 names it, `nth` (from 1) of its operation."""

    operation: str
    key: str
    query: dict[str, str]
    nth: int
    range: str = ""
    up: int = 0  # bytes of the request's body
    down: int = 0  # bytes of the answer's body
    status: int = 0
    fault: str = ""


Rule = Callable[[Asked], str | None]
"""Names the fault of a request, or None:

"503 SlowDown" (any status and code): that answer, and S3 never hears of it;
"drop": the connection ends before S3 hears of it; "drop-upload": in the middle of the request's body;
"drop-answer": S3 does it, and the answer is lost; "drop-half": in the middle of the answer's body;
"stall:N": nothing for N seconds, then the connection ends;
"flip-upload", "flip-download": the middle byte is another one;
"kill": the process named by `victim` is killed before S3 hears of it; "kill-after": when S3 has done it.
"""


class FaultyS3:
    """The proxy at `url`; `direct` is moto's own address."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.direct = f"http://127.0.0.1:{port}"
        self.rule: Rule = lambda asked: None
        self.victim: int | None = None
        self.asked: list[Asked] = []
        self._counts: Counter[str] = Counter()
        self._mutex = threading.Lock()
        self._conditions = threading.Lock()  # S3 compares and writes at once, moto one after the other
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def clear(self, rule: Rule = lambda asked: None) -> None:
        """Forget what was asked; follow another rule from here on."""
        with self._mutex:
            self.rule, self.asked = rule, []
            self._counts.clear()

    def all(self, *operations: str) -> list[Asked]:
        return [asked for asked in self.asked if asked.operation in operations]

    def uploaded(self, key_end: str = "") -> int:
        """Bytes of parts and small objects that S3 took."""
        puts = self.all("UploadPart", "PutObject")
        return sum(put.up for put in puts if put.key.endswith(key_end) and put.status == 200)

    def _note(self, asked: Asked) -> str:
        with self._mutex:
            self._counts[asked.operation] += 1
            asked.nth = self._counts[asked.operation]
            self.asked.append(asked)
            asked.fault = self.rule(asked) or ""
            return asked.fault

    def _kill(self) -> None:
        if self.victim is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.victim, signal.SIGKILL)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement
            moto: http.client.HTTPConnection | None = None

            def log_message(self, *arguments: Any) -> None:
                pass

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):  # a client that was killed
                    super().handle()

            def finish(self) -> None:
                if self.moto is not None:
                    self.moto.close()
                with contextlib.suppress(ConnectionError):
                    super().finish()

            def handle_expect_100(self) -> bool:
                return True  # sent below, when the fault is known

            def _pass_on(self) -> None:
                asked = _understood(self.command, self.path, self.headers)
                fault, _, amount = proxy._note(asked).partition(":")
                if fault == "kill":
                    proxy._kill()
                if fault == "stall":
                    time.sleep(float(amount))
                if fault in ("drop", "stall", "kill"):
                    return self._end()
                if self.headers.get("Expect") == "100-continue":
                    self.send_response_only(100)
                    self.end_headers()
                length = int(self.headers.get("Content-Length") or 0)
                body = bytearray(self.rfile.read(length // 2 if fault == "drop-upload" else length))
                asked.up = len(body)
                if fault == "drop-upload":
                    return self._end()
                if fault[:1].isdigit():
                    return self._refuse(asked, *fault.split())
                if fault == "flip-upload":
                    body[len(body) // 2] ^= 1
                status, headers, content = self._ask_moto(bytes(body))
                asked.status, asked.down = status, len(content)
                if fault == "kill-after":
                    proxy._kill()
                if fault in ("drop-answer", "kill-after"):
                    return self._end()
                self._answer(status, headers, content, fault)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

            def _ask_moto(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
                if self.moto is None:
                    self.moto = http.client.HTTPConnection("127.0.0.1", proxy.port)
                headers = {k: v for k, v in self.headers.items() if k not in ("Expect", "Connection")}
                conditional = self.command == "PUT" and bool({"If-Match", "If-None-Match"} & set(headers))
                with proxy._conditions if conditional else contextlib.nullcontext():
                    self.moto.request(self.command, self.path, body, headers)
                    answer = self.moto.getresponse()
                    return answer.status, answer.getheaders(), answer.read()

            def _answer(
                self, status: int, headers: list[tuple[str, str]], content: bytes, fault: str
            ) -> None:
                if fault == "flip-download":
                    middle = len(content) // 2
                    content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
                self.send_response_only(status)
                own = ("content-length", "connection", "transfer-encoding")
                for name, value in headers:
                    if name.lower() not in own or (self.command == "HEAD" and name.lower() == own[0]):
                        self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if fault == "drop-half":
                    self.wfile.write(content[: len(content) // 2])
                    return self._end()
                self.wfile.write(content)

            def _refuse(self, asked: Asked, status: str, code: str = "InternalError") -> None:
                asked.status = int(status)
                xml = f"<Error><Code>{code}</Code><Message>a fault of the test</Message></Error>"
                self._answer(asked.status, [("Content-Type", "application/xml")], xml.encode(), "")

            def _end(self) -> None:
                self.close_connection = True

        return Handler


def _understood(method: str, path: str, headers: Any) -> Asked:
    parts = urlsplit(path)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    _, _, key = unquote(parts.path).lstrip("/").partition("/")
    if not key:
        listing = "ListMultipartUploads" if "uploads" in query else "ListObjectsV2"
        operation = listing if method == "GET" else f"{method} bucket"
    elif "uploadId" in query or "uploads" in query:
        operation = {
            "GET": "ListParts",
            "PUT": "UploadPartCopy" if "x-amz-copy-source" in headers else "UploadPart",
            "POST": "CreateMultipartUpload" if "uploads" in query else "CompleteMultipartUpload",
            "DELETE": "AbortMultipartUpload",
        }[method]
    else:
        names = {"GET": "GetObject", "PUT": "PutObject", "HEAD": "HeadObject", "DELETE": "DeleteObject"}
        operation = names[method]
    return Asked(operation, key, query, nth=0, range=headers.get("Range", ""))


class Bucket:
    """A fresh bucket behind the proxy, looked into without it."""

    def __init__(self, server: FaultyS3, name: str) -> None:
        import boto3
        from botocore.config import Config

        self.server, self.name = server, name
        # Without checksums of its own: whoever reads these objects has only ours.
        config = Config(request_checksum_calculation="when_required", retries={"total_max_attempts": 1})
        self.s3 = boto3.client("s3", endpoint_url=server.direct, config=config)
        self.s3.create_bucket(Bucket=name)

    def at(self, prefix: str) -> str:
        return f"s3://{self.name}/{prefix}"

    def files(self, prefix: str = "") -> dict[str, bytes]:
        """Name below the prefix → content."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
        return {key[len(prefix) :].lstrip("/"): self.get(key) for key in keys}

    def get(self, key: str) -> bytes:
        return bytes(self.s3.get_object(Bucket=self.name, Key=key)["Body"].read())

    def put(self, key: str, content: bytes) -> None:
        self.s3.put_object(Bucket=self.name, Key=key, Body=content)

    def put_folder(self, prefix: str, folder: Path) -> None:
        for path in folder.rglob("*"):
            if path.is_file() and path.name != ".lock":
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def flip(self, key: str, place: int) -> None:
        content = bytearray(self.get(key))
        content[place] ^= 1
        self.put(key, bytes(content))

    def uploads(self) -> list[str]:
        """Keys of the unfinished uploads."""
        answer = self.s3.list_multipart_uploads(Bucket=self.name)
        return [upload["Key"] for upload in answer.get("Uploads", ())]

    def empty(self) -> None:
        for key in self.files():
            self.s3.delete_object(Bucket=self.name, Key=key)
        for upload in self.s3.list_multipart_uploads(Bucket=self.name).get("Uploads", ()):
            self.s3.abort_multipart_upload(Bucket=self.name, Key=upload["Key"], UploadId=upload["UploadId"])


@pytest.fixture(scope="session")
def moto_port() -> Iterator[int]:
    with moto_server() as port:
        yield port


@contextlib.contextmanager
def moto_server(program: str = MOTO) -> Iterator[int]:
    """The port of a moto server in a process of its own; skips where moto is missing."""
    pytest.importorskip("moto.server")
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # a line a request
    )
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.communicate()


@pytest.fixture
def bucket(
    moto_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bucket]:
    """Its `server` has the rule; the environment leads to it, with short waits and nobody's credentials."""
    from data_prep import s3_requests

    server = FaultyS3(moto_port)
    for name in list(os.environ):
        if name.startswith(("AWS_", "S3_")):
            monkeypatch.delenv(name)
    for name, value in {
        "HOME": str(tmp_path_factory.mktemp("home")),
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "dummy",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "S3_MAX_WAIT_SECONDS": "0.05",
        "S3_TIMEOUT_SECONDS": "5",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3_requests, "MAX_WAIT_SECONDS", 0.05)
    s3_requests._client.cache_clear()
    bucket = Bucket(server, f"bucket-{uuid.uuid4().hex}")
    yield bucket
    bucket.empty()
    server.close()
    s3_requests._client.cache_clear()
