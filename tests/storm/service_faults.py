"""Faults of what a training leans on: the disk, S3, the tracking server, the machine's metadata."""

from __future__ import annotations

from collections.abc import Callable

from tests.storm.faults import FILE_FAULTS, PROCESS_FAULTS, After, Fault, Scene, planned_stop
from tests.storm.services import MLFLOW_FAULTS, S3_FAULTS

SHORTEST_SECONDS, LONGEST_SECONDS = 3.0, 6.0  # of an outage

# Kinds that wait for a part of the product which is not wired in yet → that part.
WAITING: dict[str, str] = {}


def _outage(scene: Scene) -> float:
    return scene.chooser.uniform(SHORTEST_SECONDS, LONGEST_SECONDS)


def fill_disk(scene: Scene) -> str:
    seconds = _outage(scene)
    with scene.services.full_disk(scene.training.runs):
        scene.hold(seconds)
    return f"for {seconds:.1f} s"


def read_only(scene: Scene) -> str:
    seconds = _outage(scene)
    with scene.services.read_only(scene.training.folder):
        scene.hold(seconds)
    return f"for {seconds:.1f} s"


def break_s3(scene: Scene) -> str:
    seconds, fault = _outage(scene), scene.chooser.choice(S3_FAULTS)
    with scene.services.broken_s3(fault, scene.chooser):
        scene.hold(seconds)
    return f"{fault} for {seconds:.1f} s"


def break_mlflow(fault: str) -> Callable[[Scene], str]:
    def strike(scene: Scene) -> str:
        seconds = _outage(scene)
        with scene.services.broken_mlflow(fault):
            scene.hold(seconds)
        return f"for {seconds:.1f} s"

    return strike


def kill_mlflow(scene: Scene) -> str:
    seconds = _outage(scene)
    scene.services.kill_mlflow()
    scene.hold(seconds)
    scene.services.start_mlflow(lambda: scene.hold(0.2))
    return f"for {seconds:.1f} s"


def notice(what: str) -> Callable[[Scene], str]:
    def strike(scene: Scene) -> str:
        metadata = scene.services.metadata
        assert metadata is not None

        def ask() -> str:
            getattr(metadata, what)()
            return ""

        return planned_stop(scene, ask, metadata.notices.clear)

    return strike


FAULTS = (
    *PROCESS_FAULTS,
    *FILE_FAULTS,
    Fault("full-disk", "disk full for seconds", After.ON, fill_disk, needs="disk"),
    Fault("read-only", "run folder read-only for seconds", After.ON, read_only, needs="disk"),
    Fault("s3", "S3 fails for seconds", After.ON, break_s3, needs="s3"),
    Fault("mlflow-killed", "MLflow's server killed", After.ON, kill_mlflow, needs="mlflow"),
    *(
        Fault(f"mlflow-{key}", f"MLflow {words}", After.ON, break_mlflow(key), needs="mlflow")
        for key, words in MLFLOW_FAULTS.items()
    ),
    Fault("interruption", "spot interruption notice", After.PLANNED, notice("interrupt"), needs="metadata"),
    Fault("rebalance", "rebalance recommendation", After.PLANNED, notice("recommend"), needs="metadata"),
)
BY_KEY = {fault.key: fault for fault in FAULTS}
