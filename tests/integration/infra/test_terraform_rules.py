"""Plans of both modules against the rules, rules against broken plans, and the modules' own tests."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.infra.terraform import REGION, Cloud, Module, cluster_variables
from tests.integration.infra.terraform_rules import faults, resources

BASE_OUTPUTS = {
    "region": REGION,
    "bucket": "sprint-123456789012-us-east-1",
    "vpc_id": "vpc-0123456789abcdef0",
    "subnet_ids": {"us-east-1a": "subnet-0123456789abcdef0"},
    "role_name": "sprint-instance-us-east-1",
    "instance_profile_name": "sprint-instance-us-east-1",
    "mlflow_security_group_id": "sg-0123456789abcdef0",
    "data_snapshot_id": "snap-0123456789abcdef0",
}
# What a local AWS cannot apply is in this plan.
ALL_OF_CLUSTER = cluster_variables(
    BASE_OUTPUTS,
    num_nodes=2,
    enable_efa=True,
    enable_placement_group=True,
    enable_budget=True,
    max_usd=100,
    notify_email="me@example.org",
    enable_asg_notifications=True,
)
# A container does not see EFA.
WITH_IMAGE = ALL_OF_CLUSTER | {
    "enable_efa": False,
    "image": "123456789012.dkr.ecr.us-east-1.amazonaws.com/sprint:1",
}
ALL_OF_BASE = {
    "region": REGION,
    "enable_mlflow": True,
    "data_volume_gib": 100,
    "enable_data_snapshot": True,
}


@pytest.fixture(scope="module")
def base(
    cloud: Cloud, terraform_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Module:
    return Module("base", tmp_path_factory.mktemp("base"), terraform_environment | cloud.environment)


@pytest.fixture(scope="module")
def cluster(
    cloud: Cloud, terraform_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Module:
    return Module("cluster", tmp_path_factory.mktemp("cluster"), terraform_environment | cloud.environment)


@pytest.fixture(scope="module")
def base_plan(base: Module) -> dict[str, Any]:
    return base.plan(ALL_OF_BASE)


@pytest.fixture(scope="module")
def cluster_plan(cluster: Module) -> dict[str, Any]:
    return cluster.plan(ALL_OF_CLUSTER)


def test_plans_break_no_rule(
    base_plan: dict[str, Any], cluster_plan: dict[str, Any], cluster: Module
) -> None:
    assert faults(base_plan) == []
    assert faults(cluster_plan) == []
    with_image = cluster.plan(WITH_IMAGE)
    assert faults(with_image) == []
    assert any("ecr:BatchGetImage" in str(item.values) for item in resources(with_image))
    types = {resource.type for resource in resources(base_plan) + resources(cluster_plan)}
    assert {"aws_instance", "aws_s3_bucket_policy", "aws_placement_group", "aws_budgets_budget"} <= types


def test_the_bucket_asks_for_tls(base_plan: dict[str, Any]) -> None:
    [document] = [
        item for item in resources(base_plan) if item.address == "data.aws_iam_policy_document.bucket"
    ]
    conditions = {
        (statement["effect"], condition["variable"], *condition["values"])
        for statement in document.values["statement"]
        for condition in statement["condition"]
    }
    assert conditions == {("Deny", "aws:SecureTransport", "false"), ("Deny", "s3:TlsVersion", "1.2")}


Break = Callable[[dict[str, Any]], None]
"""Takes the values of a resource and makes them bad."""


def _set(*path: str | int, to: Any) -> Break:
    def change(values: Any) -> None:
        for step in path[:-1]:
            values = values[step]
        values[path[-1]] = to

    return change


TEMPLATE, GROUP = 'aws_launch_template.this["spot"]', 'aws_autoscaling_group.this["spot"]'
BROKEN: list[tuple[str, str, Break, str]] = [
    (
        "cluster",
        'aws_vpc_security_group_ingress_rule.efa["efa"]',
        _set("cidr_ipv4", to="0.0.0.0/0"),
        "lets in",
    ),
    (
        "cluster",
        'aws_vpc_security_group_ingress_rule.efa["efa"]',
        _set("cidr_ipv6", to="::/0"),
        "lets in",
    ),
    (
        "cluster",
        'aws_vpc_security_group_egress_rule.internet["https"]',
        _set("ip_protocol", to="-1"),
        "out to",
    ),
    (
        "cluster",
        'aws_vpc_security_group_egress_rule.internet["http"]',
        _set("description", to="Ubuntu's archives"),
        "EC2 refuses",
    ),
    ("cluster", TEMPLATE, _set("metadata_options", 0, "http_tokens", to="optional"), "IMDSv1"),
    ("cluster", TEMPLATE, _set("metadata_options", 0, "http_put_response_hop_limit", to=2), "hop limit"),
    ("cluster", TEMPLATE, _set("metadata_options", to=[]), "IMDSv1"),
    (
        "cluster",
        TEMPLATE,
        _set("block_device_mappings", 0, "ebs", 0, "encrypted", to="false"),
        "not encrypted",
    ),
    (
        "cluster",
        TEMPLATE,
        _set("block_device_mappings", 1, "ebs", 0, "delete_on_termination", to="false"),
        "leaves a disk behind",
    ),
    ("cluster", TEMPLATE, _set("instance_initiated_shutdown_behavior", to="stop"), "shuts down stays"),
    ("cluster", TEMPLATE, _set("tag_specifications", to=[]), "without tags"),
    ("cluster", GROUP, _set("tag", to=[]), "has no tag Deployment, ManagedBy, Project"),
    ("cluster", GROUP, _set("min_size", to=1), "cannot be set to 0"),
    ("cluster", GROUP, _set("suspended_processes", to=None), "for balance"),
    ("cluster", GROUP, _set("capacity_rebalance", to=True), "second instance"),
    (
        "cluster",
        'aws_autoscaling_schedule.reaper["spot"]',
        _set("max_size", to=1),
        "does not end everything",
    ),
    (
        "cluster",
        "data.aws_iam_policy_document.this",
        _set("statement", 0, "actions", to=["autoscaling:*"]),
        "allows the actions autoscaling:*",
    ),
    (
        "cluster",
        "data.aws_iam_policy_document.this",
        _set("statement", 0, "resources", to=["*"]),
        "allows autoscaling:SetDesiredCapacity on every resource",
    ),
    (
        "cluster",
        "data.aws_iam_policy_document.topic",
        _set("statement", 0, "principals", 0, "identifiers", to=["*"]),
        "to anybody",
    ),
    (
        "base",
        "data.aws_iam_policy_document.instance",
        _set("statement", 0, "resources", to=["arn:aws:s3:::bucket/*"]),
        "on a whole bucket",
    ),
    ("base", "aws_ebs_volume.data[0]", _set("encrypted", to=False), "is not encrypted"),
    (
        "base",
        "aws_instance.mlflow[0]",
        _set("root_block_device", 0, "encrypted", to=None),
        "not encrypted",
    ),
    ("base", "aws_instance.mlflow[0]", _set("metadata_options", 0, "http_tokens", to=None), "IMDSv1"),
    ("base", "aws_s3_bucket_public_access_block.this", _set("block_public_policy", to=False), "is off"),
    (
        "base",
        "aws_s3_bucket_versioning.this",
        _set("versioning_configuration", 0, "status", to="Suspended"),
        "keeps no versions",
    ),
    ("base", 'aws_subnet.this["us-east-1a"]', _set("map_public_ip_on_launch", to=True), "public address"),
    (
        "base",
        "aws_default_security_group.this",
        _set("ingress", to=[{"cidr_blocks": ["0.0.0.0/0"]}]),
        "inside the group",
    ),
    ("base", "aws_vpc.this", _set("tags_all", to={"Name": "sprint"}), "has no tag"),
]


@pytest.mark.parametrize(("module", "address", "change", "fault"), BROKEN)
def test_a_broken_plan_is_noticed(
    module: str,
    address: str,
    change: Break,
    fault: str,
    base_plan: dict[str, Any],
    cluster_plan: dict[str, Any],
) -> None:
    plan = copy.deepcopy(base_plan if module == "base" else cluster_plan)
    [changed] = [item for item in plan["resource_changes"] if item["address"] == address]
    change(changed["change"]["after"])
    found = faults(plan)
    assert found and all(sentence.startswith(f"{address}: ") for sentence in found)
    assert any(fault in sentence for sentence in found)


def test_user_data_that_is_too_long_is_refused(
    terraform_environment: dict[str, str], cloud: Cloud, tmp_path: Path
) -> None:
    module = Module("cluster", tmp_path, terraform_environment | cloud.environment)
    (module.bootstrap / "sprint-much").write_text(os.urandom(12 << 10).hex())
    assert "more than the 16 KiB that EC2 allows" in module.refusal(ALL_OF_CLUSTER)


@pytest.mark.parametrize("name", ["base", "cluster"])
def test_the_module_tests_itself(name: str, request: pytest.FixtureRequest) -> None:
    """`terraform validate` and `terraform test`, with a provider that makes everything up."""
    module: Module = request.getfixturevalue(name)
    module.init()
    module.run("validate", "-no-color")
    done = module.run("test", "-no-color")
    assert re.search(r"Success! \d+ passed, 0 failed", done.stdout)
