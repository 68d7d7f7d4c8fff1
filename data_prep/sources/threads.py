"""Look into many files of a source at once, with a progress bar: on S3 each look is a wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from data_prep.progress import progress_bar

THREADS = 16
Job = TypeVar("Job")
Found = TypeVar("Found", bound=Sized)


def in_threads(
    look: Callable[[Job], Found], jobs: Sequence[Job], description: str, images_each: float
) -> Iterator[Found]:
    """`look(job)` for each job, in their order; what it finds is counted as images.

    Args:
        images_each: how many images a job is expected to have; only the bar's total depends on it.
    """
    with (
        progress_bar(round(images_each * len(jobs)), description, enabled=len(jobs) > THREADS) as bar,
        ThreadPoolExecutor(THREADS, thread_name_prefix="listing") as pool,
    ):
        try:
            for found in pool.map(look, jobs):
                bar.update(len(found))
                yield found
            bar.total = bar.n
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # after an error or Ctrl-C
