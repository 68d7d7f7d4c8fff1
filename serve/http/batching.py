"""Images of concurrent requests, computed together.

Threads decode; what they leave is gathered, and one thread computes it, a batch at a time. While it computes,
the next batch gathers, so batches grow with the load by themselves. An image waits for others only while
some are on their way, and never longer than `max_wait_ms`.
"""

from __future__ import annotations

import asyncio
import io
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from serve.http import logs
from serve.http.faults import busy
from serve.http.metrics import Metrics
from serve.http.settings import Settings
from serve.portable.classifier import Classifier
from serve.portable.decoding import image_kind
from serve.portable.limits import BadImage

Logits = NDArray[np.float32]


@dataclass(eq=False)
class _Waiting:
    image: NDArray[np.uint8]
    answer: asyncio.Future[Logits]
    since: float


class Batcher:
    """Bytes of image files → logits; to be used on one event loop.

    Attributes:
        num_waiting: images that were accepted and are not answered yet.
    """

    def __init__(self, classifier: Classifier, settings: Settings, metrics: Metrics) -> None:
        self._classifier, self._settings, self._metrics = classifier, settings, metrics
        self._decoders = ThreadPoolExecutor(settings.workers, "decode")
        self._computer = ThreadPoolExecutor(1, "compute")
        self._pixels = PixelBudget(settings.max_pixels)
        self._ready: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._on_their_way = 0  # being decoded, or waiting for it
        self.num_waiting = 0

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """End; whoever still waits is told by an exception."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        for waiting in self._ready:
            waiting.answer.cancel()
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._computer.shutdown(wait=False, cancel_futures=True)

    def check_room(self, num_images: int = 1) -> None:
        """Refused (503) where so many more would wait too long."""
        if self.num_waiting + num_images > self._settings.max_queue:
            raise busy(f"{self.num_waiting} images are waiting")

    async def logits(self, contents: Sequence[bytes]) -> list[Logits | BadImage]:
        """Logits (classes,) of each image, or what is wrong with it.

        Raises:
            Refused: the queue is full (503).
        """
        self.check_room(len(contents))
        self.num_waiting += len(contents)
        tasks = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._one(content)) for content in contents]
            return [task.result() for task in tasks]
        finally:
            self.num_waiting -= len(contents)

    async def _one(self, content: bytes) -> Logits | BadImage:
        loop = asyncio.get_running_loop()
        self._on_their_way += 1
        try:
            image = await loop.run_in_executor(self._decoders, self._prepare, content)
        except BadImage as error:
            self._metrics.image_failures.add(error.fault)
            return error
        finally:
            self._on_their_way -= 1
            self._arrived.set()
        waiting = _Waiting(image, loop.create_future(), loop.time())
        self._ready.append(waiting)
        self._arrived.set()
        return await waiting.answer

    def _prepare(self, content: bytes) -> NDArray[np.uint8]:
        with self._pixels.hold(num_pixels(content)):
            return self._classifier.prepare(content)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._gather()
            if not batch:
                continue
            clock = logs.Stopwatch()
            images = [waiting.image for waiting in batch]
            try:
                rows = await loop.run_in_executor(self._computer, self._compute, images)
            except asyncio.CancelledError:
                for waiting in batch:
                    waiting.answer.cancel()
                raise
            except Exception as error:  # of onnxruntime: these images fail, the next may not
                for waiting in batch:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(RuntimeError(f"computing failed: {error}"))
                continue
            self._metrics.batch_size.observe(len(batch))
            self._metrics.compute_seconds.observe(clock.seconds)
            self._metrics.images.add(amount=len(batch))
            for waiting, row in zip(batch, rows, strict=True):
                if not waiting.answer.done():  # the client may have left
                    waiting.answer.set_result(row)

    def _compute(self, images: list[NDArray[np.uint8]]) -> Logits:
        return self._classifier.logits(np.stack(images))

    async def _gather(self) -> list[_Waiting]:
        """The next images to compute; waits until there is one."""
        loop = asyncio.get_running_loop()
        while not self._ready:
            self._arrived.clear()
            await self._arrived.wait()
        deadline = self._ready[0].since + self._settings.max_wait_ms / 1000
        while len(self._ready) < self._settings.max_batch and self._on_their_way:
            self._arrived.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._arrived.wait()
            except TimeoutError:
                break
            if loop.time() >= deadline:
                break
        batch: list[_Waiting] = []
        while self._ready and len(batch) < self._settings.max_batch:
            waiting = self._ready.popleft()
            if not waiting.answer.done():
                batch.append(waiting)
        return batch


class PixelBudget:
    """So many pixels are decoded at once: one huge image, or many usual ones. For threads.

    Decoding takes some 12 bytes a pixel; with this, memory does not grow with the number of threads.
    """

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._free = max_pixels
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait until there is room for them; what is beyond the whole counts as the whole."""
        pixels = min(pixels, self._max_pixels)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


def num_pixels(content: bytes) -> int:
    """By the header, as memory counts them; 0 for what is no image, and will not be decoded.

    WebP's decoder holds a whole copy of its own, so there a pixel counts twice.
    """
    kind = image_kind(content)
    if kind is None:
        return 0
    try:
        with Image.open(io.BytesIO(content), formats=[kind]) as image:
            return image.width * image.height * (2 if kind == "WEBP" else 1)
    except Exception:  # decoding finds the same and says it
        return 0
