"""What `status` understands of groups, activities and records."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from infra.commands.status import lines_of
from infra.deployment import Fetched
from infra.layout import End, Event, Keys, Node
from infra.watch import facts_of, look, what_costs
from tests.unit.infra.fake_cloud import FakeCloud, deployment, group

GROUP = "sprint-mine-spot"
KEYS = Keys("mine")


def put_node(cloud: FakeCloud, instance: str, **changes: Any) -> None:
    now = time.time()
    known = {"phase": "training", "since": now - 60, "updated": now - 20}
    cloud.folder.write(KEYS.node(instance), Node(instance=instance, **known | changes).to_json())


def put_event(cloud: FakeCloud, instance: str, kind: Any, ago: float) -> None:
    moment = time.time() - ago
    event = Event(kind=kind, time=moment, instance=instance)
    cloud.folder.write(KEYS.event(moment, instance, kind), event.to_json())


def test_a_living_instance_says_what_it_does(tmp_path: Path) -> None:
    cloud = FakeCloud(tmp_path, [group(GROUP, 1, "i-1")])
    put_node(cloud, "i-0", detail="of the instance before", updated=time.time())
    put_node(cloud, "i-1", phase="staging", detail="12 of 65 GB")
    seen = look(cloud, deployment())  # type: ignore[arg-type]
    assert (seen.state, seen.detail) == ("staging", "12 of 65 GB")
    assert seen.is_live


def test_one_that_fell_silent_is_not_believed(tmp_path: Path) -> None:
    cloud = FakeCloud(tmp_path, [group(GROUP, 1, "i-1")])
    put_node(cloud, "i-1", updated=time.time() - 1200)
    seen = look(cloud, deployment())  # type: ignore[arg-type]
    assert seen.state == "silent" and "i-1 has not been heard of for 20 minutes" in seen.detail


@pytest.mark.parametrize(
    ("message", "meaning"),
    [
        (
            "Could not launch Spot Instances. InsufficientInstanceCapacity - no such machines",
            "no such instance free",
        ),
        ("There is no Spot capacity available that matches your request.", "no spot capacity now"),
        ("You've reached your quota: VcpuLimitExceeded", "the quota of vCPUs is spent"),
        ("Something new", "no instance yet (Failed: Something new)"),
    ],
)
def test_it_says_why_it_waits(tmp_path: Path, message: str, meaning: str) -> None:
    activities = [
        {
            "StartTime": "2026-01-01",
            "StatusCode": "Successful",
            "Description": "Launching",
            "StatusMessage": "",
        },
        {
            "StartTime": "2026-01-02",
            "StatusCode": "Failed",
            "Description": "Launching",
            "StatusMessage": message,
        },
    ]
    answers = {"autoscaling__describe_scaling_activities": {"Activities": activities}}
    cloud = FakeCloud(tmp_path, [group(GROUP, 1)], **answers)
    seen = look(cloud, deployment())  # type: ignore[arg-type]
    assert seen.state == "waiting" and meaning in seen.detail
    assert any("last activity 2026-01-02" in line and message in line for line in lines_of(seen, time.time()))


def test_the_end_and_its_reason_come_first(tmp_path: Path) -> None:
    cloud = FakeCloud(tmp_path, [group(GROUP, 0)])
    end = End(status="stopped", reason="budget.max_usd=50 is spent", time=1.0)
    cloud.folder.write(KEYS.end, end.to_json())
    seen = look(cloud, deployment())  # type: ignore[arg-type]
    assert (seen.state, seen.detail, seen.is_live) == ("stopped", "budget.max_usd=50 is spent", False)


@pytest.mark.parametrize(
    ("stage", "deadline", "state"),
    [("uploading", 3600, "unfinished"), ("applying", 3600, "unfinished"), ("down", 3600, "down")],
)
def test_without_groups_the_record_says_what_it_is(
    tmp_path: Path, stage: str, deadline: int, state: str
) -> None:
    known = deployment(stage=stage, deadline=int(time.time()) + deadline)
    assert look(FakeCloud(tmp_path), known).state == state  # type: ignore[arg-type]


def test_past_its_hours_it_says_so(tmp_path: Path) -> None:
    cloud = FakeCloud(tmp_path, [group(GROUP, 0)])
    seen = look(cloud, deployment(deadline=int(time.time()) - 10))  # type: ignore[arg-type]
    assert seen.state == "deadline" and "python -m infra up starts it again" in seen.detail


def test_the_cost_counts_every_instance_and_no_gap(tmp_path: Path) -> None:
    """One hour of a gone one at $1.50, half an hour so far of a living one at the usual $2."""
    now = time.time()
    cloud = FakeCloud(tmp_path, [group(GROUP, 1, "i-2")])
    put_event(cloud, "i-1", "started", 7200)
    put_event(cloud, "i-1", "interrupted", 3600)
    put_node(cloud, "i-1", phase="interrupted", since=now - 3600, updated=now - 3600, price_usd_per_hour=1.5)
    put_event(cloud, "i-2", "started", 1800)
    put_node(cloud, "i-2", since=now - 600)
    seen = look(cloud, deployment())  # type: ignore[arg-type]
    assert seen.cost_usd == pytest.approx(1.5 + 1.0, rel=0.01)


def test_on_demand_instances_cost_what_they_cost(tmp_path: Path) -> None:
    """The fallback of spot-then-on-demand, half of whose cost was once not shown."""
    known = deployment(market_usd_per_hour={"spot": 2.0, "on-demand": 4.6})
    cloud = FakeCloud(
        tmp_path, [group("sprint-mine-on-demand", 1, "i-1")], s3__list_object_versions={"Versions": []}
    )
    put_event(cloud, "i-1", "started", 3600)
    put_node(cloud, "i-1", market="on-demand", since=time.time() - 3600)
    assert look(cloud, known).cost_usd == pytest.approx(4.6, rel=0.01)  # type: ignore[arg-type]
    assert what_costs(cloud, [known])[0].usd_per_hour == 4.6  # type: ignore[arg-type]


def test_a_group_that_aws_stopped_trying_says_so(tmp_path: Path) -> None:
    paused = {"ProcessName": "Launch", "SuspensionReason": "User suspended at 2026 after failing to launch"}
    cloud = FakeCloud(tmp_path, [group(GROUP, 1) | {"SuspendedProcesses": [paused]}])
    seen = look(cloud, deployment())  # type: ignore[arg-type]
    assert seen.state == "waiting" and "after failing to launch" in seen.detail
    assert "python -m infra up lets it try again" in seen.detail


def test_what_costs_money_is_named_with_its_price(tmp_path: Path) -> None:
    versions = [{"Key": "data/a", "Size": 60e9}, {"Key": "runs/mine/x", "Size": 5e9}]
    cloud = FakeCloud(tmp_path, [group(GROUP, 1, "i-1")], s3__list_object_versions={"Versions": versions})
    found = what_costs(cloud, [deployment(), deployment(name="gone", stage="down")])  # type: ignore[arg-type]
    instances, bucket = found
    assert instances.usd_per_hour == 2.0 and GROUP in instances.what
    assert bucket.usd_per_month == pytest.approx(65 * 0.023) and "65.0 GB" in bucket.what


def test_where_the_best_checkpoint_is(tmp_path: Path) -> None:
    cloud = FakeCloud(tmp_path, [group(GROUP, 0)])
    item = {"name": "step-20.pt", "step": 20, "sha256": "a" * 64, "bytes": 7}
    latest = {"checkpoints": [item], "best": "step-20.pt", "files": []}
    cloud.folder.write(KEYS.run + "latest.json", json.dumps(latest).encode())
    seen = look(cloud, deployment())  # type: ignore[arg-type]
    assert any("is in S3: python -m infra pull mine" in line for line in lines_of(seen, time.time()))
    fetched = Fetched(step=20, sha256="a" * 64, path="runs/mine/checkpoints/best.pt", time=1.0)
    seen = look(cloud, deployment(fetched=fetched))  # type: ignore[arg-type]
    assert any("is here: runs/mine" in line for line in lines_of(seen, time.time()))
    assert facts_of(seen)["best"]["step"] == 20  # type: ignore[index]
