"""The kinds of faults: processes that die, files that are damaged. Each knows what must come after it.

A fault is made by `strike`, and described in some words that go into the live line. Where it could not be
made (the training had finished, its loader has no workers), it raises NotMade.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from tests.storm.processes import POLL_SECONDS, Process
from tests.storm.runner import StormError, Training
from tests.storm.services import Services
from train.checkpoint import CheckpointStore

STOP_SECONDS = 90.0  # for a planned stop; torchrun itself gives its ranks half a minute
FIND_SECONDS = 30.0  # for what a fault needs to be there


class NotMade(Exception):
    """There was nothing to strike; no fault is counted."""


class After(Enum):
    """What must come after a fault."""

    AGAIN = "a new start, from a checkpoint"
    PLANNED = "a new start, with no step lost"
    ON = "the same start goes on"


@dataclass
class Scene:
    """What a fault may lay hands on."""

    training: Training
    chooser: random.Random
    services: Services
    pace: float
    said: list[str] = field(default_factory=list)  # what was not as promised, beyond what is looked at anyway
    began: float = field(default_factory=time.monotonic)  # when the fault came
    step: int = 0  # that the training had come to then
    next_step_at: float | None = None  # when there was one more, where `hold` saw it

    def begin(self) -> None:
        """The fault comes now."""
        self.began, self.step = time.monotonic(), self.training.step
        self.next_step_at = None

    def hold(self, seconds: float) -> None:
        """Let the training go on for some time, slower, so that it does not end in it."""
        self.training.set_pace(4 * self.pace)
        until = time.monotonic() + seconds
        try:
            while time.monotonic() < until and not self.training.is_finished:
                self.training.tend()
                if self.next_step_at is None and self.training.step > self.step:
                    self.next_step_at = time.monotonic()
                time.sleep(POLL_SECONDS)
        finally:
            self.training.set_pace(self.pace)

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = FIND_SECONDS) -> bool:
        """Whether it came true; False where the training finished before."""
        until = time.monotonic() + seconds
        while not condition():
            self.training.tend()
            if self.training.is_finished:
                return False
            if time.monotonic() > until:
                raise StormError(f"{what}: not so after {seconds:.0f} s: {self.training.last_words()}")
            time.sleep(POLL_SECONDS)
        return True


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
        key: its name on the command line.
        kind: its name in the table.
        needs: a service of the storm: `disk`, `s3`, `metadata`, `mlflow`.
    """

    key: str
    kind: str
    after: After
    strike: Callable[[Scene], str]
    needs: str | None = None


def _all_ranks(scene: Scene) -> list[Process]:
    """As soon as there are any."""
    found: list[Process] = []

    def look() -> bool:
        found[:] = scene.training.ranks()
        return bool(found)

    if not scene.wait_for(look, "ranks to strike"):
        raise NotMade
    return found


def _a_rank(scene: Scene) -> Process:
    return scene.chooser.choice(_all_ranks(scene))


def kill_rank(scene: Scene) -> str:
    rank = _a_rank(scene)
    rank.send(signal.SIGKILL)
    return f"rank {rank.rank}"


def kill_ranks(scene: Scene) -> str:
    for rank in _all_ranks(scene):
        rank.send(signal.SIGKILL)
    return ""


def kill_job(scene: Scene) -> str:
    _kill_all_of(scene.training)
    scene.training.launch()
    return ""


def _kill_all_of(training: Training) -> None:
    """With nothing left, and no new start."""
    training.is_held = True
    training.kill()
    if training.status == "finished":
        training.is_held = False
        raise NotMade


def kill_agent(scene: Scene) -> str:
    """The ranks must notice by themselves; torchrun cannot tell them."""
    training = scene.training
    training.is_held = True
    if (agent := training.agent) is None:
        training.is_held = False
        raise NotMade
    agent.send(signal.SIGKILL)
    began = time.monotonic()
    if not training.wait_for_exit(STOP_SECONDS):
        scene.said.append(f"{STOP_SECONDS:.0f} s after torchrun was killed there is {training.living()}")
        training.kill()
    training.launch()
    return f"ranks ended {time.monotonic() - began:.1f} s later"


def kill_worker(scene: Scene) -> str:
    workers = scene.training.workers()
    if not workers:
        raise NotMade  # this loader decodes in threads
    scene.chooser.choice(workers).send(signal.SIGKILL)
    return ""


def kill_while_saving(scene: Scene) -> str:
    """At the moment when a file that is not whole yet lies in the checkpoint folder."""
    folder = scene.training.folder / "checkpoints"
    until = time.monotonic() + FIND_SECONDS
    while time.monotonic() < until and not scene.training.is_finished:
        partial = next(folder.glob(".*.partial"), None)
        if partial is not None:
            scene.begin()
            for rank in scene.training.ranks():
                rank.send(signal.SIGKILL)
            return f"while {partial.name[1:-8]} was being written"
        time.sleep(0.0005)
    return kill_rank(scene) + ", with no save seen"


def kill_while_starting(scene: Scene) -> str:
    """All ranks, and one of the new ones before it came to a step."""
    training = scene.training
    before = {rank.pid for rank in _all_ranks(scene)}
    kill_ranks(scene)
    if not scene.wait_for(lambda: bool({r.pid for r in training.ranks()} - before), "new ranks"):
        return "and the training had finished"
    scene.hold(scene.chooser.uniform(0.2, 6.0))
    victim = _a_rank(scene)
    victim.send(signal.SIGKILL)
    return f"and rank {victim.rank} again"


def planned_stop(scene: Scene, ask: Callable[[], str], relent: Callable[[], None] = lambda: None) -> str:
    """Ask for it, and look at what is left behind, as a launcher does."""
    training = scene.training
    training.is_held = True
    began = time.monotonic()
    try:
        words = ask()
    except NotMade:
        training.is_held = False
        raise
    if not training.wait_for_exit(STOP_SECONDS):
        scene.said.append(f"did not stop within {STOP_SECONDS:.0f} s: {training.living()}")
        training.kill()
    stopped_after = time.monotonic() - began
    relent()
    if training.status not in ("restart", "finished"):
        scene.said.append(f"status.json says {training.status!r} ({training.reason[:200]}), not 'restart'")
    training.is_held = False  # the launcher finds it as it is
    return f"{words} stopped in {stopped_after:.1f} s".strip()


def terminate(scene: Scene) -> str:
    def ask() -> str:
        if (agent := scene.training.agent) is None:
            raise NotMade
        agent.send(signal.SIGTERM)
        return ""

    return planned_stop(scene, ask)


def user_signal(scene: Scene) -> str:
    def ask() -> str:
        rank = _a_rank(scene)
        rank.send(signal.SIGUSR1)
        return f"rank {rank.rank},"

    return planned_stop(scene, ask)


def stop_rank(scene: Scene) -> str:
    rank = _a_rank(scene)
    rank.send(signal.SIGSTOP)
    return f"rank {rank.rank}"


def between_starts(scene: Scene, change: Callable[[CheckpointStore], str]) -> str:
    """Kill it, change its files as a bad disk does, start it again."""
    training = scene.training
    store = CheckpointStore(training.folder / "checkpoints")
    # With one checkpoint only, there is nothing to go back to.
    if not scene.wait_for(lambda: len(store.manifest().checkpoints) > 1, "two checkpoints"):
        raise NotMade
    scene.begin()
    _kill_all_of(training)
    words = change(store)
    training.launch()
    return words


def flip_byte(scene: Scene) -> str:
    def change(store: CheckpointStore) -> str:
        entry = store.manifest().checkpoints[-1]
        place = scene.chooser.randrange(entry.bytes)
        with (store.folder / entry.name).open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ (1 << scene.chooser.randrange(8))]))
        return f"of {entry.name}"

    return between_starts(scene, change)


def truncate(scene: Scene) -> str:
    def change(store: CheckpointStore) -> str:
        entry = store.manifest().checkpoints[-1]
        with (store.folder / entry.name).open("r+b") as file:
            file.truncate(scene.chooser.randrange(entry.bytes))
        return f"of {entry.name}"

    return between_starts(scene, change)


def delete_manifest(scene: Scene) -> str:
    def change(store: CheckpointStore) -> str:
        (store.folder / "manifest.json").unlink()
        return ""

    return between_starts(scene, change)


def damage_manifest(scene: Scene) -> str:
    def change(store: CheckpointStore) -> str:
        path = store.folder / "manifest.json"
        content = path.read_bytes()
        path.write_bytes(content[: scene.chooser.randrange(len(content))])
        return ""

    return between_starts(scene, change)


def tear_metrics(scene: Scene) -> str:
    """A row that was being written when the machine died: half of it is there, without its end."""

    def change(store: CheckpointStore) -> str:
        path = scene.training.folder / "metrics.jsonl"
        row = path.read_bytes().splitlines()[-1]
        with path.open("ab") as file:
            file.write(row[: scene.chooser.randrange(1, len(row))])
        return ""

    return between_starts(scene, change)


def lose_folder(scene: Scene) -> str:
    """The machine is gone: a fresh one has what is in S3."""
    training = scene.training
    bucket = scene.services.bucket
    assert bucket is not None
    latest = f"{training.plan.folder.name}/{training.plan.name}/latest.json"
    if not scene.wait_for(lambda: bucket.has(latest), "something in the mirror", 60):
        raise NotMade
    scene.begin()
    _kill_all_of(training)
    shutil.rmtree(training.folder)
    training.launch()
    return ""


PROCESS_FAULTS = (
    Fault("rank", "SIGKILL of a rank", After.AGAIN, kill_rank),
    Fault("ranks", "SIGKILL of all ranks", After.AGAIN, kill_ranks),
    Fault("job", "SIGKILL of torchrun and its ranks", After.AGAIN, kill_job),
    Fault("agent", "SIGKILL of torchrun alone", After.AGAIN, kill_agent),
    Fault("worker", "SIGKILL of a data worker", After.AGAIN, kill_worker),
    Fault("saving", "SIGKILL of all ranks in a save", After.AGAIN, kill_while_saving),
    Fault("starting", "SIGKILL, and again while starting", After.AGAIN, kill_while_starting),
    Fault("sigterm", "SIGTERM to torchrun", After.PLANNED, terminate),
    Fault("sigusr1", "SIGUSR1 to a rank", After.PLANNED, user_signal),
    Fault("hang", "SIGSTOP of a rank", After.AGAIN, stop_rank),
)
FILE_FAULTS = (
    Fault("flip", "a byte of the newest checkpoint flipped", After.AGAIN, flip_byte),
    Fault("truncation", "newest checkpoint truncated", After.AGAIN, truncate),
    Fault("manifest", "manifest.json deleted", After.AGAIN, delete_manifest),
    Fault("damaged-manifest", "manifest.json cut short", After.AGAIN, damage_manifest),
    Fault("torn-row", "half a row in metrics.jsonl", After.AGAIN, tear_metrics),
    Fault("folder", "run folder lost, back from S3", After.AGAIN, lose_folder, needs="s3"),
)
