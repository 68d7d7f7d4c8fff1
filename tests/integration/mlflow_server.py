"""A real `mlflow server`, a real PostgreSQL, and a proxy that makes them fail as one likes."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

START_SECONDS = 180
PASS, HANG, BREAK, LOSE, REFUSE = "pass", "hang", "break", "lose", "refuse"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class MlflowServer:
    """`mlflow server` on a store; may be killed and started again on the same port."""

    def __init__(self, store: str, folder: Path) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._store = store
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self._store]
        command += ["--artifacts-destination", str(self._folder / "artifacts"), "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        quiet |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | quiet, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            time.sleep(0.1)
        raise AssertionError((self._folder / "server.log").read_text())

    def kill(self) -> None:
        """With all its workers, at once."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@contextlib.contextmanager
def mlflow_server(store: str, folder: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(store, folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@dataclass
class Proxy:
    """Stands before a server.

    Attributes:
        fault: (method, path) → `pass`; `hang` accepts and never answers; `break` answers 500; `lose` lets the
            server do its work and drops the answer; `refuse` closes the connection.
        seen: (method, path, fault) of all requests.
    """

    upstream_port: int
    fault: Callable[[str, str], str] = lambda method, path: PASS
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    uri: str = ""
    released: threading.Event = field(default_factory=threading.Event)  # what hangs, ends

    def always(self, fault: str) -> None:
        self.fault = lambda method, path: fault

    def once(self, fault: str, part_of_path: str) -> None:
        """Only the next request whose path has this part."""
        left = [fault]
        self.fault = lambda method, path: left.pop() if left and part_of_path in path else PASS

    def count(self, part_of_path: str, fault: str = PASS) -> int:
        return sum(part_of_path in path and fault == what for _, path, what in self.seen)


@contextlib.contextmanager
def proxy_before(port: int) -> Iterator[Proxy]:
    proxy = Proxy(port)

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fault = proxy.fault(self.command, self.path)
            proxy.seen.append((self.command, self.path, fault))
            if fault == HANG:
                proxy.released.wait()
            if fault in (HANG, REFUSE):
                return
            if fault == BREAK:
                self.send_response(500)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            upstream = http.client.HTTPConnection("127.0.0.1", proxy.upstream_port, timeout=60)
            try:
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
                upstream.request(self.command, self.path, body, headers)
                response = upstream.getresponse()
                content = response.read()
            except OSError:
                return  # the server is down: so are we
            finally:
                upstream.close()
            if fault == LOSE:
                return
            self.send_response(response.status)
            self.send_header("Content-Type", response.headers.get("Content-Type", "application/json"))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

        def log_message(self, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # the client gave up

    server = Server(("127.0.0.1", 0), Handler)
    proxy.uri = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def postgres_binaries() -> Path | None:
    """Folder of initdb and pg_ctl; None where there is no PostgreSQL, or no user that may run it."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    folder = found[-1].parent if found else None
    if folder is None and shutil.which("initdb") and shutil.which("pg_ctl"):
        folder = Path(shutil.which("initdb") or "").parent
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        users = Path("/etc/passwd").read_text(encoding="utf-8")
        if shutil.which("setpriv") is None or "\npostgres:" not in users:
            return None
    return folder


@contextlib.contextmanager
def postgres(password: str) -> Iterator[str]:
    """A database of its own that asks for a password: its URI, with it."""
    binaries = postgres_binaries()
    assert binaries is not None
    # Not in pytest's folder, which is closed to other users; the name of its socket must be short, too.
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as name:
        folder, port = Path(name), free_port()
        prefix: list[str] = []
        secret = folder / "password"
        secret.write_text(password + "\n")
        if os.geteuid() == 0:
            prefix = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]
            for path in (folder, secret):
                shutil.chown(path, "postgres", "postgres")

        def call(program: str, *words: str) -> None:
            command = [*prefix, str(binaries / program), "-D", str(folder / "data"), *words]
            result = subprocess.run(
                command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            assert result.returncode == 0, result.stdout

        call("initdb", "-U", "mlflow", "-A", "scram-sha-256", "--pwfile", str(secret), "--no-sync")
        settings = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        # Its log must be a file: the server would hold a pipe of ours open.
        call("pg_ctl", "-w", "-t", "120", "-l", str(folder / "log"), "-o", settings, "start")
        try:
            yield f"postgresql+psycopg2://mlflow:{password}@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "-m", "immediate", "stop")
