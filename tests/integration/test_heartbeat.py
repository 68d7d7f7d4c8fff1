"""Ranks that hang, and ranks whose launcher died: real processes under torchrun."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.integration.launch import environment, read_json
from train.preemption.heartbeat import watched_ranks

HANG_SECONDS = 3
SECONDS = 90  # until a test is taken for one that hangs
FORWARD_USR1 = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


class Job:
    """`torchrun` with ranks that reduce and beat; see beating_rank."""

    def __init__(
        self, folder: Path, options: list[str], seconds: float, num_ranks: int, linger: float
    ) -> None:
        self.folder = folder
        self.output = folder / "output.txt"
        words = ["--standalone", f"--nproc-per-node={num_ranks}", *options]
        script = ["-m", "tests.integration.beating_rank", str(folder), str(HANG_SECONDS), str(seconds)]
        with self.output.open("w") as output:
            self.agent = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *words, *script],
                cwd=ROOT,
                env=environment() | {"LINGER": str(linger)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < until, self.output.read_text()
            time.sleep(0.05)

    def file(self, rank: int, ending: str, start: int = 0) -> Path:
        return self.folder / f"{start}-{rank}.{ending}"

    def step(self, start: int = 0) -> int:
        try:
            return int(self.file(0, "step", start).read_text())
        except (OSError, ValueError):
            return 0

    def wait_for_steps(self, num_steps: int = 20, start: int = 0) -> None:
        wanted = self.step(start) + num_steps
        self.wait_for(lambda: self.step(start) >= wanted)

    def pid(self, rank: int, start: int = 0) -> int:
        return int(self.file(rank, "pid", start).read_text())

    def wait_for_status(self) -> str:
        self.wait_for((self.folder / "status.json").is_file)
        status = read_json(self.folder / "status.json")
        assert status["status"] == "restart"
        return status["reason"]

    def end(self) -> None:
        for pid in [self.agent.pid, *(int(path.read_text()) for path in self.folder.glob("*.pid"))]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.agent.wait()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs = []

    def start(*options: str, seconds: float = 300, num_ranks: int = 2, linger: float = 0) -> Job:
        jobs.append(Job(tmp_path, list(options), seconds, num_ranks, linger))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end()


def test_a_stopped_rank_ends_the_job_and_a_lost_launcher_too(launch: Callable[..., Job]) -> None:
    job = launch("--max-restarts=1")
    job.wait_for_steps()
    # A pause of all is nobody's fault; not even for the one that pauses last and comes back first.
    for number, order in ((signal.SIGSTOP, (1, 0)), (signal.SIGCONT, (0, 1))):
        for rank in order:
            os.kill(job.pid(rank), number)
            time.sleep(0.15 * HANG_SECONDS)
        time.sleep(1.2 * HANG_SECONDS)
    job.wait_for_steps()
    assert not (job.folder / "status.json").exists()

    os.kill(job.pid(1), signal.SIGSTOP)
    assert job.wait_for_status().startswith(
        f"rank 1 (process {job.pid(1)} on {os.uname().nodename}) has given no sign of life for "
        f"{HANG_SECONDS} s: its process was stopped by a signal; last steps: "
    )
    os.kill(job.pid(1), signal.SIGKILL)  # torchrun would do that after 30 s
    (job.folder / "status.json").unlink()
    job.wait_for_steps(start=1)  # the next start of the group is judged by its own signs of life

    job.agent.kill()
    job.wait_for(lambda: all(job.file(rank, "end", start=1).exists() for rank in range(2)))
    assert job.file(0, "end", start=1).read_text() == "SIGTERM"
    assert not (job.folder / "status.json").exists()


@pytest.mark.long
def test_the_primary_may_be_stopped_too(launch: Callable[..., Job]) -> None:
    job = launch(num_ranks=3)
    job.wait_for_steps()
    os.kill(job.pid(0), signal.SIGSTOP)
    assert job.wait_for_status().startswith(f"rank 0 (process {job.pid(0)} on ")
    job.agent.wait(SECONDS)  # torchrun ends the stopped one
    assert job.agent.returncode == 1
    assert job.output.read_text().count("has given no sign of life") <= 2


@pytest.mark.long
def test_a_rendezvous_that_does_not_answer(launch: Callable[..., Job]) -> None:
    job = launch()
    job.wait_for_steps()
    os.kill(job.agent.pid, signal.SIGSTOP)  # as if its machine had vanished: connections stay open
    reason = job.wait_for_status()
    assert reason.startswith("the rendezvous at ") and f"not answered for {HANG_SECONDS} s" in reason


@pytest.mark.long
def test_a_calm_run_with_a_rank_that_ends_late(launch: Callable[..., Job]) -> None:
    job = launch("--rdzv-backend=c10d", seconds=4 * HANG_SECONDS, num_ranks=3, linger=3 * HANG_SECONDS)
    job.agent.wait(SECONDS)
    output = job.output.read_text()
    assert job.agent.returncode == 0, output
    assert "no sign of life" not in output and "rendezvous at" not in output


@pytest.mark.long
def test_a_dead_rank_is_still_torchruns_business(launch: Callable[..., Job]) -> None:
    job = launch()
    job.wait_for_steps()
    os.kill(job.pid(1), signal.SIGKILL)
    job.agent.wait(SECONDS)
    assert job.agent.returncode == 1 and not (job.folder / "status.json").exists()


@pytest.mark.long
@pytest.mark.parametrize("options", [[FORWARD_USR1], []])
def test_sigusr1_to_torchrun_reaches_the_ranks(launch: Callable[..., Job], options: list[str]) -> None:
    job = launch(*options)
    job.wait_for_steps()
    job.agent.send_signal(signal.SIGUSR1)
    job.wait_for(lambda: all(job.file(rank, "end").exists() for rank in range(2)))
    # Where torchrun was not told of it, it dies, and so the ranks get their SIGTERM.
    assert job.file(1, "end").read_text() == ("SIGUSR1" if options else "SIGTERM")


def test_large_jobs_watch_each_rank_by_few() -> None:
    assert watched_ranks(0, 1) == []
    assert watched_ranks(1, 3) == [0, 2]
    watched = [watched_ranks(rank, 1024) for rank in range(1024)]
    assert max(map(len, watched)) <= 3
    assert {rank for ranks in watched for rank in ranks} == set(range(1024))
