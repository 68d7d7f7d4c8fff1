"""The endpoint's parts by themselves: metrics, forms, keys, limits of memory."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from serve.http.batching import PixelBudget, num_pixels
from serve.http.bodies import BodyMemory, read_body
from serve.http.faults import ClientGone, Refused
from serve.http.keys import ApiKeys
from serve.http.metrics import Counter, Histogram, Metrics
from serve.http.multipart import parse, safe_name
from serve.http.settings import Settings

TYPE = "multipart/form-data; boundary=b"


def test_counters_and_histograms_as_prometheus_reads_them() -> None:
    counter = Counter("c_total", "Help.", ("path", "status"))
    counter.add("/a", "200")
    counter.add("/a", "200", amount=2)
    counter.add('q"\\\n', "500")
    assert counter.lines() == [
        'c_total{path="/a",status="200"} 3',
        'c_total{path="q\\"\\\\\\n",status="500"} 1',
    ]
    histogram = Histogram("h", "Help.", (0.1, 1.0, 10.0))
    for value in (0.1, 0.5, 5.0, 50.0):
        histogram.observe(value)
    assert histogram.lines() == [
        'h_bucket{le="0.1"} 1',
        'h_bucket{le="1"} 2',
        'h_bucket{le="10"} 3',
        'h_bucket{le="+Inf"} 4',
        "h_sum 55.6",
        "h_count 4",
    ]
    assert Metrics().text().count("# TYPE") == Metrics().text().count("# HELP") >= 9


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\a b.jpg", "a b.jpg"),
        ("a\0\n\x1b[31m.jpg", "a???[31m.jpg"),
        ("..", None),
        ("/", None),
        ("", None),
        (None, None),
        ("x" * 500, "x" * 100),
    ],
)
def test_names_of_files_are_no_paths(given: str | None, name: str | None) -> None:
    assert safe_name(given) == name


def test_forms_are_taken_apart_byte_for_byte() -> None:
    content = bytes(range(256)) * 3 + b"\r\n--a\r\n--\r\n\r\n"
    body = (
        b"--b\r\nContent-Disposition: form-data; name=\"top\"\r\n\r\n3\r\n"
        b"--b\r\ncontent-disposition: form-data; name=\"x\"; filename*=utf-8''%E2%82%AC.png\r\n"
        b"Content-Type: image/png\r\n\r\n" + content + b"\r\n"
        b"--b\r\nContent-Disposition: form-data; name=file\r\n\r\n\r\n--b--\r\nepilogue"
    )  # fmt: skip
    files, fields = parse(body, TYPE, 2)
    assert fields == {"top": "3"}
    assert [(file.name, file.content) for file in files] == [("€.png", content), (None, b"")]
    with pytest.raises(Refused, match="At most 1 files"):
        parse(body, TYPE, 1)
    many = b"--b\r\nContent-Disposition: form-data; name=a\r\n\r\nx\r\n" * 9 + b"--b--"
    with pytest.raises(Refused, match="too many"):
        parse(many, TYPE, 2)
    # Cut anywhere before its end, it is refused.
    end = body.index(b"--\r\nepilogue")
    for cut in range(end):
        with pytest.raises(Refused) as refused:
            parse(body[:cut], TYPE, 2)
        assert refused.value.status == 400


def test_keys() -> None:
    key = "k" * 16
    keys = ApiKeys([key, "other-key-for-rotation"])
    assert keys.allows([(b"x-api-key", key.encode())])
    assert keys.allows([(b"authorization", b"bearer other-key-for-rotation")])
    for headers in (
        [],
        [(b"x-api-key", b"")],
        [(b"x-api-key", b"k" * 17)],
        [(b"authorization", key.encode())],
    ):
        assert not keys.allows(headers)
    assert ApiKeys([]).allows([]) and not ApiKeys([])
    with pytest.raises(ValueError, match="16 or more"):
        ApiKeys(["short"])


def test_keys_of_files_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    path.write_text("# none\n\n")
    with pytest.raises(ValueError, match="holds no API key"):
        ApiKeys.load(path)
    path.write_bytes(b"\xff\xfe" * 20)
    with pytest.raises(ValueError, match="no text"):
        ApiKeys.load(path)
    monkeypatch.setenv("SERVE_API_KEY", " ")
    with pytest.raises(ValueError, match="SERVE_API_KEY is empty"):
        ApiKeys.load(None)
    monkeypatch.setenv("SERVE_API_KEY", "e" * 20)
    assert ApiKeys.load(None).allows([(b"x-api-key", b"e" * 20)])


@pytest.mark.parametrize(
    "options",
    [{"max_queue": 0}, {"max_wait_ms": -1.0}, {"body_seconds": float("nan")}, {"max_bytes": 90 << 20}],
)
def test_settings_that_cannot_be_meant(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="--"):
        Settings(**options)  # type: ignore[arg-type]


def test_bodies_give_their_memory_back() -> None:
    memory = BodyMemory(100)
    with memory.account() as first:
        first(60)
        with pytest.raises(Refused) as refused, memory.account() as second:
            second(30)
            second(30)
        assert refused.value.status == 503 and memory.num_bytes == 60
    assert memory.num_bytes == 0


async def read(messages: list[dict[str, object]], max_bytes: int = 10, seconds: float = 30.0) -> bytes:
    waiting = iter(messages)

    async def receive() -> dict[str, object]:
        try:
            return next(waiting)
        except StopIteration:
            await asyncio.sleep(3600)
            raise

    return await read_body(receive, max_bytes, seconds, lambda _: None)


def test_bodies_are_whole_or_refused() -> None:
    def piece(content: bytes, more: bool) -> dict[str, object]:
        return {"type": "http.request", "body": content, "more_body": more}

    assert asyncio.run(read([piece(b"ab", True), piece(b"", True), piece(b"c", False)])) == b"abc"
    assert asyncio.run(read([piece(b"a" * 10, False)])) == b"a" * 10
    with pytest.raises(Refused) as refused:
        asyncio.run(read([piece(b"a" * 9, True), piece(b"aa", True)]))
    assert refused.value.status == 413
    with pytest.raises(Refused) as refused:
        asyncio.run(read([piece(b"a", True)], seconds=0.05))
    assert refused.value.status == 408
    with pytest.raises(ClientGone):
        asyncio.run(read([piece(b"a", True), {"type": "http.disconnect"}]))


def test_large_images_are_decoded_one_after_another() -> None:
    budget = PixelBudget(100)
    held, most = 0, 0
    lock = threading.Lock()

    def decode(pixels: int) -> None:
        nonlocal held, most
        with budget.hold(pixels):
            with lock:
                held += min(pixels, 100)
                most = max(most, held)
            time.sleep(0.005)
            with lock:
                held -= min(pixels, 100)

    threads = [threading.Thread(target=decode, args=(size,)) for size in (60, 60, 30, 10, 500, 0, 99)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert 60 <= most <= 100
    webp = io.BytesIO()
    Image.new("RGB", (40, 30)).save(webp, "WEBP")
    assert num_pixels(webp.getvalue()) == 2 * 40 * 30, "its decoder holds a copy of its own"
    assert num_pixels(b"no image") == num_pixels(b"\x89PNG\r\n\x1a\n") == 0
