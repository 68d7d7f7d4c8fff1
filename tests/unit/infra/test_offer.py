"""What a deployment can cost at most."""

from __future__ import annotations

import pytest

from infra.errors import UserError
from infra.offer import disks_usd_per_hour, find_offer, limit


def test_the_hours_hold_where_the_money_allows_them() -> None:
    limits = limit(max_usd=100, max_hours=20, worst_usd_per_hour=4.6)
    assert (limits.hours, limits.worst_usd, limits.max_spot_price) == (20, 92, None)


def test_the_money_shortens_the_hours_and_is_never_passed() -> None:
    limits = limit(max_usd=50, max_hours=20, worst_usd_per_hour=4.6)
    assert limits.hours == pytest.approx(10.87, abs=0.01)
    assert limits.worst_usd_per_hour * limits.hours <= 50 + 1e-9
    assert limits.reason == "--max-usd"


def test_on_spot_alone_the_price_is_capped_instead() -> None:
    """All twenty hours, since an instance dearer than the cap is not bought."""
    limits = limit(50, 20, 4.6, spot=(1.6, 0.04, 1))
    assert limits.hours == 20
    assert limits.max_spot_price == pytest.approx(2.46)
    assert limits.worst_usd_per_hour * limits.hours <= 50
    two = limit(50, 20, 9.2, spot=(1.0, 0.04, 2))
    assert two.max_spot_price == pytest.approx(1.21) and two.worst_usd_per_hour * 20 <= 50


def test_no_cap_below_what_the_market_takes() -> None:
    limits = limit(50, 20, 4.6, spot=(2.4, 0.04, 1))
    assert limits.max_spot_price is None and limits.hours < 11


def test_too_little_money_is_refused() -> None:
    with pytest.raises(UserError, match="pays 7 minutes"):
        limit(0.5, 20, 4.6)


def test_the_worst_price_is_that_on_demand_with_disk_and_address() -> None:
    spot = find_offer(["g6.12xlarge"], "spot-then-on-demand", "us-east-1", 200, None)
    assert 4.6 < spot.worst_usd < 4.7
    assert 1.5 < spot.expected_usd < 2.7, "the usual one is that of the spot market"
    demand = find_offer(["g6.12xlarge"], "on-demand", "us-east-1", 200, None)
    assert demand.expected_usd == demand.worst_usd == pytest.approx(spot.worst_usd)
    assert spot.market_usd == {"spot": spot.expected_usd, "on-demand": spot.worst_usd}
    dearest = find_offer(["g6.12xlarge", "p4d.24xlarge"], "on-demand", "us-east-1", 200, None)
    assert dearest.worst_usd > 21


def test_larger_and_faster_disks_count() -> None:
    usual = find_offer(["g6.12xlarge"], "on-demand", "us-east-1", 200)
    assert disks_usd_per_hour(3000, 250) == 0
    fast = disks_usd_per_hour(16_000, 1000)
    assert fast == pytest.approx((13_000 * 0.005 + 750 * 0.04) / 730, rel=0.03)
    large = find_offer(["g6.12xlarge"], "on-demand", "us-east-1", 700, more_usd=fast)
    assert large.worst_usd - usual.worst_usd == pytest.approx(fast + 500 * 1.0737 * 0.08 / 730, rel=0.01)
    with_data = disks_usd_per_hour(3000, 250, data_gib=100)
    assert with_data == pytest.approx((100 * 1.0737 * 0.08 + 125 * 0.04) / 730, rel=0.03)


def test_an_unknown_price_can_be_said() -> None:
    with pytest.raises(UserError, match="--usd-per-hour"):
        find_offer(["c9.huge"], "on-demand", "us-east-1", 200, None)
    assert find_offer(["c9.huge"], "on-demand", "us-east-1", 200, 1.25).worst_usd > 1.25
