"""`python -m train` as the storm starts it: what each rank sees is written down, and some losses are NaN.

    torchrun --nproc-per-node=2 -m tests.storm.observed_train RECIPE section.key=value …

Environment: STORM_RECORDS (a folder; each rank of each start appends a line of JSON a step to a file of its
own there), STORM_START (number of this start), STORM_NAN (`{"1": [7, 23]}`: rank → steps whose loss is NaN,
the same in every start), STORM_PACE (a file with the seconds to wait after each step, so that faults hit).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

from train import loop
from train.__main__ import _entry
from train.loss import TrainingLoss


class Observer:
    """Stands around the steps of this rank."""

    def __init__(self) -> None:
        rank, restart = os.environ["RANK"], os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        name = f"{int(os.environ['STORM_START']):04d}-{int(restart):02d}-{rank}.jsonl"
        self._path = Path(os.environ["STORM_RECORDS"]) / name
        self._file: TextIO | None = None
        self._pace = Path(os.environ["STORM_PACE"])
        self._nan_steps = frozenset(json.loads(os.environ.get("STORM_NAN", "{}")).get(rank, ()))
        self._step: int | None = None  # the one that is being taken
        self._plain_step, self._plain_forward = loop.train_step, TrainingLoss.forward

    def install(self) -> None:
        def train_step(run: Any, micro_batches: list[Any]) -> None:
            self._take_step(run, micro_batches)

        def forward(loss: TrainingLoss, *arguments: Any) -> Any:
            value, logits = self._plain_forward(loss, *arguments)
            return (value * float("nan") if self._step in self._nan_steps else value), logits

        loop.train_step = train_step
        TrainingLoss.forward = forward  # type: ignore[method-assign,assignment]

    def _take_step(self, run: Any, micro_batches: list[Any]) -> None:
        self._step = run.progress.step
        self._plain_step(run, micro_batches)
        ids = [number for batch in micro_batches for number in batch.sample_ids.tolist()]
        if self._file is None:
            self._file = self._path.open("a", buffering=1)
        self._file.write(json.dumps({"step": self._step, "ids": ids}) + "\n")
        self._step = None
        time.sleep(float(self._pace.read_text()))


if __name__ == "__main__":
    Observer().install()
    _entry()
