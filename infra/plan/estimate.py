"""Hours and dollars of one recipe on one kind of machine: the arithmetic, with all its parts.

training   steps × seconds of a step (the slower of GPUs and decoding, plus the network between nodes)
+ validation, + start, + staging from S3, + (worst case on spot) what interruptions repeat
dollars    hours × nodes × (price of an hour + root volume and public address)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from infra.plan.instances import BYTES_PER_GB, BYTES_PER_GIB, Instance
from infra.plan.prices import Market, Price, side_usd_per_hour
from infra.plan.throughput import (
    Case,
    decoding_figure,
    gpu_figure,
    gpu_rate,
    staging_seconds,
    start_seconds,
    step_time,
    table,
)
from infra.plan.work import REFERENCE_SIDE, Work

RAM_SHARE = 0.8  # of the memory, for data: the rest is the training's
NVME_SHARE = 0.95
ROOT_GIB = 100


@dataclass(frozen=True)
class Breakdown:
    """Where the hours go, in one case."""

    training: float
    validation: float
    start: float
    staging: float
    interruptions: float
    bottleneck: str
    share: float  # of the recipe's epochs that is done; less than 1 where budget.max_hours ends it before

    @property
    def capped(self) -> bool:
        return self.share < 1

    @property
    def hours(self) -> float:
        return self.training + self.validation + self.start + self.staging + self.interruptions


@dataclass(frozen=True)
class Option:
    """A recipe on a number of machines of one type, in one market.

    Attributes:
        fast, slow: the best and the worst case of the estimate.
        on_demand: what an hour costs at most, also on spot.
        bottleneck: GPU, decoding, network, staging or start; of the worst case.
    """

    work: Work
    instance: Instance
    market: Market
    num_nodes: int
    price: Price
    on_demand: Price
    fast: Breakdown
    slow: Breakdown

    @property
    def hours(self) -> tuple[float, float]:
        return self.fast.hours, self.slow.hours

    @property
    def training_hours(self) -> tuple[float, float]:
        """Training alone, as docs/recipes.md counts."""
        return self.fast.training, self.slow.training

    @property
    def training_usd(self) -> tuple[float, float]:
        """Training alone at the instances' price, as docs/recipes.md counts."""
        low, high = self.price.low_usd_per_hour, self.price.high_usd_per_hour
        return self.fast.training * self.num_nodes * low, self.slow.training * self.num_nodes * high

    @property
    def usd(self) -> tuple[float, float]:
        return (
            self._usd(self.fast.hours, self.price.low_usd_per_hour),
            self._usd(self.slow.hours, self.price.high_usd_per_hour),
        )

    @property
    def worst_case_usd(self) -> float:
        """The longest estimate, all of it at the on-demand price: no spot instance costs more."""
        return self._usd(self.slow.hours, self.on_demand.high_usd_per_hour)

    def _usd(self, hours: float, usd_per_hour: float) -> float:
        return hours * self.num_nodes * (usd_per_hour + side_usd_per_hour(ROOT_GIB))

    @property
    def bottleneck(self) -> str:
        return self.slow.bottleneck

    @property
    def fits_ram(self) -> bool:
        return self.work.data.num_bytes <= RAM_SHARE * self.instance.ram_gib * BYTES_PER_GIB

    @property
    def fits_nvme(self) -> bool:
        return self.work.data.num_bytes <= NVME_SHARE * self.instance.nvme_gb * BYTES_PER_GB

    @property
    def measured(self) -> dict[str, bool]:
        """Of each figure, whether this project measured it; prices: whether AWS was asked now."""
        return {
            "speed_fast": gpu_figure(self.instance.gpu, "fast").measured and self.instance.num_gpus == 1,
            "speed_slow": gpu_figure(self.instance.gpu, "slow").measured,
            "decoding_fast": decoding_figure("fast").measured,
            "decoding_slow": decoding_figure("slow").measured,
            "data_size": self.work.data.measured,
            "network_cost": self.work.network_measured,
            "start": False,
            "staging": False,
            "several_nodes": self.num_nodes == 1,
            "price_asked_now": self.price.live,
        }

    @property
    def speed_kinds(self) -> tuple[str, str]:
        """How the speed's slow and fast bound are known: measured, published or estimated."""
        kinds = [gpu_figure(self.instance.gpu, case).kind for case in ("slow", "fast")]
        if self.instance.num_gpus > 1 and kinds[1] == "measured":
            kinds[1] = "estimated"  # of one GPU, scaled
        return kinds[0], kinds[1]

    @property
    def vcpus(self) -> int:
        return self.instance.vcpus * self.num_nodes


def misfit(work: Work, instance: Instance, num_nodes: int) -> str | None:
    """Why a recipe cannot run there, or None."""
    if work.data.num_bytes > NVME_SHARE * instance.nvme_gb * BYTES_PER_GB:
        return (
            f"{instance.name}: the data ({work.data.num_bytes / 1e9:,.0f} GB) do not fit its disks "
            f"({instance.nvme_gb:,.0f} GB)"
        )
    ranks = instance.num_gpus * num_nodes
    if work.global_batch_size % (ranks * work.accum_steps):
        return (
            f"{num_nodes} × {instance.name}: a step of {work.global_batch_size} images cannot be dealt "
            f"out to {ranks} GPUs"
        )
    return None


def breakdown(work: Work, instance: Instance, num_nodes: int, market: Market, case: Case) -> Breakdown:
    """Hours of each part, in the best or the worst case."""
    parts = dict.fromkeys(("GPU", "decoding", "network"), 0.0)
    training = 0.0
    for segment in work.segments:
        cost = work.image_cost * work.sam_factor * segment.resolution**2 / REFERENCE_SIDE**2
        batch = work.global_batch_size
        step = step_time(instance, num_nodes, batch, cost, work.gradient_bytes, case)
        num_steps = segment.num_epochs * work.data.num_train / batch
        parts["GPU" if step.gpu >= step.decoding else "decoding"] += num_steps * (step.seconds - step.network)
        parts["network"] += num_steps * step.network
        training += num_steps * step.seconds / 3600
    rate = gpu_rate(instance, case) * num_nodes / work.image_cost
    validation = work.validation_images / rate / 3600
    capped = work.max_hours is not None and training + validation > work.max_hours
    share = 1.0
    if capped and work.max_hours is not None:
        share = work.max_hours / (training + validation)
        training, validation = training * share, validation * share
        parts = {name: seconds * share for name, seconds in parts.items()}
    start = start_seconds(case) / 3600
    staging = staging_seconds(instance, work.data.num_bytes, case) / 3600
    interruptions = 0.0
    if market == "spot" and case == "slow":
        overheads = table()["overheads"]
        times = math.ceil((training + validation) / overheads["restart_every_hours"]) * num_nodes
        interruptions = times * (start + staging + overheads["restart_lost_minutes"] / 60)
    parts |= {"staging": staging * 3600, "start": start * 3600}
    bottleneck = max(parts, key=lambda name: parts[name])
    return Breakdown(training, validation, start, staging, interruptions, bottleneck, share)


def estimate(work: Work, instance: Instance, num_nodes: int, price: Price, on_demand: Price) -> Option:
    """Hours and dollars of `work` on `num_nodes` machines at `price`."""
    cases: dict[Case, Any] = {
        case: breakdown(work, instance, num_nodes, price.market, case) for case in ("fast", "slow")
    }
    return Option(
        work, instance, price.market, num_nodes, price, on_demand, fast=cases["fast"], slow=cases["slow"]
    )
