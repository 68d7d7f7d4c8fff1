"""What an hour of a machine costs, and what a month of storage: from the dated file, or asked of AWS.

The file is `train/prices.yaml`. Spot prices are a range over availability zones; nobody pays more for a spot
instance than its on-demand price, so that is the worst case.

Example:
    >>> price_of("g6.12xlarge").usd_per_hour
    4.6
    >>> price_of("g6.12xlarge", "spot").low_usd_per_hour
    1.5
    >>> round(storage_usd_per_month(65e9), 2)
    1.5
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from infra.errors import UserError
from train.cost import load_prices

price_table = cache(load_prices)  # read once: many options are priced
Market = Literal["on-demand", "spot"]
MARKETS: tuple[Market, ...] = ("on-demand", "spot")
DEFAULT_REGION = "us-east-1"
HOURS_PER_MONTH = 730
MLFLOW_USD_PER_HOUR = 0.0168  # a t4g.small in us-east-1, on demand
StorageKind = Literal["s3", "ebs_gp3", "ebs_snapshot"]


@dataclass(frozen=True)
class ZonePrice:
    """The spot price of one availability zone over the last day, dollars an hour."""

    zone: str
    minimum_usd: float
    median_usd: float
    latest_usd: float


@dataclass(frozen=True)
class Price:
    """Dollars an hour of one instance, and where that comes from.

    Attributes:
        usd_per_hour: on demand the price; on the spot market the middle of its range, or (live) the median of
            the cheapest zone.
        date: the day of the figures, ISO.
        live: asked of AWS just now, not read from the file.
        zones: of the spot market, live only, the cheapest first.
        note: why the file was used where AWS was to be asked; else "".
    """

    instance_type: str
    market: Market
    region: str
    usd_per_hour: float
    low_usd_per_hour: float
    high_usd_per_hour: float
    date: str
    source: str
    live: bool = False
    zones: tuple[ZonePrice, ...] = ()
    note: str = ""


class NoPrice(UserError):
    """Nobody knows what this machine costs there."""


def price_of(
    instance_type: str, market: Market = "on-demand", region: str = DEFAULT_REGION, live: bool | None = False
) -> Price:
    """What an hour of one instance costs.

    Args:
        live: ask AWS, and fall back to the file with a `note`; None: ask where credentials are at hand.

    Raises:
        NoPrice: the machine is unknown, or has no price in this market and region.
    """
    if live is False:
        return file_price(instance_type, market, region)
    from infra.plan.live_prices import LivePrices, has_credentials

    if live is None and not has_credentials():
        return file_price(instance_type, market, region)
    return LivePrices(region).price_of(instance_type, market)


def file_price(instance_type: str, market: Market, region: str, note: str = "") -> Price:
    """As `price_of`, from the dated file only."""
    table = price_table()
    on_demand = _on_demand_table(table, region)
    if instance_type not in table["usd_per_hour"]:
        near = difflib.get_close_matches(instance_type, table["usd_per_hour"], n=1, cutoff=0.8)
        hint = f" (a near name: {near[0]})" if near else ""
        raise NoPrice(f"{instance_type} has no price in train/prices.yaml{hint}: pass --live to ask AWS")
    if instance_type not in on_demand:
        raise NoPrice(
            f"{instance_type} has no price in {region} in train/prices.yaml: pass --live to ask AWS"
        )
    usd = float(on_demand[instance_type])
    if market == "on-demand":
        source = f"{instance_type} on demand, {region}, {table['date']}"
        return Price(instance_type, market, region, usd, usd, usd, str(table["date"]), source, note=note)
    spot = table["spot_usd_per_hour"] if region in table["spot_regions"] else {}
    if instance_type not in spot:
        raise NoPrice(
            f"{instance_type} has no spot price in {region} in train/prices.yaml: pass --live to ask AWS"
        )
    low, high = (float(bound) for bound in spot[instance_type])
    regions = ", ".join(table["spot_regions"])
    source = f"{instance_type} spot, lowest and highest zone of {regions}, late 2025"
    middle = (low + high) / 2
    return Price(instance_type, market, region, middle, low, high, str(table["spot_date"]), source, note=note)


def _on_demand_table(table: dict[str, Any], region: str) -> dict[str, float]:
    if region == table["region"] or region in table["same_price_regions"]:
        return dict(table["usd_per_hour"])
    return dict(table["other_regions"].get(region, {}))


def known_regions() -> list[str]:
    """Regions that the file has prices for."""
    table = price_table()
    return [table["region"], *table["same_price_regions"], *table["other_regions"]]


def storage_usd_per_month(num_bytes: float, kind: StorageKind = "s3") -> float:
    """Dollars a month for `num_bytes` (GB of 10⁹ bytes) that stay in S3, on gp3, or in a snapshot."""
    return num_bytes / 1e9 * float(price_table()["storage"][f"{kind}_usd_per_gb_month"])


def side_usd_per_hour(root_gib: float, public_ipv4: bool = True) -> float:
    """What an instance costs an hour besides its own price: its gp3 root volume and its public address."""
    storage = price_table()["storage"]
    volume = root_gib * 2**30 / 1e9 * storage["ebs_gp3_usd_per_gb_month"] / HOURS_PER_MONTH
    return float(volume + (storage["public_ipv4_usd_per_hour"] if public_ipv4 else 0))


def mlflow_usd_per_month() -> float:
    """Of the lasting MLflow server in us-east-1: machine, public address, 12 GiB of system and 10 of data."""
    disks = storage_usd_per_month(22 * 2**30, "ebs_gp3")
    hourly = MLFLOW_USD_PER_HOUR + price_table()["storage"]["public_ipv4_usd_per_hour"]
    return float(hourly * HOURS_PER_MONTH + disks)
