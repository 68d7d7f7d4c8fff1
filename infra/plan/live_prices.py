"""Prices as AWS says them now; whatever it does not say comes from the dated file, with a sentence on why.

Needs `pricing:GetProducts` and `ec2:DescribeSpotPriceHistory`.

Example:
    >>> LivePrices("us-east-1").price_of("g6.12xlarge", "spot").zones[0].zone
    'us-east-1c'
"""

from __future__ import annotations

import json
import os
import statistics
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

from infra.aws import Aws
from infra.errors import UserError
from infra.plan.prices import Market, NoPrice, Price, ZonePrice, file_price, price_table

PRICE_LIST_REGION = "us-east-1"  # the price list is served in few regions, and knows the prices of all
SPOT_HOURS = 24
WORKERS = 8
UNREACHABLE = "cannot be reached"
LINUX = ("Linux/UNIX", "Linux/UNIX (Amazon VPC)")


def has_credentials() -> bool:
    """Whether AWS can be asked at all; looks at files and variables, and asks nobody."""
    if os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_PROFILE"):
        return True
    try:
        import botocore.session
    except ImportError:
        return False
    session = botocore.session.Session()
    try:
        return bool(session.available_profiles)
    except Exception:  # a configuration that cannot be read is none
        return False


class LivePrices:
    """Prices of one region, each asked once.

    Attributes:
        notes: a sentence for each question that AWS did not answer.
    """

    def __init__(self, region: str, aws: Aws | None = None, price_list: Aws | None = None) -> None:
        self.region = region
        self.notes: list[str] = []
        self._aws, self._price_list = aws, price_list
        self._on_demand: dict[str, float] = {}
        self._zones: dict[str, tuple[ZonePrice, ...]] = {}
        self._asked: set[str] = set()
        self._failed: set[str] = set()

    def load(self, instance_types: Sequence[str]) -> None:
        """Ask for these types together."""
        new = [name for name in instance_types if name not in self._asked]
        self._asked |= set(new)
        if not new:
            return
        unanswered: dict[str, list[str]] = {}
        for what, ask in (
            ("on-demand prices", self._ask_on_demand),
            ("spot prices", self._ask_spot),
        ):
            reason = next((sentence for sentence in unanswered if UNREACHABLE in sentence), None)
            if reason is None:  # else the next question would wait for nothing, too
                try:
                    ask(new)
                    continue
                except (UserError, ValueError, KeyError) as error:
                    reason = str(error) or type(error).__name__
            self._failed.add(what)
            unanswered.setdefault(reason, []).append(what)
        day = price_table()["date"]
        for reason, missing in unanswered.items():
            what = " and no ".join(missing)
            self.notes.append(f"AWS gave no {what} ({reason}): those of {day} in train/prices.yaml are used")

    def price_of(self, instance_type: str, market: Market = "on-demand") -> Price:
        """As `prices.price_of` with live=True. Raises NoPrice."""
        self.load([instance_type])
        today = datetime.now(UTC).date().isoformat()
        if market == "on-demand" and instance_type in self._on_demand:
            usd = self._on_demand[instance_type]
            source = f"{instance_type} on demand, {self.region}, asked of AWS on {today}"
            return Price(instance_type, market, self.region, usd, usd, usd, today, source, live=True)
        if market == "spot" and self._zones.get(instance_type):
            zones = self._zones[instance_type]
            low, high = zones[0].minimum_usd, max(zone.median_usd for zone in zones)
            source = (
                f"{instance_type} spot, {len(zones)} zones of {self.region}, last {SPOT_HOURS} h on {today}"
            )
            return Price(
                instance_type,
                market,
                self.region,
                zones[0].median_usd,
                min(low, zones[0].median_usd),
                high,
                today,
                source,
                live=True,
                zones=zones,
            )
        what = "on-demand prices" if market == "on-demand" else "spot prices"
        if what not in self._failed:
            raise NoPrice(f"AWS sells no {instance_type} {market.replace('-', ' ')} in {self.region}")
        note = next((note for note in self.notes if what in note), "")
        return file_price(instance_type, market, self.region, note=note)

    def _ask_on_demand(self, names: Sequence[str]) -> None:
        client = self._price_list or Aws(PRICE_LIST_REGION)
        first = self._products(client, names[0])  # alone: where it fails, the others would, too
        with ThreadPoolExecutor(WORKERS) as pool:
            answers = [first, *pool.map(lambda name: self._products(client, name), names[1:])]
        for name, usd in zip(names, answers, strict=True):
            if usd is not None:
                self._on_demand[name] = usd

    def _products(self, client: Aws, name: str) -> float | None:
        wanted = {
            "instanceType": name,
            "regionCode": self.region,
            "operatingSystem": "Linux",
            "tenancy": "Shared",
            "preInstalledSw": "NA",
            "capacitystatus": "Used",
        }
        filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in wanted.items()]
        answer = client.call(
            "pricing", "get_products", ServiceCode="AmazonEC2", Filters=filters, MaxResults=20
        )
        prices = [usd for text in answer["PriceList"] if (usd := _usd_per_hour(json.loads(text)))]
        return min(prices, default=None)

    def _ask_spot(self, names: Sequence[str]) -> None:
        self._aws = self._aws or Aws(self.region)
        history: dict[tuple[str, str], list[tuple[datetime, float]]] = defaultdict(list)
        for row in self._aws.pages(
            "ec2",
            "describe_spot_price_history",
            "SpotPriceHistory",
            InstanceTypes=list(names),
            ProductDescriptions=list(LINUX),
            StartTime=datetime.now(UTC) - timedelta(hours=SPOT_HOURS),
        ):
            place = row["InstanceType"], row["AvailabilityZone"]
            history[place].append((row["Timestamp"], float(row["SpotPrice"])))
        found: dict[str, list[ZonePrice]] = defaultdict(list)
        for (name, zone), rows in history.items():
            values = [usd for _, usd in rows]
            latest = max(rows, key=lambda row: row[0])[1]
            found[name].append(ZonePrice(zone, min(values), statistics.median(values), latest))
        self._zones |= {
            name: tuple(sorted(zones, key=lambda zone: (zone.median_usd, zone.zone)))
            for name, zones in found.items()
        }


def _usd_per_hour(product: dict[str, Any]) -> float | None:
    """The on-demand price of a product of the price list; None for reservations and what costs nothing."""
    for term in product.get("terms", {}).get("OnDemand", {}).values():
        for dimension in term["priceDimensions"].values():
            usd = float(dimension["pricePerUnit"].get("USD", 0))
            if dimension.get("unit") == "Hrs" and usd > 0:
                return usd
    return None
