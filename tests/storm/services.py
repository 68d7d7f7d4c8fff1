"""What a stormy training leans on, and how each of it fails: disk, S3, MLflow's server, spot notices.

S3 is moto's behind a proxy, MLflow a real server on SQLite behind a proxy, the disk a small tmpfs of its own
where this process may mount one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.integration.s3_server import MOTO, SECRET, Asked, Bucket, FaultyS3

DISK_BYTES = 96 << 20
FILLER_NAME = ".filler"
S3_FAULTS = (
    *("503 SlowDown", "500 InternalError", "drop", "drop-upload", "drop-answer", "stall:2", "flip-upload"),
)
MLFLOW_FAULTS = {
    "hangs": "hangs for seconds",
    "500": "answers 500 for seconds",
    "deaf": "does, but answers nothing, for seconds",
}


class StormBucket(Bucket):
    """A bucket that can be asked whether something is there."""

    def has(self, key: str) -> bool:
        return bool(self.s3.list_objects_v2(Bucket=self.name, Prefix=key, MaxKeys=1).get("KeyCount"))


def unavailable(service: str) -> str | None:
    """Why a service cannot be had here, or None."""
    if service == "disk" and not _may_mount():
        return "only root may mount a disk"
    modules = {"metadata": "tests.integration.fake_imds", "mlflow": "tests.integration.mlflow_server"}
    if service in modules and importlib.util.find_spec(modules[service]) is None:
        return f"there is no {modules[service]} yet"
    return None


def _may_mount() -> bool:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        mounted = _try("mount", "-t", "tmpfs", "-o", "size=1m", "storm", folder)
        if mounted:
            _try("umount", folder)
    return mounted


def _try(*words: str) -> bool:
    return subprocess.run(words, capture_output=True, timeout=30).returncode == 0


class Services:
    """Those that were asked for; a context manager, which takes all of them down.

    Attributes:
        variables: environment of the training, with which it finds them.
    """

    def __init__(self, folder: Path, wanted: set[str]) -> None:
        self.variables = {"AWS_EC2_METADATA_DISABLED": "true"}
        self.bucket: StormBucket | None = None
        self.metadata: Any = None
        self.mlflow: Any = None
        self.mlflow_proxy: Any = None
        self._folder, self._wanted = folder, wanted
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Services:
        with contextlib.ExitStack() as undo:
            undo.push(self._stack)
            if "s3" in self._wanted:
                self._open_s3()
            if "metadata" in self._wanted:
                self._open_metadata()
            if "mlflow" in self._wanted:
                self._open_mlflow()
            undo.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def words(self, name: str) -> tuple[str, ...]:
        """Overrides of the recipe, for a training that shall share nothing with those of other names."""
        found = ["preemption.poll_seconds=1"]
        if self.bucket is not None:
            found.append(f"checkpoint.mirror=s3://{self.bucket.name}/{name}")
        if self.mlflow is None:
            return (*found, "tracking.mlflow=false")
        return (*found, f"tracking.uri={self.mlflow_proxy.uri}", f"tracking.experiment={name}")

    @contextlib.contextmanager
    def disk(self, folder: Path) -> Iterator[None]:
        """A small disk mounted there, where faults of the disk are wanted."""
        if "disk" not in self._wanted:
            yield
            return
        folder.mkdir(parents=True, exist_ok=True)
        if not _try("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "storm", str(folder)):
            raise RuntimeError(f"no disk could be mounted at {folder}")
        try:
            yield
        finally:
            kept = folder.with_name(f"{folder.name}-kept")  # else the evidence goes with the disk
            shutil.copytree(folder, kept, dirs_exist_ok=True, ignore=shutil.ignore_patterns(FILLER_NAME))
            if not _try("umount", str(folder)):
                _try("umount", "-l", str(folder))
            shutil.copytree(kept, folder, dirs_exist_ok=True)
            shutil.rmtree(kept)

    @contextlib.contextmanager
    def full_disk(self, folder: Path) -> Iterator[None]:
        """Not a byte is free on the disk of `folder`."""
        path = folder / FILLER_NAME
        try:
            with path.open("wb", buffering=0) as file:
                for size in (1 << 20, 1 << 12, 1):
                    with contextlib.suppress(OSError):
                        while file.write(bytes(size)) == size:
                            pass
            yield
        finally:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def read_only(self, folder: Path) -> Iterator[None]:
        """A second mount hides the folder, and takes no writes; files that are open stay so."""
        place = str(folder)
        mounted = _try("mount", "--bind", place, place)
        try:
            if not mounted or not _try("mount", "-o", "remount,ro,bind", place):
                raise RuntimeError(f"{folder} could not be mounted read-only")
            yield
        finally:
            if mounted and not _try("umount", place):
                _try("umount", "-l", place)

    def _open_s3(self) -> None:
        moto = subprocess.Popen(
            [sys.executable, "-c", MOTO],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._stack.callback(moto.wait, 30)
        self._stack.callback(moto.kill)
        assert moto.stdout is not None
        server = FaultyS3(int(moto.stdout.readline()))
        self._stack.callback(server.close)
        own = {
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": "dummy",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "S3_MAX_WAIT_SECONDS": "0.5",
            "S3_TIMEOUT_SECONDS": "5",
        }
        before = dict(os.environ)
        self._stack.callback(_set_environment, before)
        os.environ.update(own)
        self.bucket = StormBucket(server, f"bucket-{uuid.uuid4().hex}")
        self.variables |= own

    @contextlib.contextmanager
    def broken_s3(self, fault: str, chooser: random.Random) -> Iterator[None]:
        """Half of all requests meet the fault."""
        assert self.bucket is not None
        mutex, draw = threading.Lock(), random.Random(chooser.random())

        def rule(asked: Asked) -> str | None:
            with mutex:
                return fault if draw.random() < 0.5 else None

        self.bucket.server.clear(rule)
        try:
            yield
        finally:
            self.bucket.server.clear()

    def _open_metadata(self) -> None:
        from tests.integration.fake_imds import FakeMetadata

        self.metadata = self._stack.enter_context(FakeMetadata())
        del self.variables["AWS_EC2_METADATA_DISABLED"]
        self.variables["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = self.metadata.url

    def _open_mlflow(self) -> None:
        from tests.integration.mlflow_server import mlflow_server, proxy_before

        folder = self._folder / "mlflow"
        folder.mkdir()
        server = mlflow_server(f"sqlite:///{folder / 'mlflow.db'}", folder)
        self.mlflow = self._stack.enter_context(server)
        self.mlflow_proxy = self._stack.enter_context(proxy_before(self.mlflow.port))

    @contextlib.contextmanager
    def broken_mlflow(self, fault: str) -> Iterator[None]:
        from tests.integration.mlflow_server import BREAK, HANG, LOSE, PASS

        self.mlflow_proxy.always({"hangs": HANG, "500": BREAK, "deaf": LOSE}[fault])
        try:
            yield
        finally:
            self.mlflow_proxy.always(PASS)
            self.mlflow_proxy.released.set()
            self.mlflow_proxy.released = threading.Event()

    def kill_mlflow(self) -> None:
        self.mlflow.kill()

    def start_mlflow(self, meanwhile: Callable[[], None]) -> None:
        """Start it again, which takes some ten seconds."""
        thread = threading.Thread(target=self.mlflow.start, daemon=True)
        thread.start()
        while thread.is_alive():
            meanwhile()


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
