"""FFCV 1.0.2 on our `.beton`, with our order and our crops.

FFCV's decoder draws its crops from an unseeded generator. Its decode loop sees sample ids, though, so an
operation of our own takes box and flip of each sample from a table that is filled before every epoch.

What FFCV cannot give: it ignores decode errors (bytes are checked by CRC-32C instead, see base.py).
Interpolation: OpenCV's INTER_AREA (a box filter when reducing), and libjpeg's fast DCT.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import replace

import numba
import numpy as np
import torch
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.libffcv import imdecode, resize_crop
from ffcv.loader import Loader as StockLoader
from ffcv.loader import OrderOption
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.state import State
from ffcv.utils import cast_int_to_byte_ptr

from data_prep.storage import LocalFolder
from data_prep.verify import beton_fault
from train.data.loaders.base import Loader, LoaderPlan, Request

POLL_SECONDS = 2.0
JOIN_SECONDS = 30.0
BATCHES_AHEAD = 3


class FfcvLoader(Loader):
    """Decode in FFCV's compiled loop, in a thread of this process."""

    def __init__(self, plan: LoaderPlan) -> None:
        super().__init__(plan)
        if fault := beton_fault(LocalFolder(self.shards[0].parent), self.shards[0].name, self.index):
            raise ValueError(fault)
        # Box and flip of every sample; only the rows of the current epoch and rank are up to date.
        self._table = np.zeros((self.num_samples, 5), np.int32)
        self._decoder = _CropResizeFlip(self._table)
        self._stock: StockLoader | None = None
        self._iterator: EpochIterator | None = None

    def _decode(self, requests: list[Request], resolution: int) -> Iterator[torch.Tensor]:
        self._end_iterator()
        if not requests:
            return
        for request in requests:
            self._table[request.sample_ids, :4] = request.boxes
            self._table[request.sample_ids, 4] = request.flips
        stock = self._prepare_stock(resolution)
        order = np.concatenate([request.sample_ids for request in requests]).astype(np.uint64)
        # Not iter(stock): its length is fixed by the first epoch, which is a short one after a resume.
        self._iterator = iterator = EpochIterator(stock, order)
        try:
            for _ in requests:
                # The thread reuses its buffers, so a batch is copied out.
                images = torch.from_numpy(_next_batch(iterator)).clone()
                yield images.pin_memory() if self.plan.pin_memory else images
        finally:
            self._end_iterator()

    def _prepare_stock(self, resolution: int) -> StockLoader:
        """FFCV's loader, compiled for `resolution`."""
        num_threads = torch.get_num_threads()
        if self._stock is None:
            self._decoder.resolution = resolution
            self._stock = StockLoader(
                str(self.shards[0]),
                batch_size=self.plan.batch_size,
                num_workers=max(1, self.plan.num_workers),  # FFCV takes 0 for "all cores"
                os_cache=True,
                order=OrderOption.SEQUENTIAL,  # unused: the real order goes to EpochIterator
                drop_last=False,
                batches_ahead=BATCHES_AHEAD,
                pipelines={"image": [self._decoder], "label": None},
            )
        elif self._decoder.resolution != resolution:
            self._decoder.resolution = resolution
            self._stock.generate_code()
        # FFCV sets torch's number of threads to its own.
        torch.set_num_threads(num_threads)
        return self._stock

    def _end_iterator(self) -> None:
        """Stop FFCV's thread; left alone it would block on a full queue for ever."""
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
        self._end_iterator()
        self._stock = None


def _next_batch(iterator: EpochIterator) -> np.ndarray:
    """The next batch, or an error where the thread has died (FFCV itself would wait for ever)."""
    while True:
        try:
            result = iterator.output_queue.get(timeout=POLL_SECONDS)
            break
        except queue.Empty:
            if not iterator.is_alive():
                raise RuntimeError("FFCV's loading thread has died: its own message stands above") from None
    if result is None:
        raise RuntimeError("FFCV's epoch ended before its last batch")
    _, (images,) = result
    return images


class _CropResizeFlip(SimpleRGBImageDecoder):
    """JPEG → crop → resize → perhaps mirror, all taken from a table by sample id."""

    def __init__(self, table: np.ndarray) -> None:
        super().__init__()
        self.table = table  # kept alive here: the compiled code knows its address only
        self.resolution = 0

    def declare_state_and_memory(
        self, previous_state: State
    ) -> tuple[State, tuple[AllocationQuery, AllocationQuery]]:
        widths, heights = self.metadata["width"], self.metadata["height"]
        most = 3 * int((widths.astype(np.int64) * heights.astype(np.int64)).max())
        shape = (self.resolution, self.resolution, 3)
        dtype = np.dtype("u1")
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=dtype)
        return state, (AllocationQuery(shape, dtype), AllocationQuery((most,), dtype))

    def generate_code(self) -> Callable:
        read = self.memory_read
        decode_jpeg, crop_resize = Compiler.compile(imdecode), Compiler.compile(resize_crop)
        loop = Compiler.get_iterator()
        address, num_bytes = self.table.ctypes.data, self.table.nbytes

        def decode(batch_indices, storage, metadata, storage_state):
            destination, scratch = storage
            table = numba.carray(cast_int_to_byte_ptr(address), (num_bytes,)).view(np.int32)
            for position in loop(len(batch_indices)):
                sample_id = batch_indices[position]
                field = metadata[sample_id]
                height, width = np.uint32(field["height"]), np.uint32(field["width"])
                jpeg = read(field["data_ptr"], storage_state)
                pixels = scratch[position]
                decode_jpeg(jpeg, pixels, height, width, height, width, 0, 0, 1, 1, False, False)
                pixels = pixels[: 3 * height * width].reshape(height, width, 3)
                row = np.int64(sample_id) * 5
                top, left = table[row], table[row + 1]
                bottom, right = top + table[row + 2], left + table[row + 3]
                crop_resize(pixels, top, bottom, left, right, destination[position])
                if table[row + 4]:
                    image = destination[position]
                    side = image.shape[1]
                    for y in range(image.shape[0]):
                        for x in range(side // 2):
                            for channel in range(3):
                                value = image[y, x, channel]
                                image[y, x, channel] = image[y, side - 1 - x, channel]
                                image[y, side - 1 - x, channel] = value
            return destination[: len(batch_indices)]

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode
