"""Prices from the file and from AWS (through botocore's Stubber, with answers as AWS gives them)."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from botocore.stub import ANY, Stubber

from infra.aws import Aws
from infra.plan import live_prices
from infra.plan.live_prices import LivePrices, has_credentials
from infra.plan.prices import (
    NoPrice,
    mlflow_usd_per_month,
    price_of,
    side_usd_per_hour,
    storage_usd_per_month,
)
from tests.conftest import ROOT

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)


def test_prices_of_the_file_say_their_date_and_region() -> None:
    price = price_of("g6.12xlarge")
    assert price.usd_per_hour == price.low_usd_per_hour == price.high_usd_per_hour == 4.60
    assert price.date in price.source and "us-east-1" in price.source and not price.live
    spot = price_of("g6.12xlarge", "spot")
    assert (spot.low_usd_per_hour, spot.high_usd_per_hour) == (1.50, 2.60)
    assert price_of("g6.12xlarge", region="us-west-2").usd_per_hour == 4.60
    assert price_of("g6.12xlarge", region="eu-central-1").usd_per_hour == 5.75429


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("g6.13xlarge", "on-demand", "us-east-1"), "near name: g6.12xlarge.*--live"),
        (("g6.12xlarge", "on-demand", "mars-north-1"), "no price in mars-north-1"),
        (("g6.12xlarge", "spot", "eu-central-1"), "no spot price in eu-central-1.*--live"),
        (("p5.4xlarge", "spot", "us-east-1"), "no spot price"),
    ],
)
def test_missing_prices_are_sentences(arguments: tuple[Any, ...], sentence: str) -> None:
    with pytest.raises(NoPrice, match=sentence):
        price_of(*arguments)


def test_storage_is_billed_by_the_month() -> None:
    assert storage_usd_per_month(65e9) == pytest.approx(1.495)
    assert storage_usd_per_month(100e9, "ebs_gp3") == pytest.approx(8.0)
    assert storage_usd_per_month(100e9, "ebs_snapshot") == pytest.approx(5.0)
    assert side_usd_per_hour(100) == pytest.approx(107.4 * 0.08 / 730 + 0.005, rel=0.01)
    assert side_usd_per_hour(0, public_ipv4=False) == 0


def product(usd: str, unit: str = "Hrs") -> str:
    """One product of the price list; AWS sends each as a text."""
    dimension = {"unit": unit, "pricePerUnit": {"USD": usd}, "description": "$… per On Demand Linux …"}
    term = {"priceDimensions": {"SKU.JRTCKXETXF.6YS6EN2CT7": dimension}, "sku": "SKU"}
    return json.dumps({"product": {"sku": "SKU"}, "terms": {"OnDemand": {"SKU.JRTCKXETXF": term}}})


def spot_row(zone: str, usd: str, hours_ago: int, name: str = "g6.12xlarge") -> dict[str, Any]:
    return {
        "AvailabilityZone": zone,
        "InstanceType": name,
        "ProductDescription": "Linux/UNIX",
        "SpotPrice": usd,
        "Timestamp": NOW - timedelta(hours=hours_ago),
    }


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


@pytest.fixture
def stubs(keys: None) -> tuple[Aws, Stubber, Stubber]:
    aws = Aws("us-east-1")
    pricing, ec2 = Stubber(aws.client("pricing")), Stubber(aws.client("ec2"))
    pricing.activate()
    ec2.activate()
    return aws, pricing, ec2


def test_aws_says_prices_by_zone(stubs: tuple[Aws, Stubber, Stubber]) -> None:
    aws, pricing, ec2 = stubs
    wanted = {"ServiceCode": "AmazonEC2", "Filters": ANY, "MaxResults": 20}
    answer = {"PriceList": [product("0.0000000000"), product("4.9000000000"), product("9", unit="Quantity")]}
    pricing.add_response("get_products", answer, wanted)
    history = [
        spot_row("us-east-1a", "2.40", 1),
        spot_row("us-east-1a", "2.00", 9),
        spot_row("us-east-1a", "2.20", 5),
        spot_row("us-east-1b", "1.90", 2),
    ]
    ec2.add_response("describe_spot_price_history", {"SpotPriceHistory": history})
    prices = LivePrices("us-east-1", aws, aws)
    on_demand, spot = (prices.price_of("g6.12xlarge", market) for market in ("on-demand", "spot"))
    assert on_demand.usd_per_hour == 4.9 and on_demand.live and not prices.notes
    assert [zone.zone for zone in spot.zones] == ["us-east-1b", "us-east-1a"]
    dear = spot.zones[1]
    assert (dear.minimum_usd, dear.median_usd, dear.latest_usd) == (2.0, 2.2, 2.4)
    assert (spot.low_usd_per_hour, spot.usd_per_hour, spot.high_usd_per_hour) == (1.9, 1.9, 2.2)
    pricing.assert_no_pending_responses()


def test_the_file_stands_in_with_a_sentence_that_names_its_date(stubs: tuple[Aws, Stubber, Stubber]) -> None:
    aws, pricing, ec2 = stubs
    pricing.add_client_error("get_products", "AccessDeniedException", "not authorized: pricing:GetProducts")
    ec2.add_response("describe_spot_price_history", {"SpotPriceHistory": [spot_row("us-east-1c", "1.75", 1)]})
    prices = LivePrices("us-east-1", aws, aws)
    price = prices.price_of("g6.12xlarge")
    assert price.usd_per_hour == 4.60 and not price.live
    assert "2025-11-30" in price.note and "on-demand prices" in price.note
    assert prices.price_of("g6.12xlarge", "spot").live  # the other question was answered
    assert len(prices.notes) == 1


def test_what_aws_does_not_sell_there_has_no_price(stubs: tuple[Aws, Stubber, Stubber]) -> None:
    aws, pricing, ec2 = stubs
    pricing.add_response("get_products", {"PriceList": []})
    ec2.add_response("describe_spot_price_history", {"SpotPriceHistory": []})
    prices = LivePrices("us-east-1", aws, aws)
    for market in ("on-demand", "spot"):
        with pytest.raises(NoPrice, match=r"AWS sells no g6\.12xlarge"):
            prices.price_of("g6.12xlarge", market)  # type: ignore[arg-type]


def test_an_aws_that_cannot_be_reached_is_asked_once(keys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    price = price_of("g6.12xlarge", "spot", live=True)
    assert not price.live and price.usd_per_hour == 2.05
    assert "cannot be reached" in price.note and "2025-11-30" in price.note
    assert "on-demand prices and no spot prices" in price.note


def test_aws_is_asked_by_itself_only_with_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_credentials()
    assert not price_of("g6.12xlarge", live=None).live
    asked = []
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setattr(live_prices.LivePrices, "load", lambda self, names: asked.append(list(names)))
    monkeypatch.setattr(live_prices.LivePrices, "price_of", lambda self, *a: self.load([a[0]]))
    assert has_credentials()
    price_of("g6.12xlarge", live=None)
    assert asked == [["g6.12xlarge"]]


def test_the_mlflow_server_costs_what_the_page_says() -> None:
    [row] = re.findall(r"^\| MLflow server.*?\| ([0-9.]+) \|", (ROOT / "docs/cloud.md").read_text(), re.M)
    assert float(row) == pytest.approx(mlflow_usd_per_month(), abs=0.05)
