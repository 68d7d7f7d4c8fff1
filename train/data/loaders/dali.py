"""NVIDIA DALI, fed with our bytes in our order: on the CPU, or with CUDA the decoding on the GPU ("mixed").

DALI's own readers shuffle within a window, cannot be taken up in the middle of an epoch, and abort where a
file does not decode. So a batch's bytes, crop boxes and flips come from here, checked, and DALI decodes
(only the rows and columns that the crop needs), resizes and mirrors. It reads both shard formats.

DALI has no area interpolation. On the CPU its crops are resized by our own compiled code, so that images are
those of the other backends. On the GPU its Gaussian filter, the nearest of those it has, stands in, and
images differ a little (benchmarks/RESULTS.md says how much that matters).
Another resolution is another number that is fed: nothing is built again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator

import numba
import numpy as np
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.tensors import TensorListCPU
from nvidia.dali.types import FLOAT, INT32, INTERP_GAUSSIAN, RGB, UINT8  # type: ignore[attr-defined]
from torchvision.io import decode_jpeg

from train.data.compiled_resize import num_threads, resize_flip_all
from train.data.loaders.base import Decoded, Loader, LoaderPlan, Request
from train.data.loaders.waiting import Prefetch, Watchdog
from train.data.samples import Fetched

BATCHES_AHEAD = 2  # in DALI's own queue
DECODED_AHEAD = 1
FETCHED_AHEAD = 2
AREA_ON_CPU = True  # False: DALI's Gaussian filter there, too, to see what it does


class DaliLoader(Loader):
    """Decode in DALI's threads, driven by a thread of this process."""

    def __init__(self, plan: LoaderPlan) -> None:
        super().__init__(plan)
        self._device_id = torch.cuda.current_device() if plan.pin_memory else None
        self._by_area = self._device_id is None and AREA_ON_CPU
        self._num_threads = num_threads(plan.num_workers)
        self._pipeline: Pipeline | None = None
        self._fetched: Prefetch[Fetched]
        self._in_flight: deque[Fetched] = deque()  # fed, and not out yet
        self._again: deque[Fetched] = deque()  # to be fed once more, after an error
        self._fault: BaseException | None = None  # an error of ours, which passes through DALI
        self._doing = "starting"
        self._watchdog = Watchdog(plan.timeout_seconds, lambda: self.where(self._doing))

    def _decode(self, batches: list[np.ndarray], requests: Iterator[Request]) -> Generator[Decoded]:
        self._fetched = Prefetch(self.fetcher.fetch_all(requests), FETCHED_AHEAD, "read samples")
        self._in_flight.clear()
        self._again.clear()
        self._fault = None
        decoded = Prefetch(self._run(), DECODED_AHEAD, "run DALI")
        finished = False
        try:
            while (item := self._watchdog.get(decoded.poll)) is not None:
                yield item
            finished = True
        finally:
            self._fetched.close()
            decoded.close()
            self._fault = None
            if not finished:
                self._pipeline = None  # batches that nobody wants are still in it

    def _run(self) -> Iterator[Decoded]:
        """Results in the order of the requests; some more are in DALI's queue."""
        if self._pipeline is None:
            self._pipeline = self._build_pipeline()
        while True:
            self._doing = "decoding"
            try:
                (images,) = self._pipeline.run()
            except StopIteration:
                yield from self._left_out()
                self._pipeline.reset()
                return
            except RuntimeError as error:
                if self._fault is not None:
                    raise self._fault from None
                self._mend(error)
                continue
            yield from self._left_out()
            item = self._in_flight.popleft()
            self._doing = "waiting for somebody to take a batch"
            if isinstance(images, TensorListCPU) and self._by_area:
                yield _decoded(self._resized(images, item.request), item)
            else:
                yield _decoded(torch.from_dlpack(images.as_tensor()).clone(), item)

    def _resized(self, crops: TensorListCPU, request: Request) -> torch.Tensor:
        """Crops of any size, in DALI's memory → resized by area, and mirrored."""
        side = request.resolution
        images = torch.empty((len(crops), side, side, 3), dtype=torch.uint8)
        addresses = np.array([crops[position].data_ptr() for position in range(len(crops))], np.int64)
        heights, widths = request.boxes[:, 2].astype(np.int64), request.boxes[:, 3].astype(np.int64)
        numba.set_num_threads(self._num_threads)  # for this thread
        resize_flip_all(addresses, heights, widths, request.flips, images.numpy())
        return images

    def _feed(self) -> tuple[list[np.ndarray] | np.ndarray, ...]:
        """Files, starts and shapes of crops, sizes where DALI resizes: what it asks for before a batch.

        Raises:
            StopIteration: at the end of the epoch.
        """
        try:
            item = self._again.popleft() if self._again else self._fetched.take()
        except BaseException as error:
            self._fault = error
            raise
        if item is None:
            raise StopIteration
        self._in_flight.append(item)
        if not item.jpegs:
            return self._feed()
        request = item.request
        jpegs = [np.frombuffer(jpeg, np.uint8) for jpeg in item.jpegs]
        crops = jpegs, request.boxes[:, :2].copy(), request.boxes[:, 2:].copy()
        if self._by_area:
            return crops
        sizes = np.full((len(item.jpegs), 2), request.resolution, np.float32)
        sizes[request.flips, 1] *= -1  # a negative width mirrors
        return *crops, sizes

    def _left_out(self) -> Iterator[Decoded]:
        """Batches at the head that were never fed: all of a validation batch was damaged."""
        while self._in_flight and not self._in_flight[0].jpegs:
            item = self._in_flight.popleft()
            side = item.request.resolution
            yield _decoded(torch.empty((0, side, side, 3), dtype=torch.uint8), item)

    def _mend(self, error: RuntimeError) -> None:
        """After an error DALI's pipeline is of no use: mend the batch, and feed a new one."""
        self._again.extendleft(reversed(self._in_flight))
        self._in_flight.clear()
        for position, item in enumerate(self._again):
            faults = {n: "it does not decode" for n, jpeg in enumerate(item.jpegs) if not _decodes(jpeg)}
            if faults:
                self._again[position] = self.fetcher.mend(item, faults)
                self._pipeline = self._build_pipeline()
                return
        raise RuntimeError(f"DALI failed: {str(error).strip().splitlines()[-1]}") from error

    def _build_pipeline(self) -> Pipeline:
        pipeline = Pipeline(
            batch_size=self.plan.batch_size,
            num_threads=self._num_threads,
            device_id=self._device_id,
            prefetch_queue_depth=BATCHES_AHEAD,
            exec_dynamic=True,  # or a batch's memory would be written to again while it is in use
            set_affinity=False,
        )
        on_cpu = self._device_id is None
        with pipeline:
            inputs = fn.external_source(
                source=self._feed,
                num_outputs=3 if self._by_area else 4,
                batch=True,
                dtype=[UINT8, INT32, INT32] if self._by_area else [UINT8, INT32, INT32, FLOAT],
                ndim=1,
            )
            crops = fn.decoders.image_slice(
                inputs[0],
                start=inputs[1],
                shape=inputs[2],
                axes=[0, 1],
                device="cpu" if on_cpu else "mixed",
                output_type=RGB,
                adjust_orientation=False,  # of an EXIF tag, which no other backend looks at
            )
            if not self._by_area:
                pipeline.set_outputs(
                    fn.resize(crops, size=inputs[3], interp_type=INTERP_GAUSSIAN, antialias=True)
                )
            else:
                pipeline.set_outputs(crops)
        pipeline.build()
        return pipeline

    def close(self) -> None:
        super().close()
        self._pipeline = None


def _decoded(images: torch.Tensor, item: Fetched) -> Decoded:
    return Decoded(images, item.request.sample_ids, item.damaged, item.changed_shards)


def _decodes(jpeg: bytes) -> bool:
    try:
        decode_jpeg(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8))
    except RuntimeError:
        return False
    return True
