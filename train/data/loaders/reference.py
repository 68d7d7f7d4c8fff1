"""The judge among the loaders: torch DataLoader, torchvision decoder, area interpolation, nothing clever."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.context
import os
import queue
import signal
from collections.abc import Generator, Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional

from data_prep.workers import begin_worker
from train.data import job_signals
from train.data.job_signals import kept_from_children
from train.data.loaders.base import Decoded, Loader, LoaderPlan, Request
from train.data.loaders.waiting import POLL_SECONDS, Prefetch, Watchdog
from train.data.resize import resize_area
from train.data.samples import Fetched, SampleFetcher

DECODING = -1  # where a worker is; else the sample that it reads
TIMED_OUT = "timed out after"
WORKER_DIED = (
    "a worker of the data loader (process {}) was killed: look for a lack of memory in the system's log"
)


class ReferenceLoader(Loader):
    """Decode in worker processes, or in a thread of this one with `num_workers` 0."""

    def __init__(self, plan: LoaderPlan) -> None:
        super().__init__(plan)
        self._sampler = _RequestSampler()
        self._data = _JpegDataset(self.fetcher)
        self._positions = torch.empty(0)  # where each worker is
        self._loader: DataLoader | None = None
        self._iterator: Any = None
        self._finalizer: Finalize | None = None
        self._watchdog = Watchdog(plan.timeout_seconds, self._where)

    def _decode(self, batches: list[np.ndarray], requests: Iterator[Request]) -> Generator[Decoded]:
        if self.plan.num_workers == 0:
            yield from self._decode_here(requests)
            return
        if self._loader is None:
            self._loader = self._build_loader()
        self._sampler.requests, self._sampler.num_requests = requests, len(batches)
        thread: Prefetch[Decoded] | None = None
        finished = False
        try:
            self._watchdog.get(self._begin_epoch)
            # In a thread: a batch lies in memory that its worker hands over, which one that is stopped does
            # not do, and the DataLoader's own timeout does not cover.
            thread = Prefetch(self._results(len(batches)), 1, "take batches from workers")
            while (item := self._watchdog.get(thread.poll)) is not None:
                yield item
            finished = True
        finally:
            if not finished:  # workers that are busy with an epoch nobody wants are of no use
                self._end_workers()
            if thread is not None:
                thread.close()

    def _decode_here(self, requests: Iterator[Request]) -> Generator[Decoded]:
        thread = Prefetch(self._data.decode_all(requests), 1, "reference loader")
        watchdog = Watchdog(self.plan.timeout_seconds, lambda: self.where("decoding"))
        try:
            while (item := watchdog.get(thread.poll)) is not None:
                yield item if not self.plan.pin_memory else _pinned(item)
        finally:
            thread.close()

    def _build_loader(self) -> DataLoader:
        self._positions = torch.full((self.plan.num_workers,), DECODING).share_memory_()
        return DataLoader(
            _JpegDataset(self.fetcher, self._positions),
            batch_size=None,  # a request is a whole batch
            sampler=self._sampler,
            num_workers=self.plan.num_workers,
            persistent_workers=True,
            prefetch_factor=2,
            timeout=POLL_SECONDS,
            worker_init_fn=_begin_worker,
            # Forked from this process, they would inherit locks that threads of other libraries hold, and
            # hang; so they are forked from a small process that has none.
            multiprocessing_context=_fork_server(),
            collate_fn=_as_it_is,  # type: ignore[arg-type]
        )

    def _begin_epoch(self, _seconds: float) -> None:
        """Start the workers, or wake those of the epoch before and wait until each has answered."""
        assert self._loader is not None
        if self._iterator is None:
            with kept_from_children():
                self._iterator = iter(self._loader)
            # Workers ignore SIGTERM, with which Python would end them, and wait, where nobody calls `close`.
            self._finalizer = Finalize(self, _kill, args=(self._workers(),), exitpriority=0)
            return
        if dead := [str(worker.pid) for worker in self._workers() if not worker.is_alive()]:
            raise RuntimeError(WORKER_DIED.format(", ".join(dead)))
        self._iterator._timeout = self.plan.timeout_seconds  # waking cannot be taken up again
        with _empty_after_timeout():
            iter(self._loader)
        self._iterator._timeout = POLL_SECONDS

    def _results(self, num_batches: int) -> Iterator[Decoded]:
        iterator, num_results = self._iterator, 0
        while num_results < num_batches and self._iterator is iterator:
            try:
                with _empty_after_timeout():
                    item = next(iterator)
            except queue.Empty:
                continue
            except (EOFError, ConnectionError) as error:  # while it handed over a batch
                raise RuntimeError(WORKER_DIED.format("one of several")) from error
            if isinstance(item, RuntimeError):
                raise item
            num_results += 1
            yield _pinned(item) if self.plan.pin_memory else item

    def _where(self) -> str:
        places = []
        for worker, process in enumerate(self._workers()):
            doing = self.reading_or("decoding", int(self._positions[worker]))
            stopped = " (stopped by a signal)" if _is_stopped(process.pid) else ""
            places.append(f"{doing} in process {process.pid}{stopped}")
        return "; ".join(places) or "starting its workers"

    def _workers(self) -> list[BaseProcess]:
        return list(getattr(self._iterator, "_workers", []))

    def _end_workers(self) -> None:
        """End the workers; a stopped one would keep this process from ending."""
        workers = self._workers()
        for worker in workers:
            if worker.is_alive() and _is_stopped(worker.pid):
                # Not killed: until `_shutdown_workers`, torch raises an error for a worker that was.
                os.kill(worker.pid, signal.SIGCONT)  # type: ignore[arg-type]
        if self._iterator is not None:
            self._iterator._shutdown_workers()
        for worker in workers:
            if worker.is_alive():
                worker.kill()
                worker.join()
        if self._finalizer is not None:
            self._finalizer.cancel()
        self._iterator = self._loader = self._finalizer = None
        self._positions = torch.empty(0)

    def close(self) -> None:
        self._end_epoch()
        self._end_workers()
        super().close()


def _fork_server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _kill(workers: list[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():  # else its number may be another process's by now
            worker.kill()


@contextlib.contextmanager
def _empty_after_timeout() -> Iterator[None]:
    """Where the DataLoader times out, raise what a `Watchdog` waits through."""
    try:
        yield
    except RuntimeError as error:
        if TIMED_OUT in str(error):  # the DataLoader's own words
            raise queue.Empty from None
        raise


def _is_stopped(pid: int | None) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def _begin_worker(_worker: int) -> None:
    # Torch's workers look after their parent; that is the fork server, which in turn lives as long as they.
    begin_worker()
    job_signals.ignore()


def _as_it_is(item: Decoded) -> Decoded:
    return item


def _pinned(item: Decoded) -> Decoded:
    return Decoded(item.images.pin_memory(), item.sample_ids, item.damaged, item.changed_shards)


class _RequestSampler(Sampler[Request]):
    """Hands the current epoch's requests to the workers, which keep no state of their own."""

    def __init__(self) -> None:
        self.requests: Iterator[Request] = iter(())
        self.num_requests = 0

    def __iter__(self) -> Iterator[Request]:
        return self.requests

    def __len__(self) -> int:
        return self.num_requests


class _JpegDataset(Dataset):
    def __init__(self, fetcher: SampleFetcher, positions: torch.Tensor | None = None) -> None:
        self._fetcher = fetcher
        self._positions = positions

    def __getitem__(self, request: Request) -> Decoded | RuntimeError:
        """A batch; or the error, as a value: torch would wrap what a worker raises in its traceback."""
        self._watch()
        try:
            return self._decode(request)
        except RuntimeError as error:
            return error

    def decode_all(self, requests: Iterator[Request]) -> Iterator[Decoded]:
        return map(self._decode, requests)

    def _decode(self, request: Request) -> Decoded:
        fetched = self._fetcher.fetch(request)
        pixels = [_pixels(jpeg) for jpeg in fetched.jpegs]
        while faults := {n: "it does not decode" for n, image in enumerate(pixels) if image is None}:
            # Only where checksums are not compared: what was prepared does decode.
            fetched = self._fetcher.mend(fetched, faults)
            pixels = [_pixels(jpeg) for jpeg in fetched.jpegs]
        return Decoded(
            _crop_resize_flip(pixels, fetched),
            fetched.request.sample_ids,
            fetched.damaged,
            fetched.changed_shards,
        )

    def _watch(self) -> None:
        """In a worker, write where it is to memory that the rank sees."""
        info = torch.utils.data.get_worker_info()
        if info is not None and self._positions is not None:
            self._fetcher.reader.report_to(self._positions.numpy()[info.id : info.id + 1])


def _pixels(jpeg: bytes) -> torch.Tensor | None:
    """uint8, shape (3, height, width), or None."""
    try:
        return decode_jpeg(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError:
        return None


def _crop_resize_flip(pixels: list[torch.Tensor | None], fetched: Fetched) -> torch.Tensor:
    request = fetched.request
    side = request.resolution
    images = torch.empty((len(pixels), side, side, 3), dtype=torch.uint8)
    for image, whole, box, flip in zip(images, pixels, request.boxes, request.flips, strict=True):
        assert whole is not None
        top, left, height, width = box.tolist()
        crop = functional.crop(whole, top, left, height, width)
        resized = resize_area(crop.permute(1, 2, 0), side)
        image.copy_(
            functional.horizontal_flip(resized.permute(2, 0, 1)).permute(1, 2, 0) if flip else resized
        )
    return images
