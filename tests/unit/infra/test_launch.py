"""Starting again what has ended."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from infra.deployment import Base
from infra.errors import UserError
from infra.launch import cluster_variables, end_instances, wake
from tests.unit.infra.fake_cloud import FakeCloud, deployment, group

SPOT, FALLBACK = "sprint-mine-spot", "sprint-mine-on-demand"
WANTED: Any = SimpleNamespace(name="mine", capacity="spot-then-on-demand", num_nodes=2)


def answers() -> dict[str, Any]:
    names = ("resume_processes", "set_desired_capacity", "update_auto_scaling_group")
    return {f"autoscaling__{name}": {} for name in names}


def test_what_an_end_suspended_is_resumed_and_the_first_group_asked(tmp_path: Path) -> None:
    suspended = [{"ProcessName": "AZRebalance"}, {"ProcessName": "Launch"}]
    ended = group(SPOT, 0) | {"SuspendedProcesses": suspended}
    cloud: Any = FakeCloud(tmp_path, [ended, group(FALLBACK, 0)], **answers())
    wake(cloud, WANTED)
    assert cloud.aws.asked == [
        ("autoscaling:resume_processes", {"AutoScalingGroupName": SPOT, "ScalingProcesses": ["Launch"]}),
        ("autoscaling:set_desired_capacity", {"AutoScalingGroupName": SPOT, "DesiredCapacity": 2}),
    ]


def test_what_runs_on_demand_by_now_stays_there(tmp_path: Path) -> None:
    cloud: Any = FakeCloud(tmp_path, [group(SPOT, 0), group(FALLBACK, 2, "i-1", "i-2")], **answers())
    wake(cloud, WANTED)
    assert cloud.aws.asked == []


def test_without_its_group_nothing_is_said_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sprint-mine-spot is not there"):
        wake(FakeCloud(tmp_path, [], **answers()), WANTED)  # type: ignore[arg-type]


def test_ending_sets_every_group_to_nothing(tmp_path: Path) -> None:
    """The empty one, too: the alarm that waits for spot capacity would fill it a minute later."""
    cloud: Any = FakeCloud(tmp_path, [group(SPOT, 1), group(FALLBACK, 0)], **answers())
    end_instances(cloud, "mine", SimpleNamespace(say=print))  # type: ignore[arg-type]
    nothing = {"MinSize": 0, "MaxSize": 0, "DesiredCapacity": 0}
    assert cloud.aws.asked == [
        ("autoscaling:update_auto_scaling_group", {"AutoScalingGroupName": name} | nothing)
        for name in (SPOT, FALLBACK)
    ]


def test_nothing_is_started_before_what_ends_it_is_there(tmp_path: Path) -> None:
    """Terraform makes the groups empty: where it fails in the middle, nothing runs and costs."""
    outputs = {"vpc_id": "vpc-1", "subnet_ids": {"us-east-1a": "subnet-1"}}
    outputs |= {"role_name": "r", "instance_profile_name": "p"}
    base = Base(account_id="1", region="us-east-1", bucket="b", outputs=outputs)
    wanted: Any = MagicMock(zones=["us-east-1a"], num_nodes=1, kind="train", max_hours=20.0)
    wanted.limits.hours, wanted.limits.max_spot_price = 20.0, None
    cloud: Any = SimpleNamespace(region="us-east-1", bucket="b", own=lambda module: {})
    assert cluster_variables(cloud, base, wanted, deployment())["start"] is False
