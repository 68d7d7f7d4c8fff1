"""A server process of `python -m serve http`, a model for it, and images to send."""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from serve.portable.model_info import ModelInfo
from serve.portable.preprocessing import Preprocessing
from tests.conftest import ROOT

START_SECONDS = 120.0  # on a busy machine
CLASSES = ("red", "green", "blue", "dark")
SIDE = 16


def write_model(folder: Path, num_products: int = 0) -> Path:
    """An exported folder that tells colours; each product makes a computation some 5 to 50 ms longer."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.array([[8, 0, 0, -2], [0, 8, 0, -2], [0, 0, 8, -2]], np.float32)
    constants = {
        "weights": weights,
        "bias": np.array([0, 0, 0, 2], np.float32),
        "scale": np.float32(1 / 255),
        "zero": np.float32(0),
        "turn": np.eye(448, dtype=np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["scaled"]),
        helper.make_node("ReduceMean", ["scaled"], ["colour"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["colour", "weights"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["plain"]),
        helper.make_node("ReduceMean", ["scaled"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "turn"], ["turn0"]),
    ]
    for number in range(num_products):
        nodes.append(helper.make_node("MatMul", [f"turn{number}", "turn"], [f"turn{number + 1}"]))
    nodes += [
        helper.make_node("ReduceMean", [f"turn{num_products}"], ["rest"], keepdims=0),
        helper.make_node("Mul", ["rest", "zero"], ["nothing"]),
        helper.make_node("Add", ["plain", "nothing"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", len(CLASSES)])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    ModelInfo(
        preprocessing=Preprocessing(SIDE, 1.0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        class_names=CLASSES,
        files={"onnx": "model.onnx"},
        model={"name": "colours"},
        provenance={"run": "test", "checkpoint_sha256": "ab" * 32},
    ).save(folder)
    return folder


def picture(red: int, green: int, blue: int, size: tuple[int, int] = (40, 30), kind: str = "JPEG") -> bytes:
    """An image file of about one colour."""
    noise = np.random.default_rng(red * 65536 + green * 256 + blue).integers(-20, 21, (size[1], size[0], 3))
    pixels = (np.array([red, green, blue]) + noise).clip(0, 255).astype(np.uint8)
    return encoded(Image.fromarray(pixels), kind)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


class ServerProcess:
    """Running; `address` is where, `lines` what it has logged until now."""

    def __init__(self, folder: Path, *options: str, **variables: str) -> None:
        words = [sys.executable, "-m", "serve", "http", str(folder), "--port", "0", *options]
        self.process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[dict[str, Any]] = []
        self.other_output: list[str] = []
        started: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, args=(started,), daemon=True)
        self._reader.start()
        with contextlib.suppress(queue.Empty):
            address = started.get(timeout=START_SECONDS)
            if address is not None:
                self.address = address
                self.port = int(address.rsplit(":", 1)[1])
                return
        self.process.kill()
        raise AssertionError(f"the server did not start: {self.other_output} {self.lines}")

    def _read(self, started: queue.Queue[str | None]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                row = json.loads(line)
            except ValueError:
                self.other_output.append(line)
                continue
            self.lines.append(row)
            if row["event"] == "listening":
                started.put(row["address"])
        started.put(None)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=60, trust_env=False, **options)

    def predict(self, content: bytes, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.post("/predict", content=content, **options)

    def metric(self, name: str) -> float:
        """The sum over labels."""
        with self.client() as client:
            text = client.get("/metrics").text
        rows = [row.rsplit(" ", 1) for row in text.splitlines() if row.split("{")[0].split(" ")[0] == name]
        return sum(float(value) for _, value in rows)

    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def raw(self, *pieces: bytes, pause: float = 0.0, seconds: float = 60.0) -> bytes:
        """All that comes back on a connection of its own, to which these pieces are written."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for piece in pieces:
                    connection.sendall(piece)
                    time.sleep(pause)
            return read_all(connection)

    def stop(self, seconds: float = 60.0) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=seconds)
        self._reader.join(timeout=10)
        return code


def read_all(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            received += chunk
    return received


def status_of(answer: bytes) -> int:
    """Of the last status line; 100 Continue may precede it."""
    codes = re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)
    return int(codes[-1]) if codes else 0


def post(body: bytes, *headers: str, length: str | None = None) -> bytes:
    """A request's bytes, as no client library would let them be."""
    lines = [
        "POST /predict HTTP/1.1",
        "Host: test",
        *headers,
        f"Content-Length: {len(body) if length is None else length}",
    ]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


@contextlib.contextmanager
def server(folder: Path, *options: str, **variables: str) -> Iterator[ServerProcess]:
    running = ServerProcess(folder, *options, **variables)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()
