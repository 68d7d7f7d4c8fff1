"""Machines of AWS with GPUs: what they have, and which quota they count against (`instances.yaml`).

Example:
    >>> find_instance("g6.12xlarge").num_gpus
    4
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache

from infra.errors import UserError
from infra.plan.dated import load_dated
from infra.plan.prices import Market

BYTES_PER_GB = 10**9
BYTES_PER_GIB = 2**30


@dataclass(frozen=True)
class Instance:
    """One type of machine.

    Attributes:
        nvme_gb: of all instance-store disks together, which are striped.
        network_gbps: at most; guaranteed_gbps: always.
    """

    name: str
    gpu: str
    num_gpus: int
    gpu_memory_gib: int
    vcpus: int
    ram_gib: int
    num_disks: int
    nvme_gb: float
    network_gbps: float
    guaranteed_gbps: float
    efa: bool

    @property
    def cores(self) -> float:
        return self.vcpus / 2

    @property
    def family(self) -> str:
        return self.name.partition(".")[0]

    def quota(self, market: Market) -> tuple[str, str]:
        """Code and name of the quota (in vCPUs) that it counts against."""
        kind = "g" if self.family.startswith("g") else self.family[:2]
        code, name = load_dated("instances.yaml")["quotas"][kind][market]
        return code, name


@cache
def load_instances() -> dict[str, Instance]:
    """All machines that can be planned, by name."""
    found = {}
    for name, row in load_dated("instances.yaml")["instances"].items():
        gpu, num_gpus, gpu_memory, vcpus, ram, (num_disks, disk_gb), network, guaranteed, efa = row
        found[name] = Instance(
            name,
            gpu,
            num_gpus,
            gpu_memory,
            vcpus,
            ram,
            num_disks,
            float(num_disks * disk_gb),
            float(network),
            float(guaranteed),
            efa,
        )
    return found


def find_instance(name: str) -> Instance:
    """The machine of this name. Raises UserError."""
    instances = load_instances()
    if name not in instances:
        near = difflib.get_close_matches(name, instances, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(instances)}"
        raise UserError(f"{name!r} is no machine that can be planned; {hint}")
    return instances[name]
