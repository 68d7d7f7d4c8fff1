"""One trial: a training process, watched through its run folder and stopped by signals.

The sweep knows of the training what everybody can know: `metrics.jsonl` while it runs, `status.json` and
`summary.json` at its end.

Example:
    >>> outcome = run_trial(start, "top1", lambda epoch, value: epoch >= 2 and value < 0.1, StopRequest())
    >>> outcome.state, outcome.value
    ('pruned', 0.0712)
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from data_prep.plain_json import parse_json, read_json
from data_prep.storage import FolderInUse, exclusive_lock
from train.run_folder import METRICS_NAME, STATUS_NAME, SUMMARY_NAME, is_finished, read_status

POLL_SECONDS = 0.2
# torchrun itself kills its ranks 30 s after a SIGTERM; a single process may take longer to save.
STOP_SECONDS = 120.0
LOCK_SECONDS = 2.0

State = Literal["complete", "pruned", "failed", "stopped"]


@dataclass(frozen=True)
class TrialStart:
    """What to start: a trial of a sweep, or a fold of a cross-validation.

    Attributes:
        folder: the training's run folder. log: takes the output of the process.
        environment: variables set for it besides our own.
    """

    recipe: Path
    folder: Path
    overrides: list[str]
    log: Path
    num_ranks: int = 1
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        own = [f"run.folder={self.folder.parent}", f"run.name={self.folder.name}"]
        return training_command([str(self.recipe), *self.overrides, *own], self.num_ranks)


def training_command(words: list[str], num_ranks: int) -> list[str]:
    """As a user would type it, on this interpreter."""
    if num_ranks == 1:
        return [sys.executable, "-m", "train", *words]
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    return [sys.executable, "-m", *launcher, "-m", "train", *words]


@dataclass(frozen=True)
class Outcome:
    """How a trial ended; `stopped` is one that will be taken up again."""

    state: State
    value: float | None = None
    reason: str = ""


class StopRequest:
    """SIGINT or SIGTERM to the sweep: the first asks, the second SIGINT does not wait."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.is_urgent = False

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.is_urgent = self.is_urgent or (self.signal is not None and number == signal.SIGINT)
        self.signal = self.signal or signal.Signals(number)


class ValidationRows:
    """New validation rows of a metrics file that is being written, (epoch, value) each."""

    def __init__(self, path: Path, metric: str) -> None:
        self._path = path
        self._metric = metric
        self._inode = -1
        self._offset = 0

    def read_new(self) -> list[tuple[int, float]]:
        """Whole lines since the last call; all again where the file was replaced (a resumed training)."""
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._inode, self._offset = inode, 0
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        rows = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):  # a line that a crash cut short
                rows.append(parse_json(line))
        return [
            (round(row["epoch"]), float(row[self._metric]))
            for row in rows
            if isinstance(row, dict)
            and row.get("split") == "val"
            and all(isinstance(row.get(key), int | float) for key in ("epoch", self._metric))
        ]


def run_trial(
    start: TrialStart, metric: str, should_prune: Callable[[int, float], bool], stop: StopRequest
) -> Outcome:
    """Train until the end, or until it is pruned or stopped; blocks.

    Args:
        should_prune: called once for each validation with (epochs done, value); True ends the trial.
        stop: looked at all the time.
    """
    if is_finished(start.folder):  # in the moment in which an earlier sweep was ended
        return _outcome(start, metric, None, 0)
    if read_status(start.folder):  # also of one that spent its budget: it may have a larger one now
        (start.folder / STATUS_NAME).unlink(missing_ok=True)  # what is there at the end must be of this start
    start.log.parent.mkdir(parents=True, exist_ok=True)
    with start.log.open("ab") as output:
        process = subprocess.Popen(
            start.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | start.environment,
            start_new_session=True,  # Ctrl-C is for the sweep, which then stops the trial in good order
        )
    try:
        asked = _watch(process, ValidationRows(start.folder / METRICS_NAME, metric), should_prune, stop)
    finally:
        _kill(process)
    return _outcome(start, metric, asked, process.returncode)


def wait_for_orphan(folder: Path, stop: StopRequest, say: Callable[[str], None]) -> None:
    """Where an earlier start was killed, its training may still be at work in `folder`."""
    said = False
    while folder.is_dir() and stop.signal is None:
        try:
            with exclusive_lock(folder):
                return
        except FolderInUse:
            if not said:
                say(f"{folder.name} is still in training, left over from a killed start: waiting for it")
                said = True
            time.sleep(LOCK_SECONDS)


def _watch(
    process: subprocess.Popen[bytes],
    rows: ValidationRows,
    should_prune: Callable[[int, float], bool],
    stop: StopRequest,
) -> State | None:
    """Until the process has ended; what it was asked to do, if anything."""
    asked: State | None = None
    deadline = float("inf")
    while process.poll() is None and time.monotonic() < deadline and not stop.is_urgent:
        if asked is None:
            if stop.signal is not None:
                asked = "stopped"
            # All of them: every row is to be reported, also behind one that is bad enough.
            elif True in [should_prune(epoch, value) for epoch, value in rows.read_new()]:
                asked = "pruned"
            if asked is not None:
                process.terminate()
                deadline = time.monotonic() + STOP_SECONDS
        time.sleep(POLL_SECONDS)
    if stop.signal is not None:
        return "stopped"  # also where it was too urgent to ask
    if asked is None:
        for epoch, value in rows.read_new():
            should_prune(epoch, value)  # too late to prune, but others are compared with it
    return asked


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End what is still there, ranks of a launcher included: those have sessions of their own."""
    if process.poll() is None:
        for pid in _family(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _family(pid: int) -> list[int]:
    """The process and all that it started, and those in turn; itself only where there is no /proc."""
    family = [pid]
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it may end while we read
            family += [member for child in tasks.read_text().split() for member in _family(int(child))]
    return family


def _outcome(start: TrialStart, metric: str, asked: State | None, code: int) -> Outcome:
    status = read_status(start.folder)
    rows = ValidationRows(start.folder / METRICS_NAME, metric).read_new()
    last = rows[-1][1] if rows else None
    reason = str(status.get("reason", ""))
    if status.get("status") == "finished":  # whatever it was asked: it was faster
        value = _summary(start.folder).get(f"final_{metric}", last)
        if value is None:
            return Outcome("failed", None, f"the training finished without a validation {metric}")
        return Outcome("complete", float(value))
    if asked is not None:
        return Outcome(asked, last, reason)
    if status.get("status") == "restart" and reason.startswith("SIG"):
        return Outcome("stopped", last, f"somebody else sent {reason} to the training")
    if status.get("status") == "restart":
        return Outcome("failed", last, f"stopped before its end: {reason}")
    return Outcome("failed", last, reason or _last_error(start.log) or _exit_sentence(code))


def _summary(folder: Path) -> dict[str, Any]:
    try:
        summary = read_json(folder / SUMMARY_NAME)
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def _last_error(log: Path) -> str:
    """The last `error: …` of the output, with what is indented below it."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    places = [number for number, line in enumerate(lines) if line.startswith("error")]
    if not places:
        return ""
    sentence = lines[places[-1]].partition(": ")[2]
    below = [line.strip(" -") for line in lines[places[-1] + 1 :] if line.startswith("  - ")]
    return " ".join([sentence, *below])


def _exit_sentence(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"the training was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"the training ended with exit code {code} and without a word"
