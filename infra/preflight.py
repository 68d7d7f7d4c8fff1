"""Before anything is paid for: can this account have these machines here, and is the data whole.

Each check is a `Check`: ok, a warning (it could not be told), or a fault with what to change. All of them are
made, and then all faults are said at once.

Example:
    >>> for check in [check_quota(aws, "g6.12xlarge", 1, "spot")]: print(check.sentence)
    quota All G and VT Spot Instance Requests (L-3819A6DF): 96 vCPUs, 48 needed
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any, Literal

from data_prep.manifest import MANIFEST_NAME, Manifest, check_size, load_manifest
from data_prep.storage import LocalFolder, is_s3, open_folder
from infra.aws import Aws, AwsError
from infra.deployment import Capacity
from infra.errors import UserError

Level = Literal["ok", "warning", "fault"]

# Service quotas of EC2, in vCPUs. Of a family: (on demand, spot).
QUOTAS = {
    "G": (
        ("L-DB2E81BA", "Running On-Demand G and VT instances"),
        ("L-3819A6DF", "All G and VT Spot Instance Requests"),
    ),
    "P": (
        ("L-417A185B", "Running On-Demand P instances"),
        ("L-7212CCBC", "All P4, P3 and P2 Spot Instance Requests"),
    ),
    "standard": (
        ("L-1216C47A", "Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances"),
        ("L-34B43A08", "All Standard (A, C, D, H, I, M, R, T, Z) Spot Instance Requests"),
    ),
}
P5_SPOT = ("L-C4BD4855", "All P5 Spot Instance Requests")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what was found, in a sentence."""

    name: str
    level: Level
    sentence: str


@dataclass(frozen=True)
class Data:
    """A prepared data set that was looked at.

    Attributes:
        location: as given. sha256: of manifest.json. num_bytes: of all files that the manifest names.
    """

    location: str
    manifest: Manifest
    sha256: str
    num_bytes: int

    @property
    def name(self) -> str:
        """Its name in the bucket: two data sets with one folder's name do not meet."""
        words = re.sub(r"[^a-z0-9]+", "-", self.location.rstrip("/").split("/")[-1].lower()).strip("-")
        return f"{words[:40] or 'data'}-{self.sha256[:8]}"


def quota_of(instance_type: str, is_spot: bool) -> tuple[str, str]:
    """Code and name of the quota that counts an instance type's vCPUs."""
    letters = re.match(r"[a-z]+(?:-\w+)?", instance_type)
    letter = letters[0] if letters else ""
    if is_spot and instance_type.startswith("p5"):
        return P5_SPOT
    family = "G" if letter[:1] == "g" or letter[:2] == "vt" else "P" if letter[:1] == "p" else "standard"
    return QUOTAS[family][is_spot]


def check_quota(aws: Aws, instance_type: str, num_nodes: int, market: str, vcpus: int | None) -> Check:
    """Whether the account may run so many vCPUs of this family now; those that run already are counted."""
    is_spot = market == "spot"
    code, name = quota_of(instance_type, is_spot)
    what = f"quota {name} ({code})"
    where = f"https://{aws.region}.console.aws.amazon.com/servicequotas/home/services/ec2/quotas/{code}"
    if vcpus is None:
        return Check(
            "quota", "warning", f"{what} was not looked at: the vCPUs of {instance_type} are unknown"
        )
    needed = vcpus * num_nodes
    try:
        allowed = _allowed(aws, code)
    except (AwsError, KeyError, TypeError) as error:
        return Check(
            "quota",
            "warning",
            f"{what} could not be read ({_code(error)}): {needed} vCPUs are needed; see {where}",
        )
    used = _running_vcpus(aws, code, is_spot)
    if needed + used <= allowed:
        taken = f", {used} in use" if used else ""
        return Check("quota", "ok", f"{what}: {allowed:.0f} vCPUs{taken}, {needed} needed")
    taken = f" and {used} are in use" if used else ""
    return Check(
        "quota",
        "fault",
        f"{what} is {allowed:.0f} vCPUs{taken}, and {num_nodes} × {instance_type} need {needed}: ask for "
        f"{needed + used} at {where} (hours to days), or choose another --instance-type or --capacity",
    )


def _allowed(aws: Aws, code: str) -> float:
    """The account's value; where nobody ever changed it, AWS may only know the one that all begin with."""
    words = {"ServiceCode": "ec2", "QuotaCode": code}
    try:
        answer = aws.call("service-quotas", "get_service_quota", **words)
    except AwsError as error:
        if error.code != "NoSuchResourceException":
            raise
        answer = aws.call("service-quotas", "get_aws_default_service_quota", **words)
    return float(answer["Quota"]["Value"])


def _code(error: Exception) -> str:
    return error.code or str(error) if isinstance(error, AwsError) else type(error).__name__


def _running_vcpus(aws: Aws, code: str, is_spot: bool) -> int:
    """vCPUs of running instances that the same quota counts; 0 where they cannot be listed."""
    total = 0
    states = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
    try:
        for reservation in aws.pages("ec2", "describe_instances", "Reservations", Filters=states):
            for instance in reservation["Instances"]:
                lifecycle = instance.get("InstanceLifecycle") == "spot"
                if lifecycle == is_spot and quota_of(instance["InstanceType"], is_spot)[0] == code:
                    cpu = instance.get("CpuOptions") or {}
                    total += int(cpu.get("CoreCount", 0)) * int(cpu.get("ThreadsPerCore", 1))
    except AwsError:
        return 0
    return total


def vcpus_of(aws: Aws, instance_type: str) -> int | None:
    """None where AWS does not say. UserError: there is no such type."""
    try:
        answer = aws.call("ec2", "describe_instance_types", InstanceTypes=[instance_type])
        return int(answer["InstanceTypes"][0]["VCpuInfo"]["DefaultVCpus"])
    except AwsError as error:
        if error.code == "InvalidInstanceType":
            raise UserError(
                f"{aws.region} has no instance type {instance_type!r}: check --instance-type, or --region"
            ) from None
        return None
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def check_zones(aws: Aws, instance_types: list[str]) -> tuple[Check, list[str]]:
    """Zones of the region in which at least one of the types is offered; empty where that is not known."""
    try:
        offered = list(
            aws.pages(
                "ec2",
                "describe_instance_type_offerings",
                "InstanceTypeOfferings",
                LocationType="availability-zone",
                Filters=[{"Name": "instance-type", "Values": instance_types}],
            )
        )
    except AwsError as error:
        return Check(
            "zones", "warning", f"which zones offer {', '.join(instance_types)} is not known: {error}"
        ), []
    zones = sorted({item["Location"] for item in offered})
    names = ", ".join(instance_types)
    if not zones:
        return (
            Check(
                "zones",
                "fault",
                f"no zone of {aws.region} offers {names}: choose another --region or --instance-type",
            ),
            [],
        )
    return Check("zones", "ok", f"{names} is offered in {', '.join(zones)}"), zones


def check_data(location: str) -> Data:
    """Look at a prepared data set: its manifest, and that each file is there with the manifest's size.

    Raises:
        ValueError, RuntimeError: it is missing, unfinished or damaged, in a sentence.
    """
    folder = open_folder(location)
    manifest = load_manifest(folder)
    sha256 = hashlib.sha256(folder.read(MANIFEST_NAME)).hexdigest()
    if isinstance(folder, LocalFolder):
        for entry in manifest.files:
            check_size(folder.path / entry.name, entry)
    else:
        sizes = {file.name: file.num_bytes for file in folder.children()}
        for entry in manifest.files:
            if sizes.get(entry.name) != entry.bytes:
                there = "is missing" if entry.name not in sizes else f"has {sizes[entry.name]:,} bytes"
                raise ValueError(
                    f"{folder.path_of(entry.name)} {there}, its manifest says {entry.bytes:,}: copy the data "
                    "set again with python -m data_prep copy"
                )
    return Data(location, manifest, sha256, sum(entry.bytes for entry in manifest.files))


def describe_data(data: Data) -> str:
    splits = ", ".join(f"{entry.num_samples:,} {name}" for name, entry in data.manifest.splits.items())
    kind = "in S3" if is_s3(data.location) else "on this machine"
    return (
        f"data {data.location} ({kind}): {splits} images in {data.manifest.num_classes} classes, sizes agree"
    )


def markets_of(capacity: Capacity) -> tuple[str, ...]:
    """The markets that a kind of capacity may use, the first one first."""
    return {
        "spot": ("spot",),
        "on-demand": ("on-demand",),
        "spot-then-on-demand": ("spot", "on-demand"),
    }[capacity]


def refuse_faults(checks: list[Check]) -> None:
    """UserError with all faults, where there are some."""
    faults = [check.sentence for check in checks if check.level == "fault"]
    if faults:
        raise UserError(
            faults[0]
            if len(faults) == 1
            else "\n  - ".join([f"{len(faults)} things are in the way:", *faults])
        )


def facts_of(checks: list[Check]) -> list[dict[str, Any]]:
    return [{"name": c.name, "level": c.level, "sentence": c.sentence} for c in checks]
