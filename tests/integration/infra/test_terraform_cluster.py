"""`cluster` on a local AWS, with the real provider: what is launched, how it ends, what is left."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.integration.infra.terraform import Cloud, Module, base_variables, cluster_variables
from tests.integration.infra.terraform_rules import faults

GROUPS = {"spot": "sprint-mine-spot", "on-demand": "sprint-mine-on-demand"}
ROLE = "sprint-instance-us-east-1"

# CI applies and destroys both modules in test_story; here each resource is looked at.
pytestmark = pytest.mark.long


@dataclass(frozen=True)
class Cluster:
    base: Module
    module: Module
    variables: dict[str, Any]
    outputs: dict[str, Any]

    def group(self, cloud: Cloud, market: str) -> dict[str, Any]:
        asked = cloud.client("autoscaling").describe_auto_scaling_groups(
            AutoScalingGroupNames=[GROUPS[market]]
        )
        found: dict[str, Any] = asked["AutoScalingGroups"][0]
        return found

    def template(self, cloud: Cloud, market: str) -> dict[str, Any]:
        group = self.group(cloud, market)["MixedInstancesPolicy"]["LaunchTemplate"]
        chosen = group["LaunchTemplateSpecification"]
        [version] = cloud.client("ec2").describe_launch_template_versions(
            LaunchTemplateId=chosen["LaunchTemplateId"], Versions=[chosen["Version"]]
        )["LaunchTemplateVersions"]
        data: dict[str, Any] = version["LaunchTemplateData"]
        return data

    def user_data(self, cloud: Cloud, market: str) -> dict[str, Any]:
        content = gzip.decompress(base64.b64decode(self.template(cloud, market)["UserData"]))
        parsed: dict[str, Any] = yaml.safe_load(content)
        return parsed


@pytest.fixture(scope="module")
def cluster(
    cloud: Cloud, terraform_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    cloud.reset()
    folder, environment = tmp_path_factory.mktemp("cluster"), terraform_environment | cloud.environment
    base = Module("base", folder, environment)
    outputs = base.apply(base_variables(availability_zones=["us-east-1a", "us-east-1b"]))
    mlflow = cloud.client("ec2").create_security_group(
        GroupName="mlflow", Description="MLflow", VpcId=outputs["vpc_id"]
    )["GroupId"]
    variables = cluster_variables(
        outputs,
        instance_types=["g6.12xlarge", "g5.12xlarge"],
        notify_email="me@example.org",
        mlflow_security_group_id=mlflow,
        source_prefixes=["archive/imagenet/"],
        allow_data_write=True,
        wheels="wheels/abc/",
    )
    module = Module("cluster", folder, environment)
    yield Cluster(base, module, variables, module.apply(variables))
    cloud.reset()


def test_breaks_no_rule(cluster: Cluster) -> None:
    assert faults(cluster.module.show()) == []


def test_spot_first_and_on_demand_waits(cluster: Cluster, cloud: Cloud) -> None:
    spot, on_demand = (cluster.group(cloud, market) for market in GROUPS)
    assert cluster.outputs["group_names"] == GROUPS
    assert [spot[key] for key in ("MinSize", "DesiredCapacity", "MaxSize")] == [0, 1, 1]
    assert [on_demand[key] for key in ("MinSize", "DesiredCapacity", "MaxSize")] == [0, 0, 1]
    shares = [
        group["MixedInstancesPolicy"]["InstancesDistribution"]["OnDemandPercentageAboveBaseCapacity"]
        for group in (spot, on_demand)
    ]
    assert shares == [0, 100]
    types = spot["MixedInstancesPolicy"]["LaunchTemplate"]["Overrides"]
    assert [override["InstanceType"] for override in types] == ["g6.12xlarge", "g5.12xlarge"]
    assert set(spot["VPCZoneIdentifier"].split(",")) == set(cluster.variables["subnet_ids"])


def test_an_instance_is_launched_as_it_should(cluster: Cluster, cloud: Cloud) -> None:
    template = cluster.template(cloud, "spot")
    assert template["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert template["MetadataOptions"]["HttpTokens"] == "required"
    assert template["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
    [disk] = template["BlockDeviceMappings"]
    assert disk["Ebs"]["Encrypted"] and disk["Ebs"]["DeleteOnTermination"]
    assert (disk["Ebs"]["VolumeType"], disk["Ebs"]["Iops"], disk["Ebs"]["Throughput"]) == ("gp3", 3000, 250)
    assert template["IamInstanceProfile"]["Name"] == ROLE
    [member] = cluster.group(cloud, "spot")["Instances"]
    [reservation] = cloud.client("ec2").describe_instances(InstanceIds=[member["InstanceId"]])["Reservations"]
    tags = {tag["Key"]: tag["Value"] for tag in reservation["Instances"][0]["Tags"]}
    assert tags | {"Project": "imagenet-sprint", "Deployment": "mine", "ManagedBy": "terraform"} == tags


def test_an_instance_is_told_whose_it_is(cluster: Cluster, cloud: Cloud) -> None:
    for market, group in GROUPS.items():
        files = {item["path"]: item for item in cluster.user_data(cloud, market)["write_files"]}
        lines = dict(
            line.split("=", 1) for line in files["/etc/sprint/environment"]["content"].split("\n") if line
        )
        told = {name: value.strip('"') for name, value in lines.items()}
        assert (told["SPRINT_GROUP"], told["SPRINT_MARKET"]) == (group, market)
        assert set(told["SPRINT_GROUPS"].split()) == set(GROUPS.values())
        assert told["SPRINT_BUCKET"] == cluster.variables["bucket"]
        assert told["SPRINT_TOPIC_ARN"] == cluster.outputs["topic_arn"]
        assert told["SPRINT_CODE_KEY"] == cluster.variables["code_key"]
        assert told["SPRINT_DEADLINE"] == "2053857300"
        assert told["SPRINT_WHEELS"] == "wheels/abc/"
        # The files of infra/bootstrap come as they are, scripts to be run.
        sources = [path for path in (ROOT / "infra" / "bootstrap").iterdir() if path.suffix != ".tftpl"]
        for source in sources:
            folder = "/etc/systemd/system" if source.suffix else "/usr/local/sbin"
            item = files[f"{folder}/{source.name}"]
            assert gzip.decompress(base64.b64decode(item["content"])) == source.read_bytes()
            assert item["permissions"] == ("0644" if source.suffix else "0755")


def test_the_reaper_ends_both_groups(cluster: Cluster, cloud: Cloud) -> None:
    actions = cloud.client("autoscaling").describe_scheduled_actions()["ScheduledUpdateGroupActions"]
    assert {action["AutoScalingGroupName"] for action in actions} == set(GROUPS.values())
    for action in actions:
        assert action["StartTime"].isoformat().startswith("2035-01-31T12:00:00")
        assert [action[key] for key in ("MinSize", "MaxSize", "DesiredCapacity")] == [0, 0, 0]


def test_without_spot_for_a_while_on_demand_is_bought(cluster: Cluster, cloud: Cloud) -> None:
    [alarm] = cloud.client("cloudwatch").describe_alarms()["MetricAlarms"]
    [policy] = cloud.client("autoscaling").describe_policies()["ScalingPolicies"]
    assert policy["AutoScalingGroupName"] == GROUPS["on-demand"]
    assert (policy["AdjustmentType"], policy["ScalingAdjustment"]) == ("ExactCapacity", 1)
    assert alarm["AlarmActions"] == [policy["PolicyARN"], cluster.outputs["topic_arn"]]
    assert (alarm["EvaluationPeriods"], alarm["TreatMissingData"]) == (15, "notBreaching")
    watched = {
        query["Id"]: query["MetricStat"]["Metric"] for query in alarm["Metrics"] if "MetricStat" in query
    }
    dimensions = [{"Name": "AutoScalingGroupName", "Value": GROUPS["spot"]}]
    assert all(metric["Dimensions"] == dimensions for metric in watched.values())
    enabled = {metric["Metric"] for metric in cluster.group(cloud, "spot")["EnabledMetrics"]}
    assert {metric["MetricName"] for metric in watched.values()} <= enabled


def test_an_instance_may_end_its_own_deployment_alone(cluster: Cluster, cloud: Cloud) -> None:
    policy = cloud.client("iam").get_role_policy(RoleName=ROLE, PolicyName="sprint-mine-us-east-1")
    allowed: dict[str, set[str]] = {}
    for statement in policy["PolicyDocument"]["Statement"]:
        actions, names = statement["Action"], statement["Resource"]
        for action in [actions] if isinstance(actions, str) else actions:
            allowed.setdefault(action, set()).update([names] if isinstance(names, str) else names)
    groups = {cluster.group(cloud, market)["AutoScalingGroupARN"] for market in GROUPS}
    data = f"arn:aws:s3:::{cluster.variables['bucket']}/data/*"
    assert allowed == {
        "autoscaling:SetDesiredCapacity": groups,
        "autoscaling:SuspendProcesses": groups,
        "sns:Publish": {cluster.outputs["topic_arn"]},
        "s3:PutObject": {data},
        "s3:DeleteObject": {data},
        "s3:AbortMultipartUpload": {data},
        "s3:ListMultipartUploadParts": {data},
        "s3:GetObject": {"arn:aws:s3:::archive/imagenet/*"},
        "s3:ListBucket": {"arn:aws:s3:::archive"},
    }


def test_interruptions_and_ends_are_told(cluster: Cluster, cloud: Cloud) -> None:
    events = cloud.client("events")
    patterns = {}
    for rule in events.list_rules(NamePrefix="sprint-mine-")["Rules"]:
        [target] = events.list_targets_by_rule(Rule=rule["Name"])["Targets"]
        assert target["Arn"] == cluster.outputs["topic_arn"]
        patterns[rule["Name"]] = json.loads(rule["EventPattern"])
    assert set(patterns["sprint-mine-group"]["detail"]["AutoScalingGroupName"]) == set(GROUPS.values())
    assert "EC2 Spot Instance Interruption Warning" in patterns["sprint-mine-spot"]["detail-type"]
    sns = cloud.client("sns")
    asked = sns.get_topic_attributes(TopicArn=cluster.outputs["topic_arn"])["Attributes"]["Policy"]
    [service] = [
        statement
        for statement in json.loads(asked)["Statement"]
        if statement["Principal"]["Service"] == "events.amazonaws.com"
    ]
    assert "Condition" not in service  # EventBridge fulfils none on the account, and says nothing
    [subscription] = sns.list_subscriptions()["Subscriptions"]
    assert (subscription["Protocol"], subscription["Endpoint"]) == ("email", "me@example.org")


def test_nobody_comes_in(cluster: Cluster, cloud: Cloud) -> None:
    ec2 = cloud.client("ec2")
    [group] = ec2.describe_security_groups(GroupIds=[cluster.outputs["security_group_id"]])["SecurityGroups"]
    assert group["IpPermissions"] == []
    out = {(rule["FromPort"], rule["ToPort"]) for rule in group["IpPermissionsEgress"]}
    assert out == {(80, 80), (443, 443), (5000, 5000)}
    [mlflow] = ec2.describe_security_groups(GroupIds=[cluster.variables["mlflow_security_group_id"]])[
        "SecurityGroups"
    ]
    [rule] = mlflow["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (5000, 5000)
    assert [pair["GroupId"] for pair in rule["UserIdGroupPairs"]] == [group["GroupId"]]


def test_applying_again_starts_nothing_that_has_ended(cluster: Cluster, cloud: Cloud) -> None:
    """As an instance ends its deployment: launches suspended, capacity 0."""
    autoscaling = cloud.client("autoscaling")
    for group in GROUPS.values():
        autoscaling.suspend_processes(
            AutoScalingGroupName=group, ScalingProcesses=["Launch", "AlarmNotification"]
        )
        autoscaling.set_desired_capacity(AutoScalingGroupName=group, DesiredCapacity=0)
    cluster.module.apply(cluster.variables | {"end_time": "2035-02-28T12:00:00Z"})
    for market in GROUPS:
        group = cluster.group(cloud, market)
        assert (group["DesiredCapacity"], group["MaxSize"]) == (0, 1)
        assert [process["ProcessName"] for process in group["SuspendedProcesses"]] == ["AZRebalance"]
    actions = autoscaling.describe_scheduled_actions()["ScheduledUpdateGroupActions"]
    assert {action["StartTime"].month for action in actions} == {2}


def test_destroy_leaves_base_alone(cluster: Cluster, cloud: Cloud) -> None:
    """The last test of this file: it takes the cluster away."""
    cluster.module.destroy()
    autoscaling, ec2, iam = (cloud.client(service) for service in ("autoscaling", "ec2", "iam"))
    assert autoscaling.describe_auto_scaling_groups()["AutoScalingGroups"] == []
    assert autoscaling.describe_scheduled_actions()["ScheduledUpdateGroupActions"] == []
    assert autoscaling.describe_policies()["ScalingPolicies"] == []
    assert ec2.describe_launch_templates()["LaunchTemplates"] == []
    assert cloud.client("cloudwatch").describe_alarms()["MetricAlarms"] == []
    assert cloud.client("events").list_rules()["Rules"] == []
    assert cloud.client("sns").list_topics()["Topics"] == []
    states = {
        instance["State"]["Name"]
        for reservation in ec2.describe_instances()["Reservations"]
        for instance in reservation["Instances"]
    }
    assert states == {"terminated"}
    names = {group["GroupName"] for group in ec2.describe_security_groups()["SecurityGroups"]}
    assert names == {"default", "mlflow"}
    assert iam.list_role_policies(RoleName=ROLE)["PolicyNames"] == ["bucket-and-session-manager"]
    assert [item["Name"] for item in cloud.client("s3").list_buckets()["Buckets"]] == [
        cluster.variables["bucket"]
    ]
