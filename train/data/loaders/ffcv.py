"""FFCV 1.0.2 on our `.beton`, with our order, our crops and our decoding.

FFCV's own crops come from an unseeded generator, and its decoders neither check bytes nor look at the
decoder's return code. So the order is ours (a `TraversalOrder`), and so is the operation that decodes: FFCV's
thread calls it with a batch, it takes the batch's bytes, read and checked, and decodes, crops, resizes and
mirrors them in compiled threads, with the JPEG library that FFCV is linked to.

Unlike FFCV's own, that decoding is accurate (libjpeg's fast DCT is one level too dark on average), so images
are those of the reference loader but for rounding; and resizing by area takes a third of OpenCV's time.
Memory: one decoded image a thread, whatever the batch (FFCV's decoders keep one a sample and batch ahead).
Another resolution needs no compilation.
"""

from __future__ import annotations

import queue
import weakref
from collections.abc import Callable, Generator, Iterator
from ctypes import c_int, c_void_p, cast
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.libffcv import lib
from ffcv.loader import Loader as StockLoader
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.pipeline_spec import PipelineSpec
from ffcv.pipeline.state import State
from ffcv.traversal_order.base import TraversalOrder

from data_prep.storage import LocalFolder
from data_prep.verify import beton_fault
from train.data.compiled_resize import decode_crop_resize_flip, num_threads
from train.data.loaders.base import Decoded, Loader, LoaderPlan, Request
from train.data.loaders.threads import torch_threads_kept
from train.data.loaders.waiting import Prefetch, Watchdog
from train.data.samples import Fetched, SampleFetcher

BATCHES_AHEAD = 2
FETCHED_AHEAD = 2  # batches whose bytes wait for a decoder

# Of turbojpeg.h, whose functions FFCV's library brings with it; compiled code calls these by their addresses.
FUNCTIONS = np.array([cast(f, c_void_p).value for f in (lib.tjDecompress2, lib.tjGetErrorCode)], np.int64)
lib.tjInitDecompress.argtypes, lib.tjInitDecompress.restype = [], c_void_p
lib.tjDestroy.argtypes, lib.tjDestroy.restype = [c_void_p], c_int


class FfcvLoader(Loader):
    """Decode in FFCV's thread and its compiled loop, in this process."""

    def __init__(self, plan: LoaderPlan) -> None:
        super().__init__(plan)
        if fault := beton_fault(LocalFolder(self.shards[0].parent), self.shards[0].name, self.index):
            raise ValueError(fault)
        self._order = _GivenOrder()
        # FFCV takes 0 for "all cores"; numba has no more threads than this.
        num_workers = num_threads(plan.num_workers)
        self._operation = _DecodeCropResizeFlip(
            self.fetcher, num_workers, plan.pin_memory, is_strict=plan.check_bytes == "never"
        )
        # Now rather than before the first epoch: it reads tables of the file, which may be damaged by then.
        self._stock: StockLoader | None = self._build_stock(num_workers)
        self._iterator: Any = None  # FFCV's EpochIterator, a thread
        self._watchdog = Watchdog(plan.timeout_seconds, lambda: self.where(self._operation.doing))

    def _build_stock(self, num_workers: int) -> StockLoader:
        decoded = PipelineSpec("image", decoder=_TakeIds(), transforms=[self._operation])
        # Of FFCV's own code only what hands on ids is left: to compile it takes seconds at each start.
        Compiler.set_enabled(False)
        try:
            stock = StockLoader(
                str(self.shards[0]),
                batch_size=self.plan.batch_size,
                num_workers=num_workers,
                os_cache=True,
                order=self._order,
                drop_last=False,
                batches_ahead=BATCHES_AHEAD,
                pipelines={"image": decoded, "label": None},
            )
        finally:
            Compiler.set_enabled(True)
        stock.memory_manager = _NoStorage()
        return stock

    def _decode(self, batches: list[np.ndarray], requests: Iterator[Request]) -> Generator[Decoded]:
        assert self._stock is not None, "it is closed"
        fetched = Prefetch(self.fetcher.fetch_all(requests), FETCHED_AHEAD, "read samples")
        self._operation.begin_epoch(fetched)
        self._order.sample_ids = np.concatenate(batches).astype(np.uint64)
        # FFCV takes the length of all epochs from the first, which is a short one after a resume.
        self._stock.first_traversal_order = self._order.sample_ids
        try:
            with torch_threads_kept():
                self._iterator = iter(self._stock)
            for _ in batches:
                yield self._watchdog.get(self._poll)
        finally:
            fetched.close()
            self._end_iterator()

    def _poll(self, seconds: float) -> Decoded:
        """FFCV's `__next__`, which would wait for ever for a thread that has died."""
        assert self._iterator is not None
        try:
            result = self._iterator.output_queue.get(timeout=seconds)
        except queue.Empty:
            if self._iterator.is_alive():
                raise
            raise RuntimeError("FFCV's loading thread has died: its own message stands above") from None
        if result is None:  # the operation ends the epoch where it fails
            raise self._operation.error or RuntimeError("FFCV's epoch ended before its last batch")
        _, (decoded,) = result
        return decoded

    def _end_iterator(self) -> None:
        """End FFCV's thread: leaving an epoch early would otherwise leak it."""
        iterator, self._iterator = self._iterator, None
        if iterator is None:
            return
        iterator.close()
        while iterator.is_alive():
            try:
                iterator.output_queue.get_nowait()
            except queue.Empty:
                iterator.join(0.05)

    def close(self) -> None:
        super().close()
        self._stock = None


class _GivenOrder(TraversalOrder):
    """The order that it is given before an epoch."""

    def __init__(self) -> None:
        self.sample_ids = np.zeros(0, np.uint64)

    def __call__(self, _loader: StockLoader) -> _GivenOrder:
        return self  # FFCV calls what it is given, as if it were a class

    def sample_order(self, epoch: int) -> np.ndarray:
        return self.sample_ids


class _NoStorage:
    """In place of FFCV's map of the file: bytes are read by `SampleReader`."""

    state = ()

    def schedule_epoch(self, _batches: list[np.ndarray]) -> _NoStorage:
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_error: object) -> None:
        pass

    def start_batch(self, _batch: int) -> None:
        pass


class _TakeIds(SimpleRGBImageDecoder):
    """Stands where FFCV wants a compiled decoder: hands on the ids of the batch."""

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        return replace(previous_state, jit_mode=True, shape=(), dtype=np.dtype("<u8")), None

    def generate_code(self) -> Callable:
        def take_ids(batch_indices, _memory, _metadata, _storage_state):
            return batch_indices

        return take_ids


class _DecodeCropResizeFlip(Operation):
    """Ids → intact bytes → decode → crop → resize → perhaps mirror."""

    def __init__(self, fetcher: SampleFetcher, num_threads: int, pin_memory: bool, is_strict: bool) -> None:
        super().__init__()
        self.doing = "starting"
        self.error: BaseException | None = None
        self._fetcher = fetcher
        self._fetched: Prefetch[Fetched] | None = None
        self._pin_memory = pin_memory
        # Bytes that nobody compared must not even warn; others may, as they did when they were prepared.
        self._is_strict = is_strict
        index = fetcher.reader.index
        largest = 3 * int((index["width"].astype(np.int64) * index["height"]).max())
        self._scratch = np.empty((num_threads, largest), np.uint8)
        self._decoders = np.array([lib.tjInitDecompress() for _ in range(num_threads)], np.int64)
        weakref.finalize(self, _destroy, self._decoders.tolist())

    def begin_epoch(self, fetched: Prefetch[Fetched]) -> None:
        self._fetched, self.error = fetched, None

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        return replace(previous_state, jit_mode=False), None

    def generate_code(self) -> Callable:
        def decode(_ids: np.ndarray, _memory: None) -> Decoded:
            try:
                return self._decode_next()
            except BaseException as error:
                self.error = error
                # FFCV's thread takes this for the end of the epoch; any other error would kill it silently.
                raise StopIteration from error

        return decode

    def _decode_next(self) -> Decoded:
        self.doing = "waiting for bytes"
        assert self._fetched is not None
        fetched = self._fetched.take()
        if fetched is None:
            raise RuntimeError("there are fewer requests than batches")
        self.doing = f"decoding samples {fetched.request.sample_ids[:3].tolist()} …"
        images, statuses = self._decode_fetched(fetched)
        while statuses.any():
            # Only where checksums are not compared: what was prepared does decode.
            fetched = self._fetcher.mend(
                fetched, dict.fromkeys(np.flatnonzero(statuses), "it does not decode")
            )
            images, statuses = self._decode_fetched(fetched)
        self.doing = "waiting for somebody to take a batch"
        return Decoded(images, fetched.request.sample_ids, fetched.damaged, fetched.changed_shards)

    def _decode_fetched(self, fetched: Fetched) -> tuple[torch.Tensor, np.ndarray]:
        request, index = fetched.request, self._fetcher.reader.index
        side = request.resolution
        shape = (len(fetched.jpegs), side, side, 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin_memory)
        lengths = np.array([len(jpeg) for jpeg in fetched.jpegs], np.int64)
        statuses = decode_crop_resize_flip(
            FUNCTIONS,
            self._decoders,
            np.frombuffer(b"".join(fetched.jpegs), np.uint8),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            index["width"][request.sample_ids].astype(np.int64),
            index["height"][request.sample_ids].astype(np.int64),
            request.boxes,
            request.flips,
            self._scratch,
            images.numpy(),
            self._is_strict,
        )
        return images, statuses


def _destroy(decoders: list[int]) -> None:
    for decoder in decoders:
        lib.tjDestroy(decoder)
