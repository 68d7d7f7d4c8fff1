"""`python -m infra prepare s3://bucket/images --to NAME --max-usd 5 --max-hours 6`: data, in the cloud.

One instance runs `python -m data_prep prepare`, writes the data set to s3://OUR-BUCKET/data/NAME, and ends.
It is a deployment like those of `up`, called prepare-NAME, with all its guards: status, logs and down work.
"""

from __future__ import annotations

import argparse
import re

from data_prep.storage import is_s3, without_password
from infra.cloud import Cloud
from infra.console import Console
from infra.errors import UserError
from infra.launch import Launch, launch, say_limits, utc
from infra.layout import PrepareJob, at, check_deployment, data_prefix
from infra.machines import ROOT_GIB, add_machine_arguments, limits_of, look_at_machines
from infra.preflight import facts_of, refuse_faults
from infra.records import read_records

# Sixteen cores and a disk of its own; it counts against the quota that training needs anyway.
DEFAULT_TYPE = "g6.4xlarge"
OWN_ARGUMENTS = ("--source", "--out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="s3://bucket/prefix with the images, in any layout that data_prep knows"
    )
    parser.add_argument(
        "--to", required=True, metavar="NAME", help="the data set becomes s3://BUCKET/data/NAME"
    )
    add_machine_arguments(parser, DEFAULT_TYPE)
    parser.epilog = "more arguments of python -m data_prep prepare go after --"


def run(options: argparse.Namespace, console: Console) -> int:
    prefix = _source_prefix(options.source)
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,60}", options.to):
        raise UserError(f"--to {options.to!r} is no name of a data set: small letters, digits and hyphens")
    if any(word.split("=")[0] in OWN_ARGUMENTS for word in options.rest):
        raise UserError("--source and --out are set from SOURCE and --to: leave them out after --")
    if options.num_nodes != 1:
        raise UserError("prepare uses one instance: leave --num-nodes out, and take a larger --instance-type")
    try:
        name = check_deployment(options.name or f"prepare-{options.to}"[:32].strip("-"))
    except ValueError as error:
        raise UserError(f"--name {error}") from None
    options.name = name
    cloud = Cloud.open(options, console)
    target = at(cloud.bucket, data_prefix(options.to)).rstrip("/")
    with cloud.exclusive(name):
        known = cloud.load(name)
        if known is not None and known.kind != "prepare":
            raise UserError(f"{name} is a training: choose another --name")
        records = read_records(cloud.folder, name) if cloud.bucket_exists() else None
        end = records.end if records else None
        if end is not None and end.status == "finished":
            console.say(f"{name} is finished: train on it with python -m infra up RECIPE --data {target}")
            console.result({"deployment": name, "data": target, "already": True})
            return 0
        if known is not None and known.stage == "up" and end is None and known.deadline > cloud.now():
            console.say(
                f"{name} is at work already, until {utc(known.deadline)}: python -m infra logs {name} -f"
            )
            console.result(known.model_dump(mode="json") | {"data": target, "already": True})
            return 0
        checks, offer, zones, types = look_at_machines(cloud, options)
        for check in checks:
            console.say(f"  {check.level:8} {check.sentence}")
        refuse_faults(checks)
        limits = limits_of(options, offer)
        say_limits(console, f"1 × {' or '.join(types)}", options.capacity, offer, limits, 1)
        if not console.confirm(f"Prepare {options.source} into {target}?"):
            console.say("nothing was made")
            return 1
        words = ("--source", options.source, "--out", target, *options.rest)
        wanted = Launch(
            name=name,
            kind="prepare",
            recipe_path=None,
            overrides=[],
            recipe=None,
            data=None,
            prepare=PrepareJob(arguments=words),
            instance_types=types,
            capacity=options.capacity,
            num_nodes=1,
            ranks_per_node="gpu",
            offer=offer,
            limits=limits,
            zones=zones,
            max_usd=options.max_usd,
            max_hours=options.max_hours,
            email=options.email,
            image=options.image,
            mlflow=None,
            root_gib=ROOT_GIB,
            source_prefixes=(prefix,),
        )
        deployment = launch(cloud, wanted, known)
    console.say(
        f"{name} is up, and ends by itself when the data set is done (at {utc(deployment.deadline)} "
        "at the latest)\n"
        f"  python -m infra logs {name} -f    what it says\n"
        f"  python -m infra down {name}       remove its group; the data set stays\n"
        f"  then: python -m infra up RECIPE --data {target} …"
    )
    console.result(
        deployment.model_dump(mode="json") | {"data": target, "checks": facts_of(checks), "already": False}
    )
    return 0


def _source_prefix(source: str) -> str:
    """`bucket/prefix` of an S3 source: what the instance is allowed to read."""
    if not is_s3(source):
        raise UserError(
            f"{without_password(source)} is not in S3, and the instance cannot read it: upload it first "
            "(aws s3 sync), or prepare it here with python -m data_prep prepare"
        )
    bucket, _, prefix = source.removeprefix("s3://").partition("/")
    if re.search(r"[*?]", prefix) or not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
        raise UserError(f"{source} names no s3://bucket/prefix: check it")
    return f"{bucket}/{prefix}"
