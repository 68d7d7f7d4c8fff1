"""A training, launched again and again as a cluster's launcher would: by what `status.json` says."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT
from tests.integration.launch import environment
from tests.storm.processes import MARK, POLL_SECONDS, Process, kill_all, marked, wait_until_gone
from tests.storm.records import Attempt, Records
from train.run_folder import read_status

NUM_RANKS = 2
MOST_IDLE_STARTS = 4  # in a row that come to no step, with no fault in between
GONE_SECONDS = 60.0  # for ranks to end when their agent has


class StormError(RuntimeError):
    """The training did not do what it must; the rest of the round makes no sense."""


@dataclass
class Plan:
    """What the training is started with."""

    folder: Path  # of all that belongs to it: runs/, logs/, records/
    name: str
    recipe: Path
    words: tuple[str, ...] = ()
    variables: dict[str, str] | None = None
    pace: float = 0.0  # seconds after each step


class Training:
    """The launcher's view of one training.

    Attributes:
        is_held: the launcher waits with the next start, until somebody calls `launch`.
        is_finished: `status.json` says so, and torchrun has ended.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.runs = plan.folder / "runs"
        self.folder = self.runs / plan.name
        self.logs = plan.folder / f"logs-{plan.name}"
        self.records = Records(plan.folder / f"records-{plan.name}")
        self.mark = uuid.uuid4().hex
        self.is_held = self.is_finished = False
        self.num_starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._idle_starts = 0
        self._steps_then: Attempt | None = None
        self._pace = plan.folder / f"pace-{plan.name}"
        for folder in (self.runs, self.logs, self.records.folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.set_pace(plan.pace)

    def set_pace(self, seconds: float) -> None:
        part = self._pace.with_suffix(".part")
        part.write_text(str(seconds))
        part.replace(self._pace)

    def launch(self) -> None:
        """Start torchrun."""
        self.is_held = False
        self.num_starts += 1
        self._steps_then = self.records.newest()
        words = ["--standalone", f"--nproc-per-node={NUM_RANKS}", "--max-restarts=3"]
        words += ["-m", "tests.storm.observed_train", str(self.plan.recipe)]
        words += [f"run.folder={self.runs}", f"run.name={self.plan.name}", *self.plan.words]
        own = {
            MARK: self.mark,
            "PYTHONFAULTHANDLER": "1",  # SIGABRT has every thread say where it is
            "STORM_START": str(self.num_starts),
            "STORM_RECORDS": str(self.records.folder),
            "STORM_PACE": str(self._pace),
        }
        with self._log(self.num_starts).open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *words],
                cwd=ROOT,
                env=environment() | (self.plan.variables or {}) | own,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def tend(self) -> None:
        """What the launcher does now and then: start again where it is needed."""
        if self.is_held or self.is_finished or self._process is None or self._process.poll() is None:
            return
        if not wait_until_gone(self.mark, GONE_SECONDS):
            raise StormError(f"{GONE_SECONDS:.0f} s after torchrun has ended there is {self.living()}")
        if self.status == "finished":
            self.is_finished = True
            return
        if self.records.newest() != self._steps_then:
            self._idle_starts = 0
        else:
            self._idle_starts += 1
        if self._idle_starts >= MOST_IDLE_STARTS:
            raise StormError(f"{self._idle_starts} starts in a row came to no step: {self.last_words()}")
        self.launch()

    def forgive(self) -> None:
        """A fault is coming: the starts before it are no sign of trouble."""
        self._idle_starts = 0

    @property
    def status(self) -> str:
        return str(read_status(self.folder).get("status", ""))

    @property
    def reason(self) -> str:
        return str(read_status(self.folder).get("reason", ""))

    @property
    def step(self) -> int:
        """Steps done in the newest attempt that came to any."""
        newest = self.records.newest()
        return 0 if newest is None else newest.last + 1

    def processes(self) -> list[Process]:
        return marked(self.mark)

    def living(self) -> str:
        """Its processes, for a sentence."""
        found = [f"{p.pid} (rank {p.rank}, child of {p.parent}: {p.words[:120]})" for p in self.processes()]
        return "; ".join(found) or "no process"

    @property
    def agent(self) -> Process | None:
        """torchrun itself, while it lives."""
        process = self._process
        if process is None or process.poll() is not None:
            return None
        return next((other for other in self.processes() if other.pid == process.pid), None)

    def ranks(self) -> list[Process]:
        """The ranks by number; fewer while they are being started."""
        agent = self._process
        found = [
            other
            for other in self.processes()
            if agent is not None and other.parent == agent.pid and other.rank is not None
        ]
        return sorted(found, key=lambda process: process.rank or 0)

    def workers(self) -> list[Process]:
        """Processes of the ranks that decode images."""
        found = self.processes()
        below = {process.pid for process in self.ranks()}
        while more := {p.pid for p in found if p.parent in below} - below:
            below |= more
        below -= {process.pid for process in self.ranks()} | {p.parent for p in found}
        return [p for p in found if p.pid in below and "resource_tracker" not in p.words]

    def wait_for_exit(self, seconds: float) -> bool:
        """Whether torchrun and its ranks have ended within that time."""
        until = time.monotonic() + seconds
        while self._process is not None and self._process.poll() is None:
            if time.monotonic() > until:
                return False
            time.sleep(POLL_SECONDS)
        return wait_until_gone(self.mark, max(1.0, until - time.monotonic()))

    def kill(self) -> None:
        """All of it at once, as when a machine is lost; nothing is left when this returns."""
        if (agent := self.agent) is not None:
            agent.send(signal.SIGKILL)
        kill_all(self.mark)
        if self._process is not None:
            self._process.wait()

    def abort(self) -> None:
        """End what hangs in such a way that its log tells where it hung; the ranks first."""
        before = self.living()
        agent, ranks = self.agent, self.ranks()
        for process in (*ranks, *([] if agent is None else [agent])):
            process.send(signal.SIGABRT)
            time.sleep(1.0)
        with self._log(self.num_starts).open("a") as log:
            log.write(f"\nthe storm gave up; there were {before}\n")
        self.kill()

    def run_to_the_end(self, seconds: float) -> None:
        """Tend it until it has finished.

        Raises:
            StormError: it takes longer.
        """
        until = time.monotonic() + seconds
        while not self.is_finished:
            self.tend()
            if time.monotonic() > until:
                raise StormError(f"not finished after {seconds:.0f} s: {self.last_words()}")
            time.sleep(POLL_SECONDS)

    def last_words(self) -> str:
        """The end of the newest log, in one line."""
        with contextlib.suppress(OSError):
            text = self._log(self.num_starts).read_text(errors="replace")
            lines = [line for line in text.splitlines() if re.match(r"error( \(rank|:)|warning:|  - ", line)]
            return " | ".join((lines or text.splitlines())[-3:])[-600:]
        return ""

    def first_step_seconds(self) -> Iterator[float]:
        """Of each start by the launcher or by torchrun, as the console says it."""
        for path in sorted(self.logs.glob("*.log")):
            for found in re.finditer(
                r"first step ([\d.]+) s after the launch", path.read_text(errors="replace")
            ):
                yield float(found[1])

    def _log(self, number: int) -> Path:
        return self.logs / f"start-{number:03d}.log"
