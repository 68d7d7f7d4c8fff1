"""Hostile and clumsy clients: polite refusals, bounded memory, and everybody else is served meanwhile."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.integration.serve.http_server import (
    ServerProcess,
    encoded,
    picture,
    post,
    read_all,
    server,
    status_of,
    write_model,
)

GOOD = picture(230, 20, 30)
MAX_GROWTH_BYTES = 300 << 20  # a 4-megapixel image takes some 50 MB while it is decoded
FORM = "Content-Type: multipart/form-data; boundary=xx"
OPTIONS = [
    *("--max-pixels", "4000000", "--max-bytes", "2000000", "--max-request-bytes", "6000000"),
    *("--max-buffered-bytes", "12000000", "--max-connections", "40", "--max-queue", "40"),
    *("--header-seconds", "2", "--body-seconds", "3", "--write-seconds", "3", "--max-files", "4"),
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = write_model(tmp_path_factory.mktemp("exported") / "colours")
    with server(folder, *OPTIONS) as process:
        for _ in range(3):
            assert process.predict(GOOD).status_code == 200
        before = process.resident_bytes()
        yield process
        # After all of them: alive, well, not grown, and without a single failure of its own.
        assert process.predict(GOOD).status_code == 200
        assert process.resident_bytes() - before < MAX_GROWTH_BYTES
        assert process.metric("serve_body_bytes") == process.metric("serve_queue_images") == 0
        assert process.stop() == 0
        events = {row["event"] for row in process.lines}
        shown = [row for row in process.lines if row["event"] in ("library", "failure")]
        assert events == {"listening", "request", "connection_refused", "stopping", "stopped"}, shown[:3]
        assert not process.other_output


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, data: bytes, *others: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"".join(others) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


@functools.cache
def image_cases() -> dict[str, tuple[bytes, int, str]]:
    zeros = bytes(30_000_000)
    return {
        "100 megapixels": (encoded(Image.new("L", (10000, 10000)), "PNG"), 413, "too_many_pixels"),
        "100 megapixels, JPEG": (encoded(Image.new("L", (10000, 10000)), "JPEG"), 413, "too_many_pixels"),
        "a header of 4 gigapixels": (png(65535, 65535, b"\0"), 413, "too_many_pixels"),
        "more data than pixels": (png(8, 8, zeros), 200, ""),
        "a text chunk that grows": (
            png(8, 8, bytes(200), chunk(b"zTXt", b"k\0\0" + zlib.compress(zeros, 9))),
            422,
            "broken",
        ),
        "no image": (b"GET me if you can" * 100, 415, "not_an_image"),
        "HTML": (b"<html><script>alert(1)</script></html>", 415, "not_an_image"),
        "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 415, "not_an_image"),
        "ELF": (b"\x7fELF" + bytes(1000), 415, "not_an_image"),
        "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "not_an_image"),
        "TIFF": (encoded(Image.new("RGB", (9, 9)), "TIFF"), 415, "unsupported"),
        "cut": (GOOD[:300], 422, "broken"),
        "only magic": (b"\xff\xd8\xff", 422, "broken"),
        "nothing": (b"", 400, "empty"),
        "2 MB too many": (bytes(4_000_000), 413, "too_large"),
    }


@pytest.mark.parametrize("case", image_cases())
def test_images(running: ServerProcess, case: str) -> None:
    content, status, code = image_cases()[case]
    response = running.predict(content, headers={"Content-Type": "image/png"})
    assert response.status_code == status, response.text
    if status != 200:
        error = response.json()["error"]
        assert error["code"] == code
        assert error["message"].count(".") >= 1 and "Traceback" not in response.text and "0x" not in error


def part(name: str, content: bytes, extra: str = "") -> bytes:
    return (
        f'--xx\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + content + b"\r\n"
    )


@functools.cache
def form_cases() -> dict[str, tuple[str, bytes, int]]:
    file, end = part("file", GOOD, '; filename="a.jpg"'), b"--xx--\r\n"
    many_headers = b"--xx\r\n" + b"A: b\r\n" * 5000 + b"\r\nx\r\n"
    return {
        "paths as names": (FORM, part("file", GOOD, '; filename="../../../etc/passwd"') + end, 200),
        "NUL in a name": (FORM, part("file", GOOD, '; filename="a\0b.jpg"') + end, 200),
        "a name of 6 KB": (FORM, part("file", GOOD, f'; filename="{"n" * 6000}"') + end, 200),
        "a preamble": (FORM, b"hello\r\n" + file + end, 200),
        "no boundary": ("Content-Type: multipart/form-data", file + end, 400),
        "a boundary of 100": (f"Content-Type: multipart/form-data; boundary={'x' * 100}", file + end, 400),
        "another boundary": ("Content-Type: multipart/form-data; boundary=yy", file + end, 400),
        "no end": (FORM, file, 400),
        "cut": (FORM, file[:200], 400),
        "no file": (FORM, part("top", b"2") + end, 400),
        "no parts": (FORM, end, 400),
        "no name": (FORM, b"--xx\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + end, 400),
        "headers without end": (FORM, b"--xx\r\n" + b"A" * 100_000, 400),
        "5,000 headers": (FORM, many_headers + end, 400),
        "base64": (FORM, b"--xx\r\nContent-Disposition: form-data; name=file\r\n"
                   b"Content-Transfer-Encoding: base64\r\n\r\nAAAA\r\n" + end, 400),
        "5 files": (FORM, file * 5 + end, 413),
        "200,000 parts": (FORM, part("a", b"") * 90_000 + end, 400),
        "JSON": ("Content-Type: application/json", b'{"image": "' + b"[" * 100_000, 415),
        "gzip": ("Content-Type: image/jpeg\r\nContent-Encoding: gzip", GOOD, 415),
        "a broken Content-Type": ("Content-Type: a/b;;;=\xff", GOOD, 415),
    }  # fmt: skip


@pytest.mark.parametrize("case", form_cases())
def test_forms(running: ServerProcess, case: str) -> None:
    headers, body, status = form_cases()[case]
    answer = running.raw(post(body, headers, "Connection: close"))
    assert status_of(answer) == status, answer
    content = json.loads(answer.split(b"\r\n\r\n", 1)[1])
    if status == 200:
        name = content["predictions"][0]["name"]
        assert name in ("passwd", "a?b.jpg", "n" * 100, "a.jpg")
        assert content["predictions"][0]["top"][0]["name"] == "red"
    else:
        assert content["error"]["message"].endswith(".")


REQUEST = b"POST /predict HTTP/1.1\r\nHost: a\r\n"
BROKEN_HTTP = {
    "two lengths": (REQUEST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
    "a length and chunks": (
        REQUEST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /metrics"
        b" HTTP/1.1\r\n\r\n",
        400,
    ),
    "a negative length": (REQUEST + b"Content-Length: -1\r\n\r\n", 400),
    "a signed length": (REQUEST + b"Content-Length: +3\r\n\r\nabc", 400),
    "a length of hex": (REQUEST + b"Content-Length: 0x3\r\n\r\nabc", 400),
    "a length of 60 digits": (REQUEST + b"Content-Length: " + b"9" * 60 + b"\r\n\r\n", 400),
    "a length of terabytes": (REQUEST + b"Content-Length: 9999999999999\r\n\r\nabc", 413),
    "a bad chunk": (REQUEST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n", 400),
    "an endless chunk header": (REQUEST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1" * 40000, 431),
    "another coding": (REQUEST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
    "a blank before the colon": (REQUEST + b"Content-Length : 3\r\n\r\nabc", 400),
    "a folded header": (REQUEST + b"X: a\r\n\tb\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", 400),
    "a NUL in a header": (REQUEST + b"X: a\0b\r\n\r\n", 400),
    "no Host": (b"POST /predict HTTP/1.1\r\n\r\n", 400),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600) + b"\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "another version": (b"GET /healthz HTTP/9.9\r\nHost: a\r\n\r\n", 505),
    "headers of 1 MB": (REQUEST + b"".join(b"X-%d: %s\r\n" % (n, b"a" * 1000) for n in range(1000)), 431),
    "a target of 1 MB": (b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431),
    "a path of dots": (b"GET /../../../etc/passwd HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 404),
    "an encoded path": (b"GET /%2e%2e/%00/%ff HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 404),
    "a proxy's target": (b"GET http://evil/ HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 404),
    "CONNECT": (b"CONNECT evil:443 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 404),
    "an upgrade": (
        b"GET /predict HTTP/1.1\r\nHost: a\r\nConnection: upgrade, close\r\nUpgrade: websocket\r\n\r\n",
        405,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_HTTP)
def test_broken_http(running: ServerProcess, case: str) -> None:
    content, status = BROKEN_HTTP[case]
    answer = running.raw(content)
    assert status_of(answer) == status, answer[:500]
    assert answer.count(b"HTTP/1.1 ") == 1  # what follows a broken request is no request
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["message"]


def test_slow_headers_and_bodies_are_ended(running: ServerProcess) -> None:
    began = time.monotonic()
    answers: dict[str, bytes] = {}

    def send(name: str, *pieces: bytes) -> None:
        answers[name] = running.raw(*pieces, pause=0.2)

    cases = {
        "silent": (b"",),
        "headers": (b"POST /predict HTTP/1.1\r\n", *[b"X: y\r\n"] * 300),
        "body": (post(b"", length="5000"), *[b"a"] * 300),
        "chunks": (REQUEST + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\na\r\n"] * 300),
        "second": (b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", *[b"G"] * 300),
    }
    threads = [threading.Thread(target=send, args=(name, *pieces)) for name, pieces in cases.items()]
    for thread in threads:
        thread.start()
    # Others are served all the while.
    while any(thread.is_alive() for thread in threads):
        assert running.predict(GOOD).status_code == 200
    assert {name: status_of(answer) for name, answer in answers.items()} == dict.fromkeys(cases, 408)
    # 300 pieces at 0.2 s would take a minute.
    assert time.monotonic() - began < 50


def test_clients_that_leave_or_take_no_answer(running: ServerProcess) -> None:
    for cut in (10, 60, 200, len(GOOD) // 2):
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            connection.sendall(post(GOOD)[:cut])
            # A reset, not an orderly end.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    lazy = []
    for _ in range(4):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(5)
        connection.connect(("127.0.0.1", running.port))
        with contextlib.suppress(OSError):  # many requests, and no answer of them is taken
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n" * 3000)
        lazy.append(connection)
    deadline = time.monotonic() + 60
    while running.metric("serve_open_requests") > 1:  # that of the metrics themselves
        assert time.monotonic() < deadline
        time.sleep(0.5)
    for connection in lazy:
        connection.close()
    assert running.predict(GOOD).status_code == 200


def test_too_many_connections_are_told(running: ServerProcess) -> None:
    idle = [socket.create_connection(("127.0.0.1", running.port), timeout=30) for _ in range(70)]
    refused = [status_of(read_all(connection)) for connection in idle[45:]]
    assert refused.count(503) >= 20
    for connection in idle:
        connection.close()
    deadline = time.monotonic() + 60
    while running.raw(b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")[9:12] != b"200":
        assert time.monotonic() < deadline


def test_many_large_bodies_at_once_stay_within_memory(running: ServerProcess) -> None:
    before = running.resident_bytes()
    head = post(b"", length="1900000")
    connections = []
    for _ in range(20):  # 38 MB are announced and sent, 12 MB allowed
        connection = socket.create_connection(("127.0.0.1", running.port), timeout=30)
        connection.sendall(head + bytes(1_800_000))
        connections.append(connection)
    growth = running.resident_bytes() - before
    statuses = [status_of(read_all(connection)) for connection in connections]
    for connection in connections:
        connection.close()
    assert statuses.count(503) >= 10 and set(statuses) == {503, 408}
    assert growth < 60 << 20


def test_noise_finds_no_crash(running: ServerProcess) -> None:
    """Requests with bytes changed, cut and doubled; whatever the answer, it is no 5xx of a failure."""
    generator = random.Random(0)
    body = (
        part("file", picture(9, 9, 9, kind="PNG"), '; filename="a.png"') + part("top", b"2") + b"--xx--\r\n"
    )
    whole = post(body, FORM, "Connection: close")
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(generator.choice([1, 1, 3, 20])):
            place = generator.randrange(len(content))
            content[place : place + generator.choice([0, 1, 1, 50])] = generator.randbytes(
                generator.choice([0, 1, 1, 9])
            )
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            assert status_of(read_all(connection)) not in (500, 502)


def test_wrong_types_and_paths_do_no_harm_to_others(running: ServerProcess, tmp_path: Path) -> None:
    """Usual requests keep being right while others send rubbish."""
    stop = threading.Event()

    def rubbish() -> None:
        cases = [content for content, _, _ in list(image_cases().values())[2:]]
        while not stop.is_set():
            for content in cases:
                running.raw(post(content, "Connection: close"))

    threads = [threading.Thread(target=rubbish) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        with running.client() as client:
            for number in range(25):
                colour = [(230, 9, 9), (9, 230, 9), (9, 9, 230)][number % 3]
                response = client.post("/predict", content=picture(*colour))
                assert response.json()["predictions"][0]["top"][0]["label"] == number % 3
    finally:
        stop.set()
        for thread in threads:
            thread.join()
