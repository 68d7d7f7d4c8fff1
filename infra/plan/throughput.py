"""How fast a machine trains: GPUs, decoding on its cores, the gradient between nodes (`throughput.yaml`).

All rates have a low and a high bound, each with its source. `fast` reads the high ones, `slow` the low ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from infra.errors import UserError
from infra.plan.dated import load_dated
from infra.plan.instances import Instance

Case = Literal["fast", "slow"]
BOUNDS: dict[Case, str] = {"fast": "high", "slow": "low"}


@cache
def table() -> dict[str, Any]:
    """The whole file."""
    return load_dated("throughput.yaml")


@dataclass(frozen=True)
class Figure:
    """Images a second of one GPU or core, and how they are known.

    Attributes:
        kind: measured (by this project), published (by others, on that hardware) or estimated.
    """

    images_per_second: float
    measured: bool
    kind: str
    date: str
    source: str


def gpu_figure(gpu: str, case: Case) -> Figure:
    """A ResNet-50 at 224 px on one GPU. Raises UserError: there is no figure for it."""
    gpus = table()["gpus"]
    if gpu not in gpus:
        raise UserError(f"no speed is known for a {gpu}: infra/plan/throughput.yaml has {', '.join(gpus)}")
    return _figure(gpus[gpu][BOUNDS[case]])


def _figure(row: dict[str, Any]) -> Figure:
    return Figure(
        float(row["images_per_second"]), row["measured"], row["kind"], str(row["date"]), row["source"]
    )


def gpu_rate(instance: Instance, case: Case) -> float:
    """A ResNet-50's training images/s at 224 px of all GPUs of the machine together."""
    row = table()["gpus"][instance.gpu][BOUNDS[case]]
    together = instance.num_gpus * row["images_per_second"]
    if row["num_gpus"] == 1 < instance.num_gpus:
        together *= table()["scaling_in_machine"]["factor"]
    return float(together)


def decoding_rate(instance: Instance, case: Case) -> float:
    """Images/s that all cores decode and crop."""
    return float(table()["decoding"][BOUNDS[case]]["images_per_second"]) * instance.cores


def decoding_figure(case: Case) -> Figure:
    return _figure(table()["decoding"][BOUNDS[case]])


def small_batch_factor(images_per_gpu: float, case: Case) -> float:
    """What is left of a GPU's speed with so few images a forward pass."""
    fast, slow = table()["small_batches"]["full_speed_from"]
    return min(1.0, images_per_gpu / (fast if case == "fast" else slow))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, and of what it is made."""

    seconds: float
    gpu: float
    decoding: float
    network: float  # what the gradient's way adds, and waiting for the slowest node


def step_time(
    instance: Instance, num_nodes: int, batch: int, image_cost: float, gradient_bytes: float, case: Case
) -> StepTime:
    """Seconds of a step of `batch` images, each `image_cost` times a ResNet-50's at 224 px."""
    gpus = instance.num_gpus * num_nodes
    rate = gpu_rate(instance, case) * num_nodes * small_batch_factor(batch / gpus, case)
    gpu = batch * image_cost / rate
    decoding = batch / (decoding_rate(instance, case) * num_nodes)
    busy = max(gpu, decoding)
    seconds = busy
    if num_nodes > 1:
        row = table()["between_nodes"][BOUNDS[case]]
        around = 2 * (num_nodes - 1) / num_nodes * gradient_bytes * 8
        way = around / (instance.guaranteed_gbps * 1e9 * row["network_share"])
        hidden = row["overlap"] * min(way, busy)
        seconds = (busy + way - hidden) / row["straggler"]
    return StepTime(seconds, gpu, decoding, seconds - busy)


def staging_seconds(instance: Instance, num_bytes: float, case: Case) -> float:
    """S3 → NVMe: bound by a share of the network and by disks and checksums."""
    overheads = table()["overheads"]
    slow, fast = overheads["staging_network_share"]
    network = instance.network_gbps * fast if case == "fast" else instance.guaranteed_gbps * slow
    return float(num_bytes / 1e9 / min(network / 8, overheads["staging_gbytes_per_second"]))


def start_seconds(case: Case) -> float:
    """From the launch to the first step, without staging."""
    fast, slow = table()["overheads"]["start_minutes"]
    return float(60 * (fast if case == "fast" else slow))
