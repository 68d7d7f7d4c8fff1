"""What `up` promises about money: the most that it can cost, what is expected, and what stays afterwards.

The guard is time: whatever happens, all instances end at the deadline, so the most is (price of an hour at
its worst) × hours. On the spot market alone the price itself can be capped, so that all hours fit the money.

Example:
    >>> limits = limit(max_usd=50, max_hours=20, worst_usd_per_hour=4.61)
    >>> round(limits.hours, 2), round(limits.worst_usd, 2)
    (10.85, 50.0)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from infra.deployment import Capacity
from infra.errors import UserError
from infra.plan.prices import NoPrice, Price, price_of, side_usd_per_hour
from infra.preflight import markets_of

MARGIN = 1.2  # a cap on the spot price below this many times the usual one would leave the run waiting
SHORTEST_HOURS = 0.25
LONGEST_HOURS = 720
IOPS_USD = 0.005 / 730  # an hour, of each operation a second beyond 3000
THROUGHPUT_USD = 0.007  # an hour, of the root volume's 250 MiB/s: 125 are free, each more is $0.04 a month


@dataclass(frozen=True)
class Offer:
    """The price of an hour of one node.

    Attributes:
        worst_usd: it cannot cost more. expected_usd: the usual one.
        side_usd: disk and address, contained in all of them.
        words: the price, where it comes from, and its date.
        market_usd: the usual one of each market that may be used.
        zones: the cheapest first, where AWS said what spot instances cost in each.
    """

    worst_usd: float
    expected_usd: float
    side_usd: float
    words: str
    market_usd: dict[str, float] = field(default_factory=dict)
    zones: tuple[str, ...] = ()


@dataclass(frozen=True)
class Limits:
    """Hours until everything ends; the most that this costs; the most that may be bid for a spot instance."""

    hours: float
    worst_usd: float
    worst_usd_per_hour: float
    max_spot_price: float | None
    reason: str


def find_offer(
    instance_types: list[str],
    capacity: Capacity,
    region: str,
    root_gib: float,
    usd_per_hour: float | None = None,
    is_offline: bool = False,
    more_usd: float = 0.0,
) -> Offer:
    """The dearest of the types counts.

    Args:
        usd_per_hour: the user's own figure, instead of price file and AWS.
        is_offline: the price file counts, even where AWS could be asked.
        more_usd: of an hour of other disks, or faster ones (`disks_usd_per_hour`).

    Raises:
        UserError: nobody knows a price.
    """
    side = side_usd_per_hour(root_gib) + THROUGHPUT_USD + more_usd
    if usd_per_hour is not None:
        return Offer(usd_per_hour + side, usd_per_hour + side, side, f"${usd_per_hour:g} an hour, as you say")
    offers = [_offer(instance_type, capacity, region, side, is_offline) for instance_type in instance_types]
    return max(offers, key=lambda offer: offer.worst_usd)


def _offer(instance_type: str, capacity: Capacity, region: str, side: float, is_offline: bool) -> Offer:
    live = False if is_offline else None  # None: where there are credentials
    spot: Price | None = None
    try:
        if "spot" in markets_of(capacity):
            spot = price_of(instance_type, "spot", region, live)
    except NoPrice:
        pass
    try:
        on_demand = price_of(instance_type, "on-demand", region, live)
    except NoPrice as error:
        raise UserError(f"{error}; or say its price with --usd-per-hour") from None
    usual = spot or on_demand
    words = f"{on_demand.source}: ${on_demand.usd_per_hour:.2f} an hour"
    if spot is not None:
        words = (
            f"{spot.source}: ${spot.low_usd_per_hour:.2f}–{spot.high_usd_per_hour:.2f} an hour; on demand "
            f"${on_demand.usd_per_hour:.2f} ({on_demand.date}), which spot never exceeds"
        )
    if note := (usual.note or on_demand.note):
        words += f" ({note})"
    known = {"on-demand": on_demand, "spot": usual}
    by_market = {market: known[market].usd_per_hour + side for market in markets_of(capacity)}
    zones = tuple(zone.zone for zone in usual.zones)
    return Offer(on_demand.usd_per_hour + side, usual.usd_per_hour + side, side, words, by_market, zones)


def disks_usd_per_hour(iops: float, throughput: float, data_gib: float = 0.0) -> float:
    """What an hour costs more than with the usual root volume: a faster one, and one for data of its own.

    Args:
        iops, throughput: of each volume; 3000, and 250 MiB/s, are the usual ones.
    """
    faster = max(0.0, iops - 3000) * IOPS_USD + (throughput - 250) / 125 * THROUGHPUT_USD
    if not data_gib:
        return faster
    return 2 * faster + THROUGHPUT_USD + side_usd_per_hour(data_gib, public_ipv4=False)


def limit(
    max_usd: float,
    max_hours: float,
    worst_usd_per_hour: float,
    spot: tuple[float, float, int] | None = None,
) -> Limits:
    """Hours that the money allows at the worst price.

    Args:
        worst_usd_per_hour: of all nodes together.
        spot: where all of it is on the spot market: (usual price of a node, its side costs, nodes).

    Raises:
        UserError: too little for a quarter of an hour, or more than a month.
    """
    if max_hours > LONGEST_HOURS:
        raise UserError(f"--max-hours {max_hours:g} is more than {LONGEST_HOURS}: that is a month")
    if worst_usd_per_hour * max_hours <= max_usd:
        return Limits(max_hours, worst_usd_per_hour * max_hours, worst_usd_per_hour, None, "--max-hours")
    if spot is not None:
        usual, side, num_nodes = spot
        cap = math.floor((max_usd / max_hours / num_nodes - side) * 1000) / 1000
        if cap >= MARGIN * (usual - side):
            worst = (cap + side) * num_nodes
            return Limits(
                max_hours, worst * max_hours, worst, cap, "--max-hours, and a cap on the spot price"
            )
    hours = max_usd / worst_usd_per_hour
    if hours < SHORTEST_HOURS:
        raise UserError(
            f"--max-usd {max_usd:g} pays {hours * 60:.0f} minutes at ${worst_usd_per_hour:.2f} an hour: "
            "allow more, or choose a smaller --instance-type"
        )
    return Limits(hours, max_usd, worst_usd_per_hour, None, "--max-usd")
