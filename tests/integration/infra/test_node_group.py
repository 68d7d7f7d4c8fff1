"""Two nodes train one run: real agents, real torchrun on loopback, S3 from moto; one is lost and replaced."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.manifest import Manifest
from infra.layout import Job, Keys
from tests.conftest import ROOT
from tests.integration.launch import TINY_RECIPE
from tests.integration.s3_server import Bucket

DEPLOYMENT = "pair"
KEYS = Keys(DEPLOYMENT)
EPOCHS, STEPS_AN_EPOCH = 6, 6  # 160 images in batches of 24
RECIPE = TINY_RECIPE.replace(
    "[{kind: one_cycle, epochs: 2}, {kind: plateau, epochs: 1, initial_lr_fraction: 0.05}]",
    f"[{{kind: one_cycle, epochs: {EPOCHS}}}]",
)
WAIT_SCALE = 0.15


class Node:
    """An agent with a machine of its own, as far as folders go."""

    def __init__(self, root: Path, bucket: Bucket, instance: str, port: int) -> None:
        self.root, self.instance, self.bucket = root, instance, bucket
        root.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "infra.node"],
            cwd=ROOT,
            env=os.environ
            | {
                "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
                "SPRINT_ROOT": str(root),
                "SPRINT_DEPLOYMENT": DEPLOYMENT,
                "SPRINT_BUCKET": bucket.name,
                "SPRINT_INSTANCE": instance,
                "SPRINT_ADDRESS": "127.0.0.1",
                "SPRINT_RENDEZVOUS_PORT": str(port),
                "SPRINT_WAIT_SCALE": str(WAIT_SCALE),
                "SPRINT_DEADLINE": str(int(time.time()) + 3600),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "MLFLOW_DISABLE_TELEMETRY": "true",
            },
        )

    @property
    def run(self) -> Path:
        return self.root / "mnt/cache/runs" / DEPLOYMENT

    def num_rows(self) -> int:
        path = self.run / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def power_cut(self) -> None:
        """Everything of this machine at once: agent, torchrun and ranks."""
        marker = f"SPRINT_ROOT={self.root}\0".encode()
        for _ in range(3):
            for path in Path("/proc").iterdir():
                with contextlib.suppress(OSError, ValueError):
                    if int(path.name) != os.getpid() and marker in (path / "environ").read_bytes():
                        os.kill(int(path.name), signal.SIGKILL)
        self.process.wait(20)

    def verdict(self) -> list[str]:
        return (self.root / "run/sprint/verdict").read_text().splitlines()

    def logs(self) -> str:
        files = sorted((self.root / "var/log/sprint").glob("*.log"))
        ends = (f"--> {path.name}\n{path.read_text(errors='replace')[-4000:]}" for path in files)
        return "\n".join([f"==> {self.instance}", *ends])


class Cluster:
    def __init__(self, folder: Path, bucket: Bucket) -> None:
        self.folder, self.bucket = folder, bucket
        self.nodes: list[Node] = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def start(self, instance: str) -> Node:
        self.nodes.append(Node(self.folder / instance, self.bucket, instance, self.port))
        return self.nodes[-1]

    def wait_for(self, what: Callable[[], Any], seconds: float = 400) -> Any:
        until = time.monotonic() + seconds
        while not (value := what()):
            assert time.monotonic() < until, self.logs()
            time.sleep(0.05)
        return value

    def logs(self) -> str:
        return "\n".join(node.logs() for node in self.nodes)

    def events(self) -> list[dict[str, Any]]:
        files = self.bucket.files(KEYS.history)
        return [json.loads(files[name]) for name in sorted(files)]


@pytest.fixture
def cluster(tmp_path: Path, bucket: Bucket, prepared: tuple[Path, Manifest]) -> Iterator[Cluster]:
    bucket.put_folder("data/small", prepared[0])
    recipe = RECIPE.replace("DATA", "data/small")
    bucket.put(KEYS.recipe, recipe.encode())
    job = Job(
        deployment=DEPLOYMENT,
        bucket=bucket.name,
        recipe=KEYS.recipe,
        overrides=("checkpoint.every_steps=3",),
        data=bucket.at("data/small"),
        num_nodes=2,
        ranks_per_node=1,
        deadline=int(time.time()) + 3600,
    )
    bucket.put(KEYS.job, job.to_json())
    made = Cluster(tmp_path, bucket)
    yield made
    for node in made.nodes:
        node.power_cut()


def test_a_lost_node_is_replaced_and_the_run_ends_whole(cluster: Cluster) -> None:
    first, second = cluster.start("i-0002"), cluster.start("i-0001")
    # The one with the run's folder is lost: all that is left of it is in S3.
    primary = cluster.wait_for(
        lambda: next((node for node in (first, second) if node.num_rows() > STEPS_AN_EPOCH), None)
    )
    cluster.wait_for(lambda: cluster.bucket.files(f"runs/{DEPLOYMENT}/latest.json"))
    survivor = second if primary is first else first
    primary.power_cut()
    replacement = cluster.start("i-0003")
    cluster.wait_for(lambda: survivor.process.poll() is not None and replacement.process.poll() is not None)

    for node in (survivor, replacement):
        assert node.verdict()[:2] == ["end", "finished"], cluster.logs()
    end = json.loads(cluster.bucket.get(KEYS.end))
    assert end["status"] == "finished" and end["summary"]["epochs"] == EPOCHS
    rows = [json.loads(line) for line in cluster.bucket.get(f"{KEYS.report}metrics.jsonl").splitlines()]
    steps = [row["step"] for row in rows if row["split"] == "train"]
    assert steps == sorted(set(steps)) and steps[-1] == EPOCHS * STEPS_AN_EPOCH, "every step counts once"
    assert [row["epoch"] for row in rows if row["split"] == "val"] == list(range(1, EPOCHS + 1))
    generations = {event["generation"] for event in cluster.events() if event["kind"] == "training"}
    assert generations >= {0, 1}
    assert "going on from step-" in cluster.logs(), "from the mirror in S3"
    assert b"<html" in cluster.bucket.get(f"{KEYS.report}report.html")[:500].lower()
