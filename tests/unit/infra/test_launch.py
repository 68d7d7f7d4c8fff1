"""Starting again what has ended."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from infra import machines
from infra.deployment import Base
from infra.errors import UserError
from infra.launch import apply_cluster, cluster_variables, end_instances, wake
from infra.offer import Offer
from infra.terraform_cli import TerraformFailed
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


class RefusingTerraform:
    """Fails with these faults as long as a budget is asked for."""

    def __init__(self, *faults: str) -> None:
        self.faults, self.applied = faults, 0

    def apply(self, variables: dict[str, Any]) -> None:
        if variables.get("enable_budget", True):
            raise TerraformFailed("terraform apply of cluster failed", self.faults)
        self.applied += 1


BUDGET = "creating Budget (1:sprint-mine): AccessDeniedException: Account 1 is a linked account"


def test_an_account_that_may_have_no_budget_alarm_still_trains() -> None:
    said: list[str] = []
    terraform: Any = RefusingTerraform(BUDGET)
    apply_cluster(terraform, {"max_usd": 5}, SimpleNamespace(warn=said.append))  # type: ignore[arg-type]
    assert terraform.applied == 1
    assert "refuses this account a budget alarm" in said[0] and "linked account" in said[0]


def test_other_faults_of_terraform_are_not_passed_over() -> None:
    terraform: Any = RefusingTerraform(BUDGET, "creating EC2 Launch Template: UnauthorizedOperation")
    with pytest.raises(TerraformFailed):
        apply_cluster(terraform, {}, SimpleNamespace(warn=print))  # type: ignore[arg-type]
    assert terraform.applied == 0


def test_several_nodes_go_to_the_cheapest_zone_that_has_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offered = [{"Location": f"us-east-1{letter}"} for letter in "abc"]
    cloud: Any = FakeCloud(tmp_path, ec2__describe_instance_type_offerings={"InstanceTypeOfferings": offered})
    cloud.own = lambda module: {}
    offer = Offer(4.6, 2.0, 0.04, "a price", zones=("us-east-1d", "us-east-1c", "us-east-1a"))
    monkeypatch.setattr(machines, "find_offer", lambda *arguments: offer)
    options = ["--max-usd", "5", "--max-hours", "1", "--instance-type", "g6.12xlarge"]
    parser = argparse.ArgumentParser()
    machines.add_machine_arguments(parser)

    def zones(*more: str) -> list[str]:
        return machines.look_at_machines(cloud, parser.parse_args([*options, *more]))[2]

    assert zones() == ["us-east-1a", "us-east-1b", "us-east-1c"]
    assert zones("--num-nodes", "2") == ["us-east-1c"]
    assert zones("--num-nodes", "2", "--zone", "us-east-1b") == ["us-east-1b"]
    with pytest.raises(UserError, match="--zone us-east-1d offers no g6"):
        zones("--zone", "us-east-1d")
