"""Images a second, the share of the time spent waiting for data, MFU and memory.

On CUDA the time is that between two events on the device, read in logging steps only, since reading waits
for them. MFU (model FLOP/s utilization; Chowdhery et al., 2022) counts what the model needs,
three forward passes' worth an image, over the dense peak of the hardware; recomputation does not count.
"""

from __future__ import annotations

import copy
import resource
import time
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")

# Dense peaks in FLOP/s by the makers' data sheets, without sparsity: bf16/fp16, tf32, fp32.
PEAKS: dict[str, tuple[float, float, float]] = {
    "L4": (121e12, 60e12, 30.3e12),
    "L40S": (362e12, 183e12, 91.6e12),
    "T4": (65e12, 8.1e12, 8.1e12),
    "A10G": (70e12, 35e12, 31.2e12),
    "A100": (312e12, 156e12, 19.5e12),
    "H100": (989e12, 494e12, 67e12),
    "H200": (989e12, 494e12, 67e12),
}
BACKWARD_AND_FORWARD = 3  # forward passes' worth: the backward pass computes two gradients


class Throughput:
    """Clock of the training loop; counts are those of this rank, the reported speed is global.

    Example:
        >>> clock = Throughput(world_size=2)
        >>> for batch in clock.waiting(batches): clock.count(len(batch))
        >>> clock.images_per_second, clock.data_wait_fraction
    """

    def __init__(self, world_size: int, device: torch.device | None = None) -> None:
        self._world_size = world_size
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Begin a new window."""
        self._begin = time.perf_counter()
        self._event = self._record()
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
        """Since the window began; on CUDA this waits for the device."""
        if self._event is None:
            return time.perf_counter() - self._begin
        now = self._record()
        assert now is not None
        now.synchronize()
        return self._event.elapsed_time(now) / 1000

    def _record(self) -> torch.cuda.Event | None:
        if self._device is None or self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def images_per_second(self) -> float:
        return self.images / max(self.seconds, 1e-9)

    @property
    def data_wait_fraction(self) -> float:
        return self._waited / max(self.seconds, 1e-9)


def flops_per_image(model: nn.Module, resolution: int) -> float | None:
    """FLOPs of forward and backward for one image, counted on tensors without memory; None where that fails.

    Args:
        resolution: side in pixels.
    """
    was_training = model.training
    try:
        twin = copy.deepcopy(model).to("meta").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            twin(torch.empty(1, 3, resolution, resolution, device="meta"))
    except Exception:  # an operation that torch cannot count without values; a figure less, no fault
        return None
    finally:
        model.train(was_training)
    return float(BACKWARD_AND_FORWARD * counter.get_total_flops()) or None


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense peak of one GPU in FLOP/s for this arithmetic; None for hardware that the table lacks."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    peaks = next((PEAKS[word] for word in words if word in PEAKS), None)
    if peaks is None:
        return None
    return peaks[{"tf32": 1, "fp32": 2}.get(precision, 0)]


def model_flops_utilization(
    images_per_second: float, flops: float | None, peak: float | None, world_size: int
) -> float | None:
    """Share of the peak of all GPUs that the model's own FLOPs make; None where either is not known."""
    if flops is None or peak is None:
        return None
    return images_per_second * flops / (peak * world_size)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this rank has held so far: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
