"""What is looked at before anything is paid for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_prep.manifest import Manifest
from infra.aws import AwsError
from infra.errors import UserError
from infra.preflight import (
    Check,
    check_data,
    check_quota,
    check_zones,
    quota_of,
    refuse_faults,
    vcpus_of,
)
from tests.unit.infra.fake_cloud import FakeAws


@pytest.mark.parametrize(
    ("instance_type", "spot", "code"),
    [
        ("g6.12xlarge", False, "L-DB2E81BA"),
        ("g6.12xlarge", True, "L-3819A6DF"),
        ("p4d.24xlarge", False, "L-417A185B"),
        ("p4d.24xlarge", True, "L-7212CCBC"),
        ("p5.48xlarge", True, "L-C4BD4855"),
        ("c7i.8xlarge", False, "L-1216C47A"),
        ("m7i.large", True, "L-34B43A08"),
    ],
)
def test_each_type_counts_against_its_quota(instance_type: str, spot: bool, code: str) -> None:
    assert quota_of(instance_type, spot)[0] == code


def running(instance_type: str, cores: int, spot: bool) -> dict[str, Any]:
    lifecycle = {"InstanceLifecycle": "spot"} if spot else {}
    cpu = {"CoreCount": cores, "ThreadsPerCore": 2}
    return {"Instances": [{"InstanceType": instance_type, "CpuOptions": cpu, **lifecycle}]}


def quota(value: float, *reservations: dict[str, Any]) -> FakeAws:
    return FakeAws(
        **{
            "service-quotas__get_service_quota": {"Quota": {"Value": value}},
            "ec2__describe_instances": {"Reservations": list(reservations)},
        }
    )


def test_a_quota_that_is_too_small_says_what_to_ask_for_and_where() -> None:
    check = check_quota(quota(8), "g6.12xlarge", 1, "spot", 48)  # type: ignore[arg-type]
    assert check.level == "fault"
    assert "L-3819A6DF" in check.sentence and "need 48" in check.sentence
    assert "servicequotas/home/services/ec2/quotas/L-3819A6DF" in check.sentence
    assert check_quota(quota(48), "g6.12xlarge", 1, "spot", 48).level == "ok"  # type: ignore[arg-type]
    assert check_quota(quota(64), "g6.12xlarge", 2, "spot", 48).level == "fault"  # type: ignore[arg-type]


def test_what_runs_already_takes_its_share_of_the_same_quota_only() -> None:
    aws = quota(
        96, running("g5.12xlarge", 24, True), running("g6.48xlarge", 96, False), running("m5.large", 1, True)
    )
    check = check_quota(aws, "g6.12xlarge", 1, "spot", 48)  # type: ignore[arg-type]
    assert check.level == "ok" and "48 in use" in check.sentence
    assert check_quota(aws, "g6.12xlarge", 2, "spot", 48).level == "fault"  # type: ignore[arg-type]


def test_a_quota_that_cannot_be_read_is_a_warning() -> None:
    aws = FakeAws(**{"service-quotas__get_service_quota": AwsError("no", "AccessDenied")})
    check = check_quota(aws, "g6.12xlarge", 1, "on-demand", 48)  # type: ignore[arg-type]
    assert check.level == "warning" and "48 vCPUs are needed" in check.sentence


def test_a_quota_that_nobody_ever_changed_is_the_one_all_begin_with() -> None:
    nothing = AwsError("no such resource", "NoSuchResourceException")
    answers = {
        "service-quotas__get_service_quota": nothing,
        "service-quotas__get_aws_default_service_quota": {"Quota": {"Value": 0.0}},
        "ec2__describe_instances": {"Reservations": []},
    }
    check = check_quota(FakeAws(**answers), "g6.12xlarge", 1, "spot", 48)  # type: ignore[arg-type]
    assert check.level == "fault" and "is 0 vCPUs" in check.sentence


def test_a_type_that_no_zone_offers_is_a_fault() -> None:
    offered = [{"Location": "us-east-1b"}, {"Location": "us-east-1a"}, {"Location": "us-east-1b"}]
    aws = FakeAws(ec2__describe_instance_type_offerings={"InstanceTypeOfferings": offered})
    check, zones = check_zones(aws, ["g6.12xlarge"])  # type: ignore[arg-type]
    assert check.level == "ok" and zones == ["us-east-1a", "us-east-1b"]
    aws = FakeAws(ec2__describe_instance_type_offerings={"InstanceTypeOfferings": []})
    check, zones = check_zones(aws, ["p6.mega"])  # type: ignore[arg-type]
    assert check.level == "fault" and "--region" in check.sentence and zones == []


def test_a_type_that_does_not_exist_is_named() -> None:
    aws = FakeAws(ec2__describe_instance_types=AwsError("no", "InvalidInstanceType"))
    with pytest.raises(UserError, match=r"no instance type 'g6\.12xlrge'"):
        vcpus_of(aws, "g6.12xlrge")  # type: ignore[arg-type]
    assert vcpus_of(FakeAws(), "g6.12xlarge") is None  # type: ignore[arg-type]


def test_data_is_whole_or_it_is_said_what_is_not(
    copy_of_prepared: Any, prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    data = check_data(str(prepared[0]))
    assert data.num_bytes > 1000 and data.name.startswith("data-") and len(data.sha256) == 64
    folder = copy_of_prepared()
    shard = folder / data.manifest.splits["train"].shards[0].name
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated or replaced"):
        check_data(str(folder))
    shard.unlink()
    with pytest.raises(ValueError, match="is missing"):
        check_data(str(folder))
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no finished data set"):
        check_data(str(folder))
    with pytest.raises(ValueError, match="does not exist"):
        check_data(str(tmp_path / "nowhere"))


def test_all_faults_are_said_at_once() -> None:
    refuse_faults([Check("a", "ok", "fine"), Check("b", "warning", "perhaps")])
    with pytest.raises(UserError) as error:
        refuse_faults([Check("a", "fault", "no quota"), Check("b", "fault", "no data")])
    assert "no quota" in str(error.value) and "no data" in str(error.value)
