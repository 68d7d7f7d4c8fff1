"""Images a second, and the share of the time that was spent waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


class Throughput:
    """Clock of the training loop; counts are those of this rank, the reported speed is global.

    Example:
        >>> clock = Throughput(world_size=2)
        >>> for batch in clock.waiting(batches): clock.count(len(batch))
        >>> clock.images_per_second, clock.data_wait_fraction
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self.reset()

    def reset(self) -> None:
        """Begin a new window."""
        self._begin = time.perf_counter()
        self._waited = 0.0
        self._images = 0

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """Pass `batches` on, timing how long each takes to come."""
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - begin
            yield batch

    def count(self, num_images: int) -> None:
        self._images += num_images

    @property
    def images(self) -> int:
        """Images of the window over all ranks."""
        return self._images * self._world_size

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    @property
    def images_per_second(self) -> float:
        return self.images / max(self.seconds, 1e-9)

    @property
    def data_wait_fraction(self) -> float:
        return self._waited / max(self.seconds, 1e-9)
