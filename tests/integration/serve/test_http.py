"""The endpoint as its users see it: a real process, the same answers as without it, batches, keys, logs."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import httpx
import pytest

from serve.__main__ import main
from serve.portable.onnx_classifier import OnnxClassifier
from tests.conftest import ROOT
from tests.integration.serve.http_server import ServerProcess, picture, server, write_model

KEY = "a-key-for-this-test-0123456789"
PICTURES = [
    picture(230, 20, 30),
    picture(20, 200, 30, (64, 64), "PNG"),
    picture(10, 30, 220, (9, 50), "WEBP"),
    picture(2, 2, 2, (300, 200)),
    picture(120, 130, 140, kind="BMP"),
    picture(180, 170, 20, kind="GIF"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("exported") / "colours", num_products=3)


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[ServerProcess]:
    with server(folder, "--max-wait-ms", "20", "--max-files", "8") as process:
        yield process


def answers_of(response: httpx.Response) -> list[list[dict[str, object]]]:
    assert response.status_code == 200, response.text
    return [row["top"] for row in response.json()["predictions"]]


def same(found: list[dict[str, object]], expected: list[dict[str, object]]) -> bool:
    names = [(row["label"], row["name"]) for row in found] == [
        (row["label"], row["name"]) for row in expected
    ]
    return names and all(
        abs(one["probability"] - other["probability"]) < 2e-6  # type: ignore[operator]
        for one, other in zip(found, expected, strict=True)
    )


def test_answers_are_those_of_the_classifier(running: ServerProcess, folder: Path) -> None:
    expected = [
        one.as_dict()["top"] for one in OnnxClassifier(folder, num_threads=1).classify(PICTURES, top=4)
    ]
    assert {rows[0]["name"] for rows in expected} >= {"red", "green", "blue", "dark"}
    for content, rows in zip(PICTURES, expected, strict=True):
        response = running.predict(content)
        assert same(answers_of(response)[0], rows)
    model = response.json()["model"]
    assert model["sha256"] == hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    assert model["checkpoint_sha256"] == "ab" * 32 and model["title"] == "colours of run test"
    # Several files in one request, among them one that is none.
    files = [("file", (f"{number}.jpg", content)) for number, content in enumerate(PICTURES)]
    files.insert(2, ("file", ("../../etc/passwd", b"root:x:0:0")))
    with running.client() as client:
        response = client.post("/predict", files=files, data={"top": "2"})
    found = response.json()["predictions"]
    assert found[2]["name"] == "passwd" and found[2]["error"]["code"] == "not_an_image"
    del found[2]
    assert [row["name"] for row in found] == [f"{number}.jpg" for number in range(len(PICTURES))]
    assert all(same(row["top"], rows[:2]) for row, rows in zip(found, expected, strict=True))


@pytest.mark.parametrize("top", ["1", "3", "4"])
def test_top_says_how_many_classes(running: ServerProcess, top: str) -> None:
    assert len(answers_of(running.predict(PICTURES[0], params={"top": top}))[0]) == int(top)


@pytest.mark.parametrize("top", ["0", "5", "-1", "two", "1e3", "", "9" * 400])
def test_a_wrong_top_is_said(running: ServerProcess, top: str) -> None:
    response = running.predict(PICTURES[0], params={"top": top})
    assert response.status_code == 422 and "from 1 to 4" in response.json()["error"]["message"]
    with running.client() as client:
        response = client.post("/predict", files={"file": PICTURES[0]}, data={"top": top})
    assert (response.status_code, response.json()["error"]["code"]) == (422, "bad_top")


def test_concurrent_requests_are_computed_together(running: ServerProcess, folder: Path) -> None:
    expected = [one.as_dict()["top"] for one in OnnxClassifier(folder, num_threads=1).classify(PICTURES, 1)]
    batches, images = running.metric("serve_batch_size_count"), running.metric("serve_batch_size_sum")
    numbers = [number % len(PICTURES) for number in range(72)]
    with running.client() as client, ThreadPoolExecutor(12) as pool:
        responses = list(
            pool.map(lambda n: client.post("/predict?top=1", content=PICTURES[n]), numbers, timeout=120)
        )
    # Nobody gets another's answer.
    for number, response in zip(numbers, responses, strict=True):
        assert same(answers_of(response)[0], expected[number])
    images = running.metric("serve_batch_size_sum") - images
    batches = running.metric("serve_batch_size_count") - batches
    assert images == 72 and images / batches >= 2


def test_without_batching_each_image_is_computed_alone(folder: Path) -> None:
    with server(folder, "--max-batch", "1") as process:
        with process.client() as client, ThreadPoolExecutor(8) as pool:
            answers = list(
                pool.map(lambda n: client.post("/predict", content=PICTURES[n % 6]).status_code, range(16))
            )
        assert answers == [200] * 16
        assert process.metric("serve_batch_size_sum") == process.metric("serve_batch_size_count") == 16


def test_health_metrics_and_openapi(running: ServerProcess) -> None:
    failures = running.metric("serve_image_failures_total")
    assert running.predict(b"no image at all").status_code == 415
    assert running.predict(PICTURES[0]).status_code == 200
    with running.client() as client:
        for path in ("/healthz", "/healthz/live", "/healthz/ready"):
            assert client.get(path).status_code == 200
        text = client.get("/metrics").text
        schema = client.get("/openapi.json").json()
        assert client.get("/predict").status_code == 405
        assert client.get("/etc/passwd").json()["error"]["code"] == "no_such_path"
        assert client.get("/../../etc/passwd").status_code == 404
    assert running.metric("serve_image_failures_total") == failures + 1
    assert re.search(r'^serve_requests_total\{path="/predict",status="200"\} \d+$', text, re.M)
    assert re.search(r'^serve_requests_total\{path="/predict",status="415"\} \d+$', text, re.M)
    for name in ("serve_request_seconds", "serve_batch_size", "serve_compute_seconds"):
        buckets = [int(n) for n in re.findall(rf'^{name}_bucket{{le="[^"]+"}} (\d+)$', text, re.M)]
        assert buckets and buckets == sorted(buckets)
        assert re.search(rf"^{name}_count {buckets[-1]}$", text, re.M)
    assert "\nserve_queue_images 0\n" in text and "\nserve_body_bytes 0\n" in text
    # Every line is of the text format.
    sample = r"[a-z_]+(\{([a-z_0-9]+=\"[^\"\n]*\",?)+\})? [0-9.e+-]+"
    assert all(row.startswith("# ") or re.fullmatch(sample, row) for row in text.splitlines())
    predict = schema["paths"]["/predict"]["post"]
    assert set(predict["responses"]) >= {"200", "400", "401", "408", "413", "415", "422", "503"}
    assert predict["responses"]["200"]["content"]["application/json"]["example"]["predictions"]
    assert predict["responses"]["413"]["content"]["application/json"]["example"]["error"]["code"]
    assert {"image/jpeg", "multipart/form-data"} <= set(predict["requestBody"]["content"])


def test_keys_are_wanted_and_nothing_secret_is_logged(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# of this test\nanother-key-of-someone-else\n{KEY}\n")
    image = picture(230, 1, 1)
    with server(folder, "--api-key-file", str(tmp_path / "keys")) as process:
        wrong = [
            {},
            {"X-API-Key": KEY[:-1]},
            {"Authorization": "Bearer x"},
            {"Authorization": f"Basic {KEY}"},
        ]
        for headers in wrong:
            response = process.predict(image, headers=headers)
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        assert process.predict(image, headers={"X-API-Key": KEY}).status_code == 200
        response = process.predict(
            image,
            headers={"Authorization": f"Bearer {KEY}", "X-Request-ID": "mine-1"},
            params={"top": 1, "token": "secret-in-query"},
        )
        assert response.status_code == 200 and response.headers["x-request-id"] == "mine-1"
        with process.client() as client:
            assert client.get("/healthz").status_code == 200
            assert client.get("/metrics").status_code == 401
            files = {"file": ("private-name.jpg", image)}
            client.post("/predict", files=files, headers={"X-API-Key": KEY, "X-Request-ID": 'bad"id'})
            assert "securitySchemes" in client.get("/openapi.json").json()["components"]
        assert process.stop() == 0
    assert not process.other_output
    requests = [row for row in process.lines if row["event"] == "request" and row["path"] == "/predict"]
    assert [row["status"] for row in requests] == [401] * 4 + [200] * 3
    assert requests[5]["request_id"] == "mine-1" and requests[5]["bytes_in"] == len(image)
    assert requests[5]["images"] == 1 and requests[5]["seconds"] > 0
    text = json.dumps(process.lines)
    for secret in (KEY, KEY[:-1], "another-key", "secret-in-query", "private-name", "JFIF", 'bad\\"id'):
        assert secret not in text


def test_the_key_may_come_from_the_environment(folder: Path) -> None:
    with server(folder, SERVE_API_KEY=KEY) as process:
        assert process.predict(PICTURES[0]).status_code == 401
        assert process.predict(PICTURES[0], headers={"X-API-Key": KEY}).status_code == 200


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["RUN"], "python -m serve export RUN --format onnx --out exported/run, and serve that folder"),
        (["RUN/checkpoints/best.pt"], "is no exported model: run python -m serve export"),
        (["nowhere"], "does not exist"),
        (["MODEL", "--max-batch", "0"], "--max-batch is 0: it must be 1 or more"),
        (["MODEL", "--max-files", "500"], "--max-files (500) must not be above --max-queue (256)"),
        (["MODEL", "--form", "int8"], "holds no int8 model (there is: onnx)"),
        (["MODEL", "--port", "70000"], "--port is 70000: it must be from 0"),
        (["MODEL", "--host", "203.0.113.7"], "cannot be listened on"),
        (["MODEL", "--api-key-file", "KEYS"], "an API key has 16 or more"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    words: list[str], sentence: str, folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "best.pt").write_bytes(b"x")
    (tmp_path / "keys").write_text("short\n")
    names = {"RUN": str(run), "MODEL": str(folder), "KEYS": str(tmp_path / "keys")}

    def filled(text: str) -> str:
        for name, value in names.items():
            text = text.replace(name, value)
        return text

    # In this process: starting Python anew takes longer than all that is tested.
    with redirect_stderr(StringIO()) as errors:
        assert main(["http", *map(filled, words)]) == 1
    assert errors.getvalue().startswith("error: ") and errors.getvalue().count("\n") == 1
    assert filled(sentence) in errors.getvalue()


def test_it_needs_neither_torch_nor_other_packages_of_ours() -> None:
    code = """
import sys
class Blocker:
    names = {"torch", "torchvision", "timm", "mlflow", "gradio", "data_prep", "train", "evaluation"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
import serve.__main__, serve.commands.http, serve.http.server
print(*sorted(name for name in sys.modules if name.startswith("serve.")))
"""
    words = [sys.executable, "-c", code]
    finished = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    # What the image's Dockerfile copies.
    parts = {".".join(name.split(".")[:2]) for name in finished.stdout.split()}
    assert parts == {"serve.__main__", "serve.commands", "serve.http", "serve.portable"}
