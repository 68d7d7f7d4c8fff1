"""TensorBoard event files in `runs/<name>/tensorboard`: the rows of metrics.jsonl as curves.

    tensorboard --logdir runs

A thread of its own writes them, so that no disk makes the training wait; metrics.jsonl stays the record. At
each start the files are brought to where it stands. `written.txt` beside them lists the rows that they hold:
from the first one on that is another in metrics.jsonl, or is missing there or here (another machine went on
with the run in between, TensorBoard was off for a while), what they hold is purged and written again.

Example:
    >>> curves = TensorBoardWriter(folder, rows=read_metrics(folder / "metrics.jsonl"), step=120)
    >>> curves.add({"step": 140, "split": "val", "loss": 0.7, "top1": 0.8, "time": 1.8e9})
    >>> curves.close()
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import queue
import re
import threading
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

from data_prep.storage import write_atomically

FOLDER_NAME = "tensorboard"
WRITTEN_NAME = "written.txt"  # a line for each row in the event files: its step, and a digest of it
RESULTS = ("loss", "top1", "top5")  # of each split; every other number of a row is the training's own
NOT_DRAWN = ("step", "epoch", "split", "time")
CLOSE_SECONDS = 5.0


def require_tensorboard() -> None:
    """Raises ValueError where the package is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            'tracking.tensorboard needs TensorBoard: pip install -e ".[tensorboard]" (or pip install '
            "tensorboard), or set it to false"
        )


def scalars(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and values of a row's curves: `train/loss`, `val_224/top1` of a view, `learning_rate`.

    A validation's rate, dollars and the like are those of the training rows around it, and are left out.
    """
    split = str(row.get("split"))
    for key, value in row.items():
        if key in NOT_DRAWN or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if key in RESULTS:
            yield f"{split.replace(':', '_')}/{key}", float(value)
        elif split == "train":
            yield key, float(value)


class TensorBoardWriter:
    """Event files of one run; no method waits for a disk, but `close` for a moment.

    Args:
        folder: of the run.
        rows: of metrics.jsonl, as far as this start goes on with them.
        step: that the run goes on from; 0 begins anew.
    """

    def __init__(
        self, folder: Path, rows: list[dict[str, Any]], step: int, say: Callable[[str], Any] = print
    ) -> None:
        self._folder, self._say = folder / FOLDER_NAME, say
        self._rows, self._step = list(rows), step
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name="tensorboard", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no thread is left for us
            self._give_up(error)

    def add(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl."""
        if not self._has_failed:
            self._queue.put(row)

    def close(self, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Let what is under way get to the disk."""
        self._queue.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout_seconds)

    def _work(self) -> None:
        try:
            self._write_all()
        except Exception as error:  # a full disk, a broken installation: the curves are not worth a run
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._has_failed = True
        reason = str(error).split("\n")[0][:150] or type(error).__name__
        self._say(
            f"warning: TensorBoard gets no more rows ({reason}); metrics.jsonl has them all: delete "
            f"{self._folder}, and the next start writes it anew"
        )

    def _write_all(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        step = self._first_step()
        path = self._folder / WRITTEN_NAME
        # Readers forget everything from this step on that stands in earlier files.
        writer = SummaryWriter(str(self._folder), purge_step=step)
        kept = [row for row in self._rows if _step_of(row) < step]
        write_atomically(path, "".join(map(_line, kept)).encode())
        with contextlib.closing(writer), path.open("a", encoding="utf-8") as written:
            # Of the step itself some rows may be there, and others not: a validation follows on its last row.
            self._write(writer, written, [row for row in self._rows if _step_of(row) >= step])
            while (next_row := self._queue.get()) is not None:
                self._write(writer, written, [next_row])  # rows are seldom, and a run may be killed

    def _first_step(self) -> int:
        """The step from which on rows are to be written: up to it the files hold what metrics.jsonl does."""
        path = self._folder / WRITTEN_NAME
        if not path.is_file() or not any(self._folder.glob("events.out.tfevents.*")):
            return 0
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        pairs = zip_longest(map(_line, self._rows), lines, fillvalue="")
        differing = next((pair for pair in pairs if pair[0] != pair[1]), ())
        steps = [int(line.split()[0]) for line in differing if re.match(r"[0-9]{1,18} ", line)]
        return max(0, min([self._step, *steps]))

    def _write(self, writer: Any, written: TextIO, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            for name, value in scalars(row):
                writer.add_scalar(name, value, row.get("step"), walltime=row.get("time"))
        writer.flush()
        written.write("".join(map(_line, rows)))  # after the rows themselves: it never lists too much
        written.flush()


def _step_of(row: dict[str, Any]) -> int:
    return int(row.get("step", 0))


def _line(row: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]
    return f"{_step_of(row)} {digest}\n"
