"""SIGTERM under load: whoever was taken is answered, whoever comes later is told, and the exit code is 0."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.integration.serve.http_server import picture, post, read_all, server, status_of, write_model

GOOD = picture(230, 20, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("exported") / "slow", num_products=40)


def test_no_accepted_request_is_lost(folder: Path) -> None:
    counts: Counter[str] = Counter()
    signalled = [float("inf")]
    # The batches are small, so that some requests wait for others at the signal.
    with server(folder, "--max-batch", "2", "--grace-seconds", "60") as process:

        def load(keep_alive: bool) -> None:
            limits = httpx.Limits(max_keepalive_connections=1 if keep_alive else 0)
            with process.client(limits=limits) as client:
                while True:
                    began = time.monotonic()
                    try:
                        response = client.post("/predict", content=GOOD)
                    except httpx.ConnectError:
                        counts["no connection"] += 1  # the port is closed
                        return
                    except httpx.TransportError as error:
                        # After the signal, the kernel may have taken a connection that the server never saw.
                        counts["no connection" if began > signalled[0] else f"lost: {error!r}"] += 1
                        return
                    counts[str(response.status_code)] += 1
                    if response.status_code == 503:
                        assert response.json()["error"]["code"] == "shutting_down"
                        assert response.headers["connection"] == "close"
                        assert int(response.headers["retry-after"]) >= 1

        threads = [threading.Thread(target=load, args=(number % 2 == 0,)) for number in range(8)]
        for thread in threads:
            thread.start()
        while counts["200"] < 10:
            time.sleep(0.05)
        # One whose body is on its way at the signal was taken, too.
        slow = socket.create_connection(("127.0.0.1", process.port), timeout=60)
        whole = post(GOOD)
        slow.sendall(whole[:200])
        time.sleep(0.5)
        answered = counts["200"]
        signalled[0] = time.monotonic()
        process.process.terminate()
        time.sleep(1)
        slow.sendall(whole[200:])
        assert status_of(read_all(slow)) == 200
        slow.close()
        for thread in threads:
            thread.join(timeout=120)
        assert process.process.wait(timeout=120) == 0
        process._reader.join(timeout=10)
    assert counts["200"] > answered  # those in flight
    assert counts["503"] + counts["no connection"] >= 8
    assert not {name: count for name, count in counts.items() if name.startswith("lost")}
    assert process.lines[-1]["event"] == "stopped"
    logged = Counter(row["status"] for row in process.lines if row["event"] == "request")
    assert logged[200] == counts["200"] + 1


def test_grace_ends_and_the_queue_is_bounded(folder: Path) -> None:
    options = ["--max-batch", "1", "--max-queue", "3", "--max-files", "1", "--grace-seconds", "2"]
    with server(folder, *options) as process:
        statuses: list[int] = []

        def ask() -> None:
            try:
                response = process.predict(GOOD)
            except httpx.TransportError:
                statuses.append(0)
                return
            statuses.append(response.status_code)
            if response.status_code == 503:
                assert response.json()["error"]["code"] in ("busy", "failure")
                assert response.headers["retry-after"] == "1"

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses.count(503) >= 1 and statuses.count(200) >= 3
        assert set(statuses) == {200, 503}
        # A client that never ends its request does not hold the server for ever.
        stuck = socket.create_connection(("127.0.0.1", process.port), timeout=60)
        stuck.sendall(post(GOOD)[:100])
        time.sleep(1)
        began = time.monotonic()
        assert process.stop() == 0
        assert time.monotonic() - began < 25  # --body-seconds would be 30
        stuck.close()


def test_readiness_says_no_first(folder: Path) -> None:
    with server(folder) as process:
        with process.client() as client:
            assert client.get("/healthz/ready").status_code == 200
            process.process.terminate()
            deadline = time.monotonic() + 30
            try:
                while (response := client.get("/healthz/ready")).status_code == 200:
                    assert time.monotonic() < deadline
                assert response.status_code == 503
            except httpx.TransportError:
                pass  # its 0.3 seconds had gone by, on a busy machine
        assert process.process.wait(timeout=60) == 0
        with pytest.raises(httpx.ConnectError):
            process.predict(GOOD)
