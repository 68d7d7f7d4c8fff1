"""What a run will cost, before it is started: hours and dollars of each machine, on demand and spot.

Prices come from `train/prices.yaml` or from AWS, speeds from `throughput.yaml`, machines from
`instances.yaml`; each figure carries its source, its date, and whether it was measured.

Example:
    >>> found = plan(Path("configs/imagenet_resnet50_16.yaml"), max_usd=25)
    >>> found.recommended.instance.name, found.recommended.market
    ('p4d.24xlarge', 'spot')
    >>> price_of("g6.12xlarge", "spot", "us-east-1").high_usd_per_hour
    2.6
"""

from infra.plan.estimate import Breakdown, Option
from infra.plan.instances import Instance, find_instance, load_instances
from infra.plan.prices import (
    MARKETS,
    Market,
    NoPrice,
    Price,
    ZonePrice,
    price_of,
    side_usd_per_hour,
    storage_usd_per_month,
)
from infra.plan.recommend import Limits, Plan, describe, plan
from infra.plan.work import Work, work_of

__all__ = [
    "MARKETS",
    "Breakdown",
    "Instance",
    "Limits",
    "Market",
    "NoPrice",
    "Option",
    "Plan",
    "Price",
    "Work",
    "ZonePrice",
    "describe",
    "find_instance",
    "load_instances",
    "plan",
    "price_of",
    "side_usd_per_hour",
    "storage_usd_per_month",
    "work_of",
]
