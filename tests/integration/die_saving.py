"""A nursery of processes that save checkpoints and kill themselves at a chosen point of it.

    python -m tests.integration.die_saving        # a line of JSON in, a line out, for each child

Each write, flush to the disk, rename, deletion and copy counts as one operation with three points: before it,
in the middle (half of the bytes are written) and after it; point p is that of operation p // 3. There the
child kills itself with SIGKILL. A child goes on from what is in its folder, as a training does, and answers
with the steps that it was told to be on the disk. The nursery has imported everything once, so that a child
takes milliseconds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from train.checkpoint import CheckpointStore, CheckpointWriter, files, load_checkpoint
from train.tracking.metrics_file import MetricsFile

STEPS = 8
TOP1 = [0.3, 0.5, 0.4, 0.5, 0.7, 0.6, 0.65, 0.8]  # at the end of each step


class DeathClock:
    """Counts operations, and dies at a point of one."""

    def __init__(self, point: int | None) -> None:
        self._point = point
        self._next = 0
        self._mutex = threading.Lock()

    def at(self, point: int) -> None:
        if point == self._point:
            os.kill(os.getpid(), signal.SIGKILL)

    def begin(self) -> int:
        with self._mutex:
            first = self._next
            self._next += 3
        self.at(first)
        return first

    @property
    def num_points(self) -> int:
        return self._next

    def around(
        self, action: Callable[..., Any], half: Callable[..., Any] | None = None
    ) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            first = self.begin()
            if first + 1 == self._point:
                if half is not None:
                    half(*arguments, **options)
                self.at(first + 1)
            result = action(*arguments, **options)
            self.at(first + 2)
            return result

        return act


def _half_copy(source: Path, target: Path) -> None:
    content = Path(source).read_bytes()
    Path(target).write_bytes(content[: len(content) // 2])


def _half_weights(tensors: Any, path: Path, metadata: Any = None) -> None:
    Path(path).write_bytes(b"half of it")


def _half_write(file: Any, content: Any) -> None:
    file._file.write(bytes(content)[: len(content) // 2])
    file._file.flush()


def install(clock: DeathClock) -> None:
    os.fsync = clock.around(os.fsync)
    os.replace = clock.around(os.replace)
    os.unlink = clock.around(os.unlink)
    shutil.copyfile = clock.around(shutil.copyfile, _half_copy)
    safetensors.torch.save_file = clock.around(safetensors.torch.save_file, _half_weights)
    files.HashedFile.write = clock.around(files.HashedFile.write, _half_write)  # type: ignore[method-assign]


def state_of(step: int, top1: float, num_rows: int) -> dict[str, Any]:
    weights = torch.full((64, 8), float(step))
    return {"version": 1, "step": step, "best_top1": top1, "model": {"weight": weights}, "rows": num_rows}


def save_all(folder: Path, clock: DeathClock, answer: Callable[[dict[str, Any]], None]) -> None:
    """As a training does: go on from the newest one, a row and two saves a step, told when they are there."""
    install(clock)
    said: list[str] = []
    checkpoints = CheckpointStore(folder / "checkpoints")
    latest = checkpoints.latest(said.append)
    state = None if latest is None else load_checkpoint(checkpoints.folder / latest.name)
    step, best = (0, -1.0) if state is None else (state["step"], state["best_top1"])
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.cut_to(0 if state is None else state["rows"])
    answer({"from": step, "rows": metrics.num_rows, "said": said})
    writer = CheckpointWriter(checkpoints, 2, lambda line: None, metrics.sync)
    while step < STEPS:
        if metrics.num_rows == 2 * step:  # else this start goes on from the middle of the step
            metrics.append({"step": step + 1, "split": "train"})
            writer.submit(state_of(step, best, metrics.num_rows), step, False)
            writer.finish(20)
            answer({"saved": step, "best": best})
        is_best = TOP1[step] > best
        best = max(best, TOP1[step])
        step += 1
        metrics.append({"step": step, "split": "val"})
        writer.submit(state_of(step, best, metrics.num_rows), step, is_best)
        writer.finish(20)
        answer({"saved": step, "best": best})
    writer.finish(20)  # a start that finds everything done still tidies up
    answer({"points": clock.num_points})


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            Path(order["folder"], "checkpoints").mkdir(exist_ok=True)

            def answer(content: dict[str, Any], end: int = writing) -> None:
                os.write(end, (json.dumps(content) + "\n").encode())

            try:
                save_all(Path(order["folder"]), DeathClock(order.get("point")), answer)
            except BaseException as error:
                answer({"error": repr(error)})
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, encoding="utf-8") as answers:
            content = [json.loads(answer) for answer in answers.read().splitlines()]
        _, status = os.waitpid(child, 0)
        print(json.dumps({"killed": os.WIFSIGNALED(status), "answers": content}), flush=True)


if __name__ == "__main__":
    main()
