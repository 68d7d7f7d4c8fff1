"""Threads or processes that read and normalise samples; results come back in order, however many there are.

Memory: of finished images that wait for their turn about BUFFER_BYTES, and in each worker one decoded image.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from types import FrameType, TracebackType

from data_prep.manifest import ImageSettings
from data_prep.normalize import NormalizedImage, Rejected, normalize
from data_prep.sources import Sample
from data_prep.storage import is_s3

# Decoding, resizing and encoding leave the interpreter's lock, so threads do it as fast as processes, and
# neither have to be started nor pass their results on. With more of them, the lock would be the limit.
MAX_THREADS = 16
SAMPLES_PER_TASK = 16  # enough to hide the cost of passing a task, few enough to keep the bar moving
TASKS_IN_FLIGHT = 4  # a worker
BUFFER_BYTES = 256 << 20
UNIT_BLOCK = 2048  # samples, up to twice as many, reordered so that a row group is read once for all of them
UNIT_TASK = 128  # a row group of 100, as hubs have them, is one task; larger ones occupy several workers
REMOTE_READS = 16  # a worker, at once: a request to S3 waits tens of milliseconds


@dataclass(frozen=True, slots=True)
class Job:
    """A sample to normalise, with its statistics or without."""

    sample: Sample
    statistics: bool


class Workers:
    """A pool of threads, or of processes where there are many; a context manager."""

    def __init__(self, num_workers: int, settings: ImageSettings) -> None:
        self.num_workers = num_workers or cores_of_this_rank()
        self._settings = settings
        self._pool: Executor
        if self.num_workers <= MAX_THREADS:
            self._pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="prepare")
        else:
            self._pool = build_pool(self.num_workers)

    def normalized(self, jobs: Iterable[Job]) -> Iterator[NormalizedImage | str]:
        """For each job its image, or the reason why there is none; in order.

        Raises:
            RuntimeError: a worker died.
        """
        # A block is what is waited for as a whole: [(positions in the block, future of their results), …].
        pending: deque[tuple[int, list[tuple[list[int], Future]]]] = deque()
        num_tasks, mean_bytes = 0, 50_000.0
        try:
            for block in _blocks(jobs):
                tasks = _tasks(block)
                futures = []
                for places in tasks:
                    jobs_there = [block[place] for place in places]
                    with _signals_later():  # a worker that is half started would be waited for in vain
                        future = self._pool.submit(_normalize_task, jobs_there, self._settings)
                    futures.append((places, future))
                pending.append((len(block), futures))
                num_tasks += len(tasks)
                limit = BUFFER_BYTES / (mean_bytes * SAMPLES_PER_TASK)
                while num_tasks > max(self.num_workers, min(limit, TASKS_IN_FLIGHT * self.num_workers)):
                    size, futures = pending.popleft()
                    results = _gathered(size, futures)
                    num_tasks -= len(futures)
                    mean_bytes += 0.1 * (_mean_bytes(results) - mean_bytes)
                    yield from results
            while pending:
                yield from _gathered(*pending.popleft())
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker process was killed, most likely for memory: start again with fewer --workers"
            ) from None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def build_pool(num_workers: int) -> Executor:
    """A pool whose processes leave Ctrl-C to this one from their first moment on."""
    # The tracker first: it unblocks what is blocked while it starts.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        # Inherited by the fork server and all its children: Ctrl-C reaches the whole process group, and one
        # that is still importing would answer it with a traceback.
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return ProcessPoolExecutor(
        num_workers, mp_context=multiprocessing.get_context("forkserver"), initializer=begin_worker
    )


@contextlib.contextmanager
def _signals_later() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM for a moment; what has come is acted on at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if callable(handler):  # and not the system's default
            handlers[number] = handler
            signal.signal(number, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        for known, handler in handlers.items():
            signal.signal(known, handler)
    for known, frame in arrived:
        handlers[known](known, frame)


def keep_freed_memory() -> None:
    """Let this process keep the memory of images for the next ones; for a command's start, before any thread.

    glibc would give each image's pages back and fetch them anew, and hold a pool a thread: up to 10% slower,
    a third more memory (benchmarks/RESULTS.md). Elsewhere this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8
        for parameter, value in ((arena_max, 1), (trim_threshold, 1 << 28), (mmap_threshold, 1 << 28)):
            mallopt(parameter, value)


def cores_of_this_rank() -> int:
    """The cores this process may use, shared with the other ranks that torchrun started on the machine."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // local_ranks)


def begin_worker() -> None:
    """First call in a worker process: signals are the main process's business, and so is its end."""
    # Ctrl-C reaches the whole process group; only the parent shall act on it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """End this worker when the main process is gone, however it died."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _blocks(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    block: list[Job] = []
    units: set[object] = set()
    for job in jobs:
        unit = job.sample.blob.unit
        # Samples that are read in units come in large blocks, which tasks then take apart by unit. A block
        # goes on while units that it has begun go on: so it comes to end where the order's windows end.
        if unit is None or not block or block[0].sample.blob.unit is None:
            full = len(block) >= SAMPLES_PER_TASK
        else:
            full = len(block) >= 2 * UNIT_BLOCK or (len(block) >= UNIT_BLOCK and unit not in units)
        if full:
            yield block
            block, units = [], set()
        block.append(job)
        units.add(unit)
    if block:
        yield block


def _tasks(block: list[Job]) -> list[list[int]]:
    """Positions in the block, task by task."""
    by_unit: dict[object, list[int]] = {}
    for position, job in enumerate(block):
        by_unit.setdefault(job.sample.blob.unit, []).append(position)
    return [
        places[start : start + UNIT_TASK]
        for places in by_unit.values()
        for start in range(0, len(places), UNIT_TASK)
    ]


def _gathered(size: int, futures: list[tuple[list[int], Future]]) -> list[NormalizedImage | str]:
    results: list[NormalizedImage | str] = [""] * size
    for places, future in futures:
        for place, result in zip(places, future.result(), strict=True):
            results[place] = result
    return results


def _mean_bytes(results: list[NormalizedImage | str]) -> float:
    return sum(len(r.jpeg) for r in results if isinstance(r, NormalizedImage)) / len(results) + 1


def _normalize_task(jobs: list[Job], settings: ImageSettings) -> list[NormalizedImage | str]:
    blob = jobs[0].sample.blob
    # A unit is fetched once, by whoever asks first; what stands alone, many at once.
    if blob.unit is None and is_s3(getattr(blob, "location", None) or ""):
        with ThreadPoolExecutor(REMOTE_READS) as pool:
            contents: list[bytes | str] = list(pool.map(lambda job: _read(job.sample), jobs))
    else:
        contents = []
    results: list[NormalizedImage | str] = []
    for position, job in enumerate(jobs):
        content = contents[position] if contents else _read(job.sample)
        if isinstance(content, str):
            results.append(content)
            continue
        try:
            results.append(normalize(content, settings, job.statistics))
        except Rejected as error:
            results.append(str(error))
    return results


def _read(sample: Sample) -> bytes | str:
    """The bytes of a sample, or why they cannot be had; an S3 that fails for good ends the job instead."""
    try:
        return sample.read()
    except OSError as error:
        return f"cannot be read: {error.strerror or 'not found'}"
    except ValueError as error:  # a blob's own reason
        return str(error)
