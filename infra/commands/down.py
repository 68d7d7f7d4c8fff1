"""`python -m infra down [NAME]`: end the instances, fetch the best checkpoint, and remove all but the bucket.

`--everything` removes what lasts, too, the bucket with all that is in it: after asking, and only when every
run's best checkpoint is here.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from infra.cloud import Cloud
from infra.commands.status import say_elsewhere
from infra.console import Console, dollars, size
from infra.deployment import Deployment
from infra.errors import UserError
from infra.fetching import fetch_best, fetch_report, is_here
from infra.launch import end_instances
from infra.plan.prices import storage_usd_per_month
from infra.records import Checkpoint, Records, read_records
from infra.watch import bucket_bytes, look

DELETE_AT_ONCE = 1000  # as many as S3 takes
BUCKET_SECONDS = 30.0  # for S3 to forget a bucket


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a deployment (default: the only one)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where to fetch to (default: runs/)")
    parser.add_argument("--force", action="store_true", help="also where the best checkpoint is not here")
    parser.add_argument(
        "--everything", action="store_true", help="all deployments, the bucket and the network"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")


def run(options: argparse.Namespace, console: Console) -> int:
    cloud = Cloud.open(options, console)
    if options.everything:
        return _everything(cloud, options, console)
    deployment = cloud.choose(options.name)
    options.name = deployment.name
    if not _down(cloud, deployment, options, console):
        return 1
    console.say(f"{deployment.name} is down; the bucket {cloud.bucket} stays, with what it wrote")
    _say_storage(cloud, console)
    console.result({"deployment": deployment.name, "stage": "down", "bucket": cloud.bucket})
    return 0


def _down(cloud: Cloud, deployment: Deployment, options: argparse.Namespace, console: Console) -> bool:
    """End, fetch, destroy; False where the user says no."""
    name = deployment.name
    with cloud.exclusive(name):
        deployment = cloud.load(name) or deployment
        seen = look(cloud, deployment)
        terraform = cloud.restored_cluster(name)
        if seen.groups and not terraform.resources():
            raise UserError(
                f"Terraform's state of {name} is neither here nor in the bucket, and its groups exist: find "
                f"{terraform.state_path}, or remove {', '.join(group.name for group in seen.groups)} by hand"
            )
        if seen.is_live and not console.confirm(f"{name} is {seen.state} ({seen.detail}). End it?"):
            console.say("nothing was changed")
            return False
        if seen.groups:
            end_instances(cloud, name, console)
        deployment = _fetch(cloud, deployment, options, console)
        deployment = deployment.model_copy(update={"stage": "destroying"})
        cloud.save(deployment)
        console.say(f"removing {len(terraform.resources())} resources of {name} …")
        try:
            terraform.destroy()
        finally:
            cloud.keep(terraform, f"cluster-{name}")
        left = terraform.resources()
        if left or cloud.groups(name):
            raise UserError(
                f"{', '.join(left) or name} is still there: run python -m infra down {name} again"
            )
        cloud.save(deployment.model_copy(update={"stage": "down"}))
    return True


def _fetch(cloud: Cloud, deployment: Deployment, options: argparse.Namespace, console: Console) -> Deployment:
    """Bring the best checkpoint here. UserError: it cannot be had, and --force was not said."""
    records = read_records(cloud.folder, deployment.name) if cloud.bucket_exists() else Records()
    if deployment.kind == "prepare" or records.best is None:
        console.say(f"{deployment.name} has no checkpoint: there is nothing to fetch")
        return deployment
    if is_here(deployment, records.best):
        assert deployment.fetched is not None
        console.say(f"the best checkpoint is here already: {deployment.fetched.path}")
        return deployment
    folder = options.runs / deployment.name
    try:
        console.say(f"fetching the best checkpoint (step {records.best.step:,}) into {folder}")
        deployment = fetch_best(cloud, deployment, folder)
        fetch_report(cloud, deployment.name, folder)
    except (UserError, RuntimeError, OSError) as error:
        if not options.force:
            raise UserError(
                f"{error}; nothing was removed (no instance runs any more): mend that and run python -m "
                f"infra down {deployment.name} again, or leave it in the bucket with --force"
            ) from None
        console.warn(f"{error}; going on, as --force says: it stays in the bucket")
        return deployment
    assert deployment.fetched is not None
    console.say(f"fetched and verified: {deployment.fetched.path} (SHA-256 {deployment.fetched.sha256})")
    return deployment


def _everything(cloud: Cloud, options: argparse.Namespace, console: Console) -> int:
    deployments = [d for name in cloud.names() if (d := cloud.load(name)) is not None]
    exists = cloud.bucket_exists()
    cloud.find_base()
    terraform = cloud.terraform_base()
    if not exists and not terraform.resources() and not deployments:
        console.say(f"there is nothing in {cloud.region} (account {cloud.account_id})")
        console.result({"everything": "gone"})
        return 0
    for deployment in deployments:
        options.name = deployment.name
        if deployment.stage != "down" and not _down(cloud, deployment, options, console):
            return 1
    if exists:
        _refuse_unfetched(cloud, options)
        sizes = bucket_bytes(cloud)
        console.say(f"the bucket {cloud.bucket} holds {size(sum(sizes.values()))} (old versions included):")
        for part, num_bytes in sizes.items():
            console.say(f"  {part}/  {size(num_bytes)}{_names_below(cloud, part)}")
    if not console.confirm(f"Remove {cloud.bucket} with all of it, the network and the role, for good?"):
        console.say("the lasting part stays")
        _say_storage(cloud, console)
        return 1
    with cloud.states.base_lock(cloud.region):
        if exists and not terraform.resources():
            raise UserError(
                f"the bucket {cloud.bucket} exists, but no Terraform state of it: remove it in the console"
            )
        console.say("removing the lasting part …")
        try:
            if exists:
                empty_bucket(cloud)
            terraform.destroy()
        finally:
            cloud.keep(terraform, "base")
    if terraform.resources() or not _bucket_goes(cloud):
        left = ", ".join(terraform.resources()) or cloud.bucket
        raise UserError(f"{left} is still there: run python -m infra down --everything again")
    for deployment in deployments:
        shutil.rmtree(cloud.states.folder(deployment.name), ignore_errors=True)
    shutil.rmtree(cloud.states.base_folder(cloud.region), ignore_errors=True)
    console.say("everything is gone: nothing of it costs money any more")
    say_elsewhere(cloud, console)
    console.result({"everything": "gone"})
    return 0


def _bucket_goes(cloud: Cloud) -> bool:
    """S3 may name a removed bucket for some seconds more."""
    until = time.monotonic() + BUCKET_SECONDS
    while cloud.bucket_exists():
        if time.monotonic() > until:
            return False
        time.sleep(2)
    return True


def empty_bucket(cloud: Cloud) -> None:
    """Delete every object with all its versions: only an empty bucket can be removed."""
    left = True
    while left:
        left = False
        for field in ("DeleteMarkers", "Versions"):  # the other way round, moto stumbles
            found = cloud.aws.pages("s3", "list_object_versions", field, Bucket=cloud.bucket)
            keys = [{"Key": item["Key"], "VersionId": item["VersionId"]} for item in found]
            for start in range(0, len(keys), DELETE_AT_ONCE):
                some = keys[start : start + DELETE_AT_ONCE]
                answer = cloud.aws.call(
                    "s3", "delete_objects", Bucket=cloud.bucket, Delete={"Objects": some, "Quiet": True}
                )
                if errors := answer.get("Errors"):
                    raise UserError(f"{errors[0].get('Key')} was not deleted: {errors[0].get('Code')}")
                left = True
    for upload in cloud.aws.pages("s3", "list_multipart_uploads", "Uploads", Bucket=cloud.bucket):
        cloud.aws.call(
            "s3",
            "abort_multipart_upload",
            Bucket=cloud.bucket,
            Key=upload["Key"],
            UploadId=upload["UploadId"],
        )


def _refuse_unfetched(cloud: Cloud, options: argparse.Namespace) -> None:
    """UserError: a run's best checkpoint is only in the bucket."""
    missing = []
    runs = {
        file.name.split("/")[1] for file in cloud.folder.files("runs") if file.name.endswith("/latest.json")
    }
    for name in sorted(runs):
        best: Checkpoint | None = None
        try:
            best = read_records(cloud.folder, name).best
        except ValueError:
            continue  # no name of ours
        deployment = cloud.load(name)
        if best is not None and (deployment is None or not is_here(deployment, best)):
            missing.append(name)
    if missing and not options.force:
        raise UserError(
            f"the best checkpoint of {', '.join(missing)} is in the bucket only: python -m infra pull "
            f"{missing[0]} brings it here; with --force it is deleted"
        )


def _names_below(cloud: Cloud, part: str) -> str:
    """` (mine, other)`: what is in it, a few of them."""
    names = sorted({file.name.split("/")[1] for file in cloud.folder.files(part) if "/" in file.name})
    if part not in ("data", "runs", "reports") or not names:
        return ""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f" ({', '.join(names[:5])}{more})"


def _say_storage(cloud: Cloud, console: Console) -> None:
    if cloud.bucket_exists():
        num_bytes = sum(bucket_bytes(cloud).values())
        monthly = storage_usd_per_month(num_bytes)
        console.say(
            f"it holds {size(num_bytes)}, {dollars(monthly)} a month; python -m infra down --everything "
            "removes it"
        )
