"""When the next checkpoint within an epoch is due."""

from __future__ import annotations

import time

from train.config import CheckpointSection


class Cadence:
    """When the next checkpoint within an epoch is due; the primary rank's clock decides."""

    def __init__(self, config: CheckpointSection) -> None:
        self._seconds = None if config.every_minutes is None else 60 * config.every_minutes
        self._steps = config.every_steps
        self._last = time.monotonic()

    def restart(self) -> None:
        """A checkpoint was made just now."""
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """By time; known to this rank only."""
        return self._seconds is not None and time.monotonic() - self._last >= self._seconds

    def is_step(self, step: int) -> bool:
        """By steps; the same on all ranks."""
        return self._steps is not None and step % self._steps == 0
