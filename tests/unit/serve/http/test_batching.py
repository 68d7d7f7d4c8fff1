"""What is computed together, with a classifier that only counts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.http.batching import Batcher
from serve.http.faults import Refused
from serve.http.metrics import Metrics
from serve.http.settings import Settings
from serve.portable.classifier import Classifier
from serve.portable.limits import BadImage
from serve.portable.model_info import ModelInfo
from serve.portable.preprocessing import Preprocessing

INFO = ModelInfo(Preprocessing(8, 1.0, (0.0,) * 3, (1.0,) * 3), tuple("ab"))  # type: ignore[arg-type]


class Counting(Classifier):
    """An image is its first byte, and so is its first logit; `gate` holds computations up."""

    def __init__(self) -> None:
        super().__init__(INFO)
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def prepare(self, content: bytes) -> NDArray[np.uint8]:
        if content == b"bad":
            raise BadImage("broken", "It is broken.")
        return np.full((8, 8, 3), content[0], np.uint8)

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        assert self.gate.wait(timeout=60)
        values = images[:, 0, 0, 0]
        self.batches.append(values.tolist())
        if 99 in values:
            raise RuntimeError("out of memory")
        return np.stack([values, 0 * values], 1).astype(np.float32)


def run(test: Callable[[Counting, Batcher], Awaitable[None]], **options: float) -> None:
    async def whole() -> None:
        classifier = Counting()
        batcher = Batcher(classifier, Settings(**options), Metrics())  # type: ignore[arg-type]
        batcher.start()
        try:
            async with asyncio.timeout(60):
                await test(classifier, batcher)
            assert batcher.num_waiting == 0
        finally:
            classifier.gate.set()
            await batcher.close()

    asyncio.run(whole())


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.005)


def test_what_gathers_during_a_computation_is_the_next_one() -> None:
    async def test(classifier: Counting, batcher: Batcher) -> None:
        classifier.gate.clear()
        tasks = [asyncio.create_task(batcher.logits([bytes([1])]))]
        await asyncio.sleep(0.1)  # alone, it is computed at once
        tasks += [asyncio.create_task(batcher.logits([bytes([n])])) for n in range(2, 8)]
        await until(lambda: batcher.num_waiting == 7 and len(batcher._ready) == 6)
        classifier.gate.set()
        found = [(await task)[0] for task in tasks]
        assert [int(row[0]) for row in found] == list(range(1, 8))  # type: ignore[index]
        assert classifier.batches[0] == [1]
        assert sorted(map(len, classifier.batches)) == [1, 2, 4]  # max_batch is 4

    run(test, max_batch=4)


def test_a_request_of_many_is_one_batch_and_one_alone_does_not_wait() -> None:
    async def test(classifier: Counting, batcher: Batcher) -> None:
        # Nothing else is on its way: an hour of waiting is not waited.
        assert len(await batcher.logits([b"\x05"])) == 1
        found = await batcher.logits([b"\x01", b"bad", b"\x02", b"\x03"])
        assert [type(one) for one in found] == [np.ndarray, BadImage, np.ndarray, np.ndarray]
        assert sorted(classifier.batches[1]) == [1, 2, 3]

    run(test, max_wait_ms=3.6e6)


def test_a_full_queue_refuses_and_recovers() -> None:
    async def test(classifier: Counting, batcher: Batcher) -> None:
        classifier.gate.clear()
        tasks = [asyncio.create_task(batcher.logits([b"\x01"])) for _ in range(3)]
        await until(lambda: batcher.num_waiting == 3)
        with pytest.raises(Refused) as refused:
            await batcher.logits([b"\x02"])
        assert refused.value.status == 503 and refused.value.retry_seconds == 1
        # Who leaves makes room, and is not computed.
        tasks[2].cancel()
        await asyncio.wait([tasks[2]])
        tasks.append(asyncio.create_task(batcher.logits([b"\x07"])))
        await until(lambda: batcher.num_waiting == 3)
        classifier.gate.set()
        await asyncio.gather(*tasks[:2], tasks[3])
        assert sum(map(len, classifier.batches)) <= 4

    run(test, max_queue=3, max_files=3, max_batch=1)


def test_a_computation_that_fails_costs_its_own_images_only() -> None:
    async def test(classifier: Counting, batcher: Batcher) -> None:
        with pytest.raises(ExceptionGroup):
            await batcher.logits([bytes([99])])
        assert len(await batcher.logits([b"\x01"])) == 1

    run(test)
