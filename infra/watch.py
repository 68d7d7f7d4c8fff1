"""How a deployment is: what runs, how far training is, what it has cost, and what still costs money.

Example:
    >>> seen = look(cloud, deployment)
    >>> seen.state, round(seen.cost_usd, 2)
    ('training', 3.71)
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from infra.aws import AwsError
from infra.cloud import Cloud
from infra.console import size
from infra.deployment import Deployment
from infra.layout import ON_DEMAND, SPOT, Node, group_name
from infra.plan.prices import mlflow_usd_per_month, storage_usd_per_month
from infra.records import ALIVE, Records, read_records

SILENT_SECONDS = 300.0  # an instance that has not written for so long is not believed
REASONS = (
    ("InsufficientInstanceCapacity", "AWS has no such instance free in these zones now; it is tried again"),
    ("no Spot capacity", "there is no spot capacity now; it is tried again"),
    ("UnfulfillableCapacity", "there is no capacity now; it is tried again"),
    ("MaxSpotInstanceCountExceeded", "the spot quota is spent: ask for more (python -m infra up says which)"),
    ("VcpuLimitExceeded", "the quota of vCPUs is spent: ask for more (python -m infra up says which)"),
    ("SpotMaxPriceTooLow", "the spot price is above the cap that --max-usd and --max-hours leave"),
    (
        "KMS",
        "the Auto Scaling service may not use the account's own key for disks: give its role a grant on it",
    ),
)


@dataclass
class Lasting:
    """Something that costs money, running or not; of what runs, `usd_per_hour`."""

    what: str
    usd_per_month: float = 0.0
    usd_per_hour: float = 0.0


@dataclass
class Group:
    name: str
    wanted: int
    most: int
    instances: list[dict[str, str]]
    paused: str = ""  # why AWS no longer starts anything in it


@dataclass
class Seen:
    """See the module; `state` is one word, `detail` a sentence."""

    deployment: Deployment
    records: Records
    state: str
    detail: str
    groups: list[Group] = field(default_factory=list)
    activity: dict[str, str] | None = None
    cost_usd: float = 0.0

    @property
    def is_live(self) -> bool:
        return any(group.wanted or group.instances for group in self.groups)


def look(cloud: Cloud, deployment: Deployment) -> Seen:
    """Ask AWS and the bucket. Raises UserError, RuntimeError: they do not answer."""
    name = deployment.name
    records = Records()
    if cloud.bucket_exists():
        records = read_records(cloud.folder, name, deployment.num_epochs)
    groups = [
        Group(
            group["AutoScalingGroupName"],
            int(group["DesiredCapacity"]),
            int(group["MaxSize"]),
            [
                {"id": i["InstanceId"], "state": i["LifecycleState"], "zone": i["AvailabilityZone"]}
                for i in group["Instances"]
            ],
            _paused(group),
        )
        for group in cloud.groups(name)
    ]
    activity = last_activity(cloud, groups)
    seen = Seen(deployment, records, "", "", groups, activity)
    seen.state, seen.detail = _state(seen, cloud.now())
    seen.cost_usd = cost_so_far(deployment, records, seen, cloud.now())
    return seen


def _state(seen: Seen, now: float) -> tuple[str, str]:
    deployment, end = seen.deployment, seen.records.end
    present = {instance["id"] for group in seen.groups for instance in group.instances}
    if not seen.groups:
        if end is not None:
            return (
                "down",
                f"{end.status}: {end.reason}; its instances are removed, its results are in the bucket",
            )
        if deployment.stage in ("new", "uploading"):
            return "unfinished", "up was interrupted before anything that costs by the hour: run it again"
        if deployment.stage == "applying":
            return "unfinished", "up was interrupted while making the groups: run it again, or down"
        return "down", "its instances are removed; what it wrote is in the bucket"
    if end is not None:
        left = "; its instances are ending" if present else ""
        return end.status, f"{end.reason}{left}"
    if deployment.deadline and now > deployment.deadline:
        return "deadline", "its hours are over: everything was ended; python -m infra up starts it again"
    alive = [node for node in seen.records.nodes if node.phase in ALIVE and node.instance in present]
    fresh = [node for node in alive if now - node.updated < SILENT_SECONDS]
    if fresh:
        node = fresh[-1]
        return node.phase, node.detail or f"on {node.instance}"
    if alive:
        minutes = (now - alive[-1].updated) / 60
        return "silent", f"{alive[-1].instance} has not been heard of for {minutes:.0f} minutes"
    if present:
        return "booting", f"{', '.join(sorted(present))} started, and has not said anything yet"
    return "waiting", _why_waiting(seen)


def _paused(group: dict[str, Any]) -> str:
    """AWS's own words, where launching is suspended: after a day without capacity it does so by itself."""
    suspended = group.get("SuspendedProcesses") or ()
    return next(
        (
            item.get("SuspensionReason") or "suspended"
            for item in suspended
            if item["ProcessName"] == "Launch"
        ),
        "",
    )


def _why_waiting(seen: Seen) -> str:
    for group in seen.groups:
        if group.wanted and group.paused:
            return (
                f"nothing is started any more in {group.name} ({group.paused}): the same command of "
                "python -m infra up lets it try again"
            )
    if not any(group.wanted for group in seen.groups):
        return "its groups want no instance, and nobody said why: python -m infra up starts it again"
    if seen.activity is None:
        return "the group wants an instance, and AWS has not started one yet"
    said = f"{seen.activity['status']}: {seen.activity['message'] or seen.activity['description']}"
    meaning = next((words for key, words in REASONS if key.lower() in said.lower()), "")
    return f"no instance yet{': ' + meaning if meaning else ''} ({said[:300]})"


def last_activity(cloud: Cloud, groups: list[Group]) -> dict[str, str] | None:
    """The newest scaling activity of the groups; None where there is none, or AWS does not say."""
    found: list[dict[str, str]] = []
    for group in groups:
        try:
            answer = cloud.aws.call(
                "autoscaling", "describe_scaling_activities", AutoScalingGroupName=group.name, MaxRecords=10
            )
        except AwsError:
            continue
        for activity in answer.get("Activities") or ():
            found.append(
                {
                    "group": group.name,
                    "time": str(activity.get("StartTime", "")),
                    "status": str(activity.get("StatusCode", "")),
                    "description": str(activity.get("Description", "")),
                    "message": str(activity.get("StatusMessage", "")),
                }
            )
    return max(found, key=lambda activity: activity["time"], default=None)


def cost_so_far(deployment: Deployment, records: Records, seen: Seen, now: float) -> float:
    """Dollars of all instances that have said something, from their first to their last sign of life."""
    present = {instance["id"] for group in seen.groups for instance in group.instances}
    total = 0.0
    for node in records.nodes:
        times = [event.time for event in records.events if event.instance == node.instance]
        began = min([*times, node.since or node.updated])
        ended = now if node.instance in present and node.phase in ALIVE else max([*times, node.updated])
        total += max(0.0, ended - began) / 3600 * _price(node, deployment)
    return total


def _price(node: Node, deployment: Deployment) -> float:
    if node.price_usd_per_hour is not None:
        return node.price_usd_per_hour
    return deployment.node_usd_per_hour(node.market)


def what_costs(cloud: Cloud, deployments: list[Deployment]) -> list[Lasting]:
    """Everything of ours that costs money now; what cannot be listed is left out."""
    found: list[Lasting] = []
    for deployment in deployments:
        for group in cloud.groups(deployment.name):
            count = max(int(group["DesiredCapacity"]), len(group["Instances"]))
            if count:
                name = group["AutoScalingGroupName"]
                market = ON_DEMAND if name == group_name(deployment.name, ON_DEMAND) else SPOT
                usual = deployment.node_usd_per_hour(market)
                found.append(Lasting(f"{count} instance(s) of {name}", usd_per_hour=usual * count))
    if not cloud.bucket_exists():
        return found
    num_bytes = bucket_bytes(cloud)
    found.append(
        Lasting(
            f"bucket {cloud.bucket} with {size(sum(num_bytes.values()))}",
            storage_usd_per_month(sum(num_bytes.values())),
        )
    )
    base = cloud.find_base()
    outputs = base.outputs if base else {}
    if outputs.get("mlflow_instance_id"):
        monthly = mlflow_usd_per_month()
        found.append(Lasting(f"MLflow server {outputs['mlflow_instance_id']}", monthly, monthly / 730))
    gib = float(cloud.terraform_base().variables().get("data_volume_gib") or 0)
    if outputs.get("data_volume_id"):
        what = f"volume {outputs['data_volume_id']}"
        found.append(Lasting(what, storage_usd_per_month(gib * 2**30, "ebs_gp3")))
    if outputs.get("data_snapshot_id"):
        what = f"snapshot {outputs['data_snapshot_id']} (at most)"
        found.append(Lasting(what, storage_usd_per_month(gib * 2**30, "ebs_snapshot")))
    return found


def bucket_bytes(cloud: Cloud) -> dict[str, int]:
    """First folder → bytes of all that is stored below it, old versions included."""
    found: dict[str, int] = {}
    try:
        versions = cloud.aws.pages("s3", "list_object_versions", "Versions", Bucket=cloud.bucket)
        items = [(item["Key"], int(item["Size"])) for item in versions]
    except AwsError:
        items = [(file.name, file.num_bytes) for file in cloud.folder.files()]
    for key, num_bytes in items:
        part = key.split("/")[0]
        found[part] = found.get(part, 0) + num_bytes
    return dict(sorted(found.items()))


def facts_of(seen: Seen) -> dict[str, object]:
    """For `--json`."""
    records = seen.records
    progress: dict[str, Any] | None = None
    if records.progress:
        progress = asdict(records.progress) | {"eta_seconds": records.progress.eta_seconds}
    return {
        "deployment": seen.deployment.name,
        "kind": seen.deployment.kind,
        "state": seen.state,
        "detail": re.sub(r"\s+", " ", seen.detail),
        "progress": progress,
        "cost_usd": round(seen.cost_usd, 4),
        "max_usd": seen.deployment.max_usd,
        "usd_per_hour": seen.deployment.usd_per_hour,
        "deadline": seen.deployment.deadline,
        "groups": [asdict(group) for group in seen.groups],
        "activity": seen.activity,
        "nodes": [node.model_dump(mode="json") for node in records.nodes],
        "end": records.end.model_dump(mode="json") if records.end else None,
        "best": asdict(records.best) if records.best else None,
        "fetched": seen.deployment.fetched.model_dump(mode="json") if seen.deployment.fetched else None,
    }
