"""Finding the processes of a storm: by a mark in their environment, whoever their parent is by now."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MARK = "STORM_MARK"
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Process:
    """One that lives, or is stopped."""

    pid: int
    parent: int
    words: str  # its command line
    environment: dict[str, str]

    @property
    def rank(self) -> int | None:
        return int(self.environment["RANK"]) if "RANK" in self.environment else None

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def marked(mark: str) -> list[Process]:
    """All processes of a mark; those that have ended and only wait to be reaped have none."""
    return list(_marked(mark))


def _marked(mark: str) -> Iterator[Process]:
    wanted = f"{MARK}={mark}"
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            if wanted not in variables:
                continue
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            words = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:  # it has just ended
            continue
        environment = dict(line.split("=", 1) for line in variables if "=" in line)
        yield Process(int(folder.name), int(status[1]), words, environment)


def kill_all(mark: str, seconds: float = 30.0) -> None:
    """SIGKILL all of a mark until there is none."""
    until = time.monotonic() + seconds
    while found := marked(mark):
        for process in found:
            process.send(signal.SIGKILL)
        if time.monotonic() > until:
            raise RuntimeError(f"processes {[process.pid for process in found]} do not end")
        time.sleep(POLL_SECONDS)


def wait_until_gone(mark: str, seconds: float) -> bool:
    """Whether all of a mark have ended by themselves within that time."""
    until = time.monotonic() + seconds
    while marked(mark):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
