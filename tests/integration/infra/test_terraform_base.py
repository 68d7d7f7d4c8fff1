"""`base` on a local AWS, with the real provider: what is there after an apply, what after a destroy."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.integration.infra.terraform import ACCOUNT, REGION, Cloud, Module, base_variables
from tests.integration.infra.terraform_rules import faults

BUCKET = f"sprint-{ACCOUNT}-{REGION}"
VARIABLES = base_variables(
    availability_zones=["us-east-1c", "us-east-1a"],
    checkpoint_days=2,
    enable_lifecycle=True,
    enable_mlflow=True,
    data_volume_gib=10,
    enable_data_snapshot=True,
)

# CI applies and destroys both modules in test_story; here each resource is looked at.
pytestmark = pytest.mark.long


@dataclass(frozen=True)
class Base:
    module: Module
    outputs: dict[str, Any]


@pytest.fixture(scope="module")
def base(
    cloud: Cloud, terraform_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Base]:
    cloud.reset()
    module = Module("base", tmp_path_factory.mktemp("base"), terraform_environment | cloud.environment)
    yield Base(module, module.apply(VARIABLES))
    cloud.reset()


def test_breaks_no_rule(base: Base) -> None:
    assert faults(base.module.show()) == []


def test_the_bucket_is_private_encrypted_and_keeps_versions(base: Base, cloud: Cloud) -> None:
    s3 = cloud.client("s3")
    assert base.outputs["bucket"] == BUCKET
    assert set(s3.get_public_access_block(Bucket=BUCKET)["PublicAccessBlockConfiguration"].values()) == {True}
    [rule] = s3.get_bucket_encryption(Bucket=BUCKET)["ServerSideEncryptionConfiguration"]["Rules"]
    assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    assert s3.get_bucket_versioning(Bucket=BUCKET)["Status"] == "Enabled"
    [rule] = s3.get_bucket_ownership_controls(Bucket=BUCKET)["OwnershipControls"]["Rules"]
    assert rule["ObjectOwnership"] == "BucketOwnerEnforced"


def test_old_versions_and_unfinished_uploads_go(base: Base, cloud: Cloud) -> None:
    rules = cloud.client("s3").get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"]
    by_prefix = {rule["Filter"].get("Prefix", ""): rule for rule in rules if rule["Status"] == "Enabled"}
    assert by_prefix[""]["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] == 2
    assert by_prefix["runs/"]["NoncurrentVersionExpiration"]["NoncurrentDays"] == 2
    assert by_prefix["infra/"]["NoncurrentVersionExpiration"]["NoncurrentDays"] == 90
    # Nothing that is present expires, but logs.
    assert {prefix for prefix, rule in by_prefix.items() if "Days" in rule.get("Expiration", {})} == {"logs/"}


def test_nobody_comes_in(base: Base, cloud: Cloud) -> None:
    ec2 = cloud.client("ec2")
    here = [{"Name": "vpc-id", "Values": [base.outputs["vpc_id"]]}]
    groups = ec2.describe_security_groups(Filters=here)["SecurityGroups"]
    assert len(groups) == 2  # the default one, and MLflow's
    assert [rule for group in groups for rule in group["IpPermissions"]] == []
    subnets = ec2.describe_subnets(Filters=here)["Subnets"]
    assert {subnet["AvailabilityZone"]: subnet["SubnetId"] for subnet in subnets} == base.outputs[
        "subnet_ids"
    ]
    assert {subnet["MapPublicIpOnLaunch"] for subnet in subnets} == {False}
    [endpoint] = ec2.describe_vpc_endpoints(Filters=here)["VpcEndpoints"]
    assert (endpoint["VpcEndpointType"], endpoint["ServiceName"]) == (
        "Gateway",
        f"com.amazonaws.{REGION}.s3",
    )


def policy_of(cloud: Cloud, role: str) -> list[dict[str, Any]]:
    iam = cloud.client("iam")
    assert iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"] == []
    [name] = iam.list_role_policies(RoleName=role)["PolicyNames"]
    statements: list[dict[str, Any]] = iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"][
        "Statement"
    ]
    return statements


def allowed(statements: list[dict[str, Any]], action: str) -> set[str]:
    """Resources on which it is allowed, those of the bucket by what follows its name."""
    found: set[str] = set()
    for statement in statements:
        assert statement["Effect"] == "Allow"
        actions, names = statement["Action"], statement["Resource"]
        if action in ([actions] if isinstance(actions, str) else actions):
            found |= {names} if isinstance(names, str) else set(names)
    return {name.removeprefix(f"arn:aws:s3:::{BUCKET}") for name in found}


def test_an_instance_may_do_what_it_needs_and_no_more(base: Base, cloud: Cloud) -> None:
    statements = policy_of(cloud, base.outputs["role_name"])
    own = {"/runs/*", "/jobs/*", "/reports/*", "/logs/*"}
    assert allowed(statements, "s3:GetObject") == own | {"/data/*", "/code/*", "/wheels/*"}
    assert allowed(statements, "s3:PutObject") == allowed(statements, "s3:DeleteObject") == own
    assert (
        allowed(statements, "s3:ListBucket") == allowed(statements, "s3:ListBucketMultipartUploads") == {""}
    )
    # With a condition, S3 answers "denied" where an object is not there, and no run would ever start.
    for name in (base.outputs["role_name"], "sprint-mlflow-us-east-1"):
        listings = [item for item in policy_of(cloud, name) if "s3:ListBucket" in _listed(item["Action"])]
        assert listings and not any("Condition" in item for item in listings)
    services = {action.split(":")[0] for item in statements for action in _listed(item["Action"])}
    assert services == {"s3", "ssm", "ssmmessages"}
    trust = cloud.client("iam").get_role(RoleName=base.outputs["role_name"])["Role"][
        "AssumeRolePolicyDocument"
    ]
    assert trust["Statement"][0]["Principal"] == {"Service": "ec2.amazonaws.com"}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def test_the_mlflow_server(base: Base, cloud: Cloud) -> None:
    ec2 = cloud.client("ec2")
    [reservation] = ec2.describe_instances(InstanceIds=[base.outputs["mlflow_instance_id"]])["Reservations"]
    [instance] = reservation["Instances"]
    assert instance["InstanceType"] == "t4g.small"
    assert instance["Placement"]["AvailabilityZone"] == "us-east-1c"
    assert base.outputs["mlflow_uri"] == f"http://{instance['PrivateIpAddress']}:5000"
    [interface] = instance["NetworkInterfaces"]
    groups = [group["GroupId"] for group in interface["Groups"]]
    assert groups == [base.outputs["mlflow_security_group_id"]]
    filters = [{"Name": "tag:Name", "Values": ["sprint-mlflow"]}]
    [volume] = [item for item in ec2.describe_volumes(Filters=filters)["Volumes"] if item["Size"] == 10]
    assert volume["Encrypted"] and volume["Attachments"][0]["InstanceId"] == instance["InstanceId"]
    assert allowed(policy_of(cloud, "sprint-mlflow-us-east-1"), "s3:PutObject") == {"/mlflow/*"}
    data = ec2.describe_instance_attribute(InstanceId=instance["InstanceId"], Attribute="userData")
    user_data = gzip.decompress(base64.b64decode(data["UserData"]["Value"])).decode()
    assert f"BUCKET={BUCKET}\n" in user_data and volume["VolumeId"].replace("-", "") in user_data


def test_the_data_volume_and_its_snapshot(base: Base, cloud: Cloud) -> None:
    ec2 = cloud.client("ec2")
    [snapshot] = ec2.describe_snapshots(SnapshotIds=[base.outputs["data_snapshot_id"]])["Snapshots"]
    assert (snapshot["VolumeId"], snapshot["VolumeSize"]) == (base.outputs["data_volume_id"], 10)


def test_a_bucket_with_something_in_it_stays_until_it_is_said(base: Base, cloud: Cloud) -> None:
    """The last test of this file: it takes everything away."""
    s3 = cloud.client("s3")
    s3.put_object(Bucket=BUCKET, Key="runs/mine/latest.json", Body=b"{}")
    done = base.module.destroy(check=False)
    assert done.returncode == 1 and "BucketNotEmpty" in done.stderr
    assert s3.get_object(Bucket=BUCKET, Key="runs/mine/latest.json")["Body"].read() == b"{}"

    # What Terraform took away before it came to the bucket is there again after an apply.
    base.module.apply(base_variables(delete_bucket_contents=True))
    assert s3.get_public_access_block(Bucket=BUCKET)["PublicAccessBlockConfiguration"]["BlockPublicAcls"]
    assert s3.get_object(Bucket=BUCKET, Key="runs/mine/latest.json")["Body"].read() == b"{}"
    base.module.destroy()
    assert s3.list_buckets()["Buckets"] == []
    ec2 = cloud.client("ec2")
    assert [vpc for vpc in ec2.describe_vpcs()["Vpcs"] if not vpc["IsDefault"]] == []
    assert ec2.describe_volumes()["Volumes"] == []
    ours = [{"Name": "volume-id", "Values": [base.outputs["data_volume_id"]]}]  # moto has some of its own
    assert ec2.describe_snapshots(Filters=ours)["Snapshots"] == []
    iam = cloud.client("iam")
    assert iam.list_roles()["Roles"] == iam.list_instance_profiles()["InstanceProfiles"] == []
    states = {
        instance["State"]["Name"]
        for reservation in ec2.describe_instances()["Reservations"]
        for instance in reservation["Instances"]
    }
    assert states <= {"terminated"}
    assert json.loads(base.module.state.read_text())["resources"] == []
