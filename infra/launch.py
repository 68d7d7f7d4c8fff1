"""Making what a deployment needs, in an order that can be interrupted anywhere and gone on with.

The lasting part, then what instances read (code, data, recipe, job), and last what costs money by the hour.
`deployment.json` is written before each step, so whoever looks later knows what may exist.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from infra.cloud import Cloud
from infra.console import Console, dollars, duration
from infra.deployment import Base, Capacity, Deployment
from infra.errors import UserError
from infra.layout import Job, Keys, PrepareJob, group_name
from infra.offer import Limits, Offer
from infra.preflight import Data, markets_of
from infra.terraform_cli import Terraform, TerraformFailed
from infra.uploading import resolve_recipe, upload_code, upload_data, upload_job
from train.config import Recipe

FALLBACK_MINUTES = 15
POLL_SECONDS = 3.0
STOP_SECONDS = 300.0  # for instances to save, upload and leave
PAUSED = ("Launch", "AlarmNotification")  # what an instance suspends when a deployment ends


@dataclass(frozen=True)
class Launch:
    """All that a start needs to know."""

    name: str
    kind: Literal["train", "prepare"]
    recipe_path: Path | None
    overrides: list[str]
    recipe: Recipe | None
    data: Data | None
    prepare: PrepareJob | None
    instance_types: list[str]
    capacity: Capacity
    num_nodes: int
    ranks_per_node: Any
    offer: Offer
    limits: Limits
    zones: list[str]
    max_usd: float
    max_hours: float
    email: str
    image: str
    mlflow: bool | None
    root_gib: int
    source_prefixes: tuple[str, ...] = ()


def launch(cloud: Cloud, wanted: Launch, known: Deployment | None) -> Deployment:
    """Make it, or go on making it; returns when the groups have been asked for their instances.

    Raises:
        UserError: what failed; what exists is on record, and the same command goes on.
    """
    base = cloud.ensure_base(enable_mlflow=wanted.mlflow)
    deployment = _begun(cloud, wanted, known)
    cloud.save(deployment)
    with contextlib.ExitStack() as stack:
        # The bucket may be new: from here on other machines can see us.
        stack.enter_context(cloud.shared_lock(wanted.name))
        code_sha256 = upload_code(cloud)
        data = upload_data(cloud, wanted.data) if wanted.data else ""
        deployment = _applying(cloud, wanted, deployment, data, code_sha256)
        cloud.save(deployment)
        _upload_job(cloud, wanted, deployment, base)
        terraform = cloud.restored_cluster(wanted.name)
        cloud.console.say(f"making the instances' group of {wanted.name} …")
        try:
            apply_cluster(terraform, cluster_variables(cloud, base, wanted, deployment), cloud.console)
        finally:
            cloud.keep(terraform, f"cluster-{wanted.name}")
        wake(cloud, wanted)
        deployment = deployment.model_copy(update={"stage": "up"})
        cloud.save(deployment)
    return deployment


def _begun(cloud: Cloud, wanted: Launch, known: Deployment | None) -> Deployment:
    return Deployment(
        name=wanted.name,
        kind=wanted.kind,
        region=cloud.region,
        account_id=cloud.account_id,
        bucket=cloud.bucket,
        created=known.created if known else cloud.now(),
        recipe_path=str(wanted.recipe_path or ""),
        overrides=tuple(wanted.overrides),
        data=wanted.data.location if wanted.data else "",
        data_manifest_sha256=wanted.data.sha256 if wanted.data else "",
        instance_types=tuple(wanted.instance_types),
        capacity=wanted.capacity,
        num_nodes=wanted.num_nodes,
        max_usd=wanted.max_usd,
        max_hours=wanted.max_hours,
        deadline=known.deadline if known else 0,
        usd_per_hour=wanted.limits.worst_usd_per_hour,
        compute_usd_per_hour=wanted.offer.expected_usd * wanted.num_nodes,
        market_usd_per_hour={m: usd * wanted.num_nodes for m, usd in wanted.offer.market_usd.items()},
        price_source=wanted.offer.words,
        # What a former start left half made is still there.
        stage=known.stage if known and known.may_exist else "uploading",
        num_epochs=wanted.recipe.num_epochs if wanted.recipe else None,
        fetched=known.fetched if known else None,
    )


def _applying(cloud: Cloud, wanted: Launch, begun: Deployment, data: str, code_sha256: str) -> Deployment:
    """The clock starts now; that of instances which may be there already goes on."""
    deadline = begun.deadline
    goes_on = begun.stage == "applying" and deadline > cloud.now() and bool(cloud.groups(wanted.name))
    if not goes_on:
        deadline = int(cloud.now() + wanted.limits.hours * 3600)
    return begun.model_copy(
        update={"stage": "applying", "deadline": deadline, "data": data, "code_sha256": code_sha256}
    )


def _upload_job(cloud: Cloud, wanted: Launch, deployment: Deployment, base: Base) -> None:
    recipe = None
    if wanted.recipe_path is not None:
        recipe = resolve_recipe(
            wanted.recipe_path,
            wanted.overrides,
            wanted.name,
            cloud.bucket,
            deployment.data,
            deployment.compute_usd_per_hour,
            wanted.max_usd,
            wanted.limits.hours,
        )
    job = Job(
        deployment=wanted.name,
        kind=wanted.kind,
        bucket=cloud.bucket,
        region=cloud.region,
        recipe=Keys(wanted.name).recipe if recipe is not None else "",
        data=deployment.data,
        data_manifest_sha256=deployment.data_manifest_sha256,
        num_nodes=wanted.num_nodes,
        ranks_per_node=wanted.ranks_per_node,
        deadline=instance_deadline(deployment, wanted.limits.hours),
        max_usd=wanted.max_usd,
        usd_per_hour=deployment.compute_usd_per_hour,
        market_usd_per_hour=deployment.market_usd_per_hour,
        prepare=wanted.prepare,
        mlflow_uri=str(base.outputs.get("mlflow_uri") or ""),
    )
    upload_job(cloud, job, recipe)


def cluster_variables(cloud: Cloud, base: Base, wanted: Launch, deployment: Deployment) -> dict[str, Any]:
    outputs = base.outputs
    subnets: dict[str, str] = outputs["subnet_ids"]
    fitting = {zone: subnet for zone, subnet in subnets.items() if zone in wanted.zones or not wanted.zones}
    if not fitting:
        raise UserError(
            f"there is no network in {', '.join(wanted.zones)}: one of {', '.join(sorted(subnets))}"
        )
    if wanted.num_nodes > 1:  # where AWS did not say which zones offer the type
        fitting = dict(sorted(fitting.items())[:1])
    variables = {
        "deployment": wanted.name,
        "region": cloud.region,
        "bucket": cloud.bucket,
        "vpc_id": outputs["vpc_id"],
        "subnet_ids": [fitting[zone] for zone in sorted(fitting)],
        "role_name": outputs["role_name"],
        "instance_profile_name": outputs["instance_profile_name"],
        "instance_types": wanted.instance_types,
        "capacity": wanted.capacity,
        "fallback_minutes": FALLBACK_MINUTES,
        "num_nodes": wanted.num_nodes,
        # Groups are made empty, and asked for instances (`wake`) when all that ends them is there.
        "start": False,
        "root_gib": wanted.root_gib,
        "end_time": utc(deployment.deadline, "%Y-%m-%dT%H:%M:%SZ"),
        "deadline": instance_deadline(deployment, wanted.limits.hours),
        "max_hours": wanted.max_hours,
        "max_usd": wanted.max_usd,
        "notify_email": wanted.email,
        "code_key": f"code/{deployment.code_sha256}.tar.gz",
        "code_sha256": deployment.code_sha256,
        "image": wanted.image,
        "max_spot_price": f"{wanted.limits.max_spot_price:.3f}" if wanted.limits.max_spot_price else "",
        "mlflow_security_group_id": outputs.get("mlflow_security_group_id") or "",
        "data_snapshot_id": outputs.get("data_snapshot_id") or "",
        "allow_data_write": wanted.kind == "prepare",
        "source_prefixes": wanted.source_prefixes,
    }
    return variables | cloud.own("cluster")


def apply_cluster(terraform: Terraform, variables: dict[str, Any], console: Console) -> None:
    """Apply; without the budget alarm, where this account may have none.

    A member account whose payer has no budgets is refused one, and so are users whom its root user never gave
    a look at the bill. The alarm ends nothing: what limits the cost is elsewhere.
    """
    try:
        terraform.apply(variables)
    except TerraformFailed as error:
        if not error.faults or not all("creating Budget" in fault for fault in error.faults):
            raise
        reason = " ".join(error.faults[0].split())[:300]
        console.warn(
            f"AWS refuses this account a budget alarm ({reason}): going on without it; all limits hold, and "
            '{"enable_budget": false} in cluster.tfvars.json leaves it out from the beginning'
        )
        terraform.apply(variables | {"enable_budget": False})


def instance_deadline(deployment: Deployment, hours: float) -> int:
    """When instances end by themselves: a little before the guard outside ends them."""
    return int(deployment.deadline - max(60.0, min(300.0, 0.02 * hours * 3600)))


def wake(cloud: Cloud, wanted: Launch) -> None:
    """Ask for the instances: a former end left the groups at zero, with launching switched off."""
    first = group_name(wanted.name, markets_of(wanted.capacity)[0])
    resume(cloud, wanted.name)
    there = {group["AutoScalingGroupName"]: group for group in cloud.groups(wanted.name)}
    if first not in there:
        raise UserError(f"the Auto Scaling group {first} is not there after all: run the same command again")
    if not any(group["DesiredCapacity"] for group in there.values()):
        cloud.aws.call(
            "autoscaling",
            "set_desired_capacity",
            AutoScalingGroupName=first,
            DesiredCapacity=wanted.num_nodes,
        )


def resume(cloud: Cloud, name: str) -> list[str]:
    """Let groups start instances again that an end, or AWS after a day in vain, had paused; which."""
    resumed = []
    for group in cloud.groups(name):
        suspended = {process["ProcessName"] for process in group.get("SuspendedProcesses") or ()}
        if paused := [process for process in PAUSED if process in suspended]:
            resumed.append(group["AutoScalingGroupName"])
            cloud.aws.call(
                "autoscaling", "resume_processes", AutoScalingGroupName=resumed[-1], ScalingProcesses=paused
            )
    return resumed


def end_instances(cloud: Cloud, name: str, console: Console) -> None:
    """Capacity 0, which ends billing; then wait while the instances save and leave.

    The maximum, too: an alarm that still stands (no spot capacity) would start on-demand instances. Applying
    gives it back.
    """
    for group in cloud.groups(name):
        if group["DesiredCapacity"] or group["MaxSize"]:
            cloud.aws.call(
                "autoscaling",
                "update_auto_scaling_group",
                AutoScalingGroupName=group["AutoScalingGroupName"],
                MinSize=0,
                MaxSize=0,
                DesiredCapacity=0,
            )
    until = time.monotonic() + STOP_SECONDS
    said = False
    while present := [i["InstanceId"] for group in cloud.groups(name) for i in group["Instances"]]:
        if not said:
            console.say(f"capacity 0: {', '.join(present)} saves, uploads and leaves")
            said = True
        if time.monotonic() > until:
            console.say("still not gone after five minutes; going on")
            return
        time.sleep(POLL_SECONDS)


def say_limits(
    console: Console, nodes: str, capacity: str, offer: Offer, limits: Limits, num_nodes: int
) -> None:
    cap = f", bidding at most ${limits.max_spot_price:.3f} an instance" if limits.max_spot_price else ""
    console.say(
        f"{nodes}, {capacity}: usually {dollars(offer.expected_usd * num_nodes)} an hour, disk and address "
        f"included{cap}"
    )
    console.say(
        f"WORST CASE {dollars(limits.worst_usd)}: {duration(limits.hours * 3600)} at "
        f"{dollars(limits.worst_usd_per_hour)} an hour; then everything ends by itself ({limits.reason})"
    )


def utc(seconds: float, form: str = "%Y-%m-%d %H:%M UTC") -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime(form)
