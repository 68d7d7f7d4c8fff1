"""A command with somebody beside it: output in a log, stopped when there is a reason, never left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.config.credentials import redact

TAIL_BYTES = 64 << 10
KILL_SECONDS = 20.0  # between SIGKILL and giving up on a process that the kernel keeps


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code, negative for a signal.
        stopped_for: why it was asked to stop, None where it ended by itself.
        last_words: an error line of its log, or the last line.
    """

    code: int
    stopped_for: str | None
    last_words: str


def supervise(
    command: Sequence[str],
    log: Path,
    *,
    folder: Path,
    environment: Mapping[str, str],
    stop_for: Callable[[], str | None],
    poll_seconds: float,
    stop_seconds: float,
    timeout_seconds: float = float("inf"),
) -> Ended:
    """Run a command until it ends, or until `stop_for` gives a reason: then SIGTERM, and SIGKILL to the rest.

    Args:
        log: its output is appended there.
        stop_seconds: between SIGTERM and SIGKILL.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        begin = output.tell()
        output.write(f"$ {redact(' '.join(command))}\n".encode())
        output.flush()
        try:
            process = subprocess.Popen(
                [*_ends_with_us(), *command],
                cwd=folder,
                env=dict(environment) | {"PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Ended(127, None, f"{command[0]} cannot be started: {error.strerror}")
    reason, stop_at, end_at = None, None, time.monotonic() + timeout_seconds
    try:
        while process.poll() is None:
            now = time.monotonic()
            if reason is None:
                reason = stop_for() or ("timeout" if now > end_at else None)
                if reason is not None:
                    stop_at = now + stop_seconds
                    with contextlib.suppress(ProcessLookupError):
                        process.send_signal(signal.SIGTERM)
            elif stop_at is not None and now > stop_at:
                break
            time.sleep(poll_seconds)
    finally:
        _kill_group(process)
    return Ended(process.returncode if process.returncode is not None else -9, reason, last_words(log, begin))


def last_words(log: Path, begin: int = 0) -> str:
    """The last line that tells of an error, else the last one at all; from the byte `begin` on."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(begin, size - TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("$ ")]
    # As our commands say it; torchrun adds a table with lines such as "error_file: <N/A>".
    errors = [line for line in lines if line.startswith(("error:", "error ("))]
    words = (errors or lines or [""])[-1]
    return redact("".join(letter for letter in words if letter.isprintable()))[:300]


def _ends_with_us() -> list[str]:
    """Should the agent be killed, its training is asked to save and leave; nobody would stop it otherwise."""
    setpriv = shutil.which("setpriv")
    return [] if setpriv is None else [setpriv, "--pdeathsig", "TERM", "--"]


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # ranks that outlived their launcher, too
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILL_SECONDS)
