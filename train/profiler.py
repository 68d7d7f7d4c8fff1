"""Where a step goes: a trace by torch.profiler over some steps of a training, and a page about it.

torchrun --nproc-per-node=2 -m train configs/demo.yaml 'profile={steps: [10, 20]}'

Rank 0 writes `profile/trace.json.gz` (for https://ui.perfetto.dev), `profile/profile.md` and
`profile/profile.json` in the run's folder. The trace is the only source of the figures, so what the page says
can be looked up in it. Nothing that goes wrong here ends a training.

Example:
    >>> profiler = StepProfiler(recipe.profile, folder, ranks.rank, ranks.device)
    >>> for num_done, batch in enumerate(profiler.waiting(batches), start=1):
    ...     with profiler.part("forward"):
    ...         logits = model(batch.images)
    ...     if line := profiler.step(num_done):
    ...         console.say(line)
    >>> profiler.close()
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from data_prep.storage import write_atomically
from train.config import ProfileSection
from train.profile_page import PART_PREFIX, profile_page, read_trace, summarize

T = TypeVar("T")
Part = Literal["data", "augment", "forward", "backward", "update", "log"]
NO_PART = contextlib.nullcontext()
FAILED = "warning: the profiler failed ({reason}); the training goes on without it"


class StepProfiler:
    """Profiles the steps [first, end) of this start on rank 0; without a section it does nothing.

    Args:
        config: section `profile` of the recipe, or None.
        folder: of the run; the files go to `folder/profile`.
        device: where this rank computes; on CUDA the figures are of kernels, on CPU of operators.
    """

    def __init__(self, config: ProfileSection | None, folder: Path, rank: int, device: torch.device) -> None:
        self._config = config if rank == 0 else None
        self._folder = folder / "profile"
        self._device = device
        self._profile: torch.profiler.profile | None = None
        self._num_profiled = 0
        self._began = 0.0
        self._step_began = 0.0
        # Steps before the profiled ones, but for the first, which is never like the others.
        self._plain_began: float | None = None
        self._plain_seconds: float | None = None
        self._fault: str | None = None
        if self._config is not None and self._config.steps[0] == 0:
            self._fault = self._guarded(self._start)

    def part(self, name: Part) -> contextlib.AbstractContextManager[Any]:
        """Marks a part of the step; free of cost where nothing is being profiled."""
        if self._profile is None:
            return NO_PART
        return torch.profiler.record_function(PART_PREFIX + name)

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the wait for each is the part `data`."""
        iterator = iter(batches)
        while True:
            with self.part("data"):
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch

    def step(self, num_done: int) -> str | None:
        """Call at the end of every step.

        Args:
            num_done: steps that this start of the training has done, the one that just ended included.

        Returns:
            a line to say: the summary when the profile is written, or that it failed; None otherwise.
        """
        if self._config is None:
            return None
        first, end = self._config.steps
        fault = self._fault
        if fault is None and self._profile is not None:
            self._num_profiled += 1
            if num_done >= end:
                return self.close()
            fault = self._guarded(self._profile.step)
        elif fault is None and num_done == first:
            if self._plain_began is not None:
                self._plain_seconds = (time.perf_counter() - self._plain_began) / (first - 1)
            fault = self._guarded(self._start)
        elif num_done == 1:
            self._plain_began = time.perf_counter()
        return self._give_up(fault) if fault else None

    def close(self) -> str | None:
        """Write what was profiled so far, where the training ended before the last step of the section."""
        if self._config is None or self._profile is None:
            return None
        line: list[str] = []
        fault = self._guarded(lambda: line.append(self._write()))
        self._config = self._profile = None
        return FAILED.format(reason=fault) if fault else line[0]

    def _start(self) -> None:
        # Kineto tells of its start and stop, and of a missing GPU, as errors.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            # What was queued before belongs to steps before.
            torch.cuda.synchronize(self._device)
        profile = torch.profiler.profile(activities=activities, record_shapes=False, with_stack=False)
        profile.start()
        self._profile = profile
        self._began = time.perf_counter()

    def _write(self) -> str:
        """Stop, write the three files, and return the summary's line."""
        assert self._profile is not None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        wall_seconds = time.perf_counter() - self._began
        self._profile.stop()
        if self._num_profiled == 0:
            return "the training ended before a whole step was profiled: there is no profile"
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / "trace.json.gz"
        self._profile.export_chrome_trace(str(trace))
        summary = summarize(
            read_trace(trace),
            num_steps=self._num_profiled,
            wall_seconds=wall_seconds,
            on_cuda=self._device.type == "cuda",
            plain_step_seconds=self._plain_seconds,
        )
        assert self._config is not None
        first = self._config.steps[0]
        summary["steps"] = [first, first + self._num_profiled]
        write_atomically(self._folder / "profile.json", (json.dumps(summary, indent=1) + "\n").encode())
        write_atomically(self._folder / "profile.md", profile_page(summary).encode())
        shares = ", ".join(
            f"{name} {summary['parts'][name]['share']:.0%}" for name in ("forward", "backward", "update")
        )
        return (
            f"profile of {self._num_profiled} steps: {summary['step_seconds'] * 1000:.1f} ms a step, "
            f"{shares}, overhead {summary['overhead']:.0%}; {self._folder / 'profile.md'}"
        )

    def _guarded(self, action: Callable[[], object]) -> str | None:
        """Do it; the first line of what went wrong, or None."""
        try:
            action()
        except Exception as error:  # whatever it is: a profile is worth less than the training
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
        return None

    def _give_up(self, fault: str) -> str:
        profile, self._config, self._profile = self._profile, None, None
        if profile is not None:
            self._guarded(profile.stop)
        return FAILED.format(reason=fault)
