"""`python -m infra up RECIPE --max-usd 50 --max-hours 20`: from a recipe to instances that train it.

Looks first, says what it can cost at most, asks, and only then makes anything. Run again, it goes on where it
was interrupted, says that there is nothing to do, or (after an end that was no success) starts anew from the
run's last checkpoint.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.storage import is_s3
from infra.cloud import Cloud
from infra.console import Console, dollars
from infra.deployment import Deployment
from infra.errors import UserError
from infra.launch import Launch, end_instances, launch, resume, say_limits, utc
from infra.layout import check_deployment
from infra.machines import (
    ROOT_GIB,
    add_machine_arguments,
    instance_types_of,
    limits_of,
    look_at_machines,
)
from infra.offer import Limits, Offer
from infra.plan.prices import mlflow_usd_per_month, storage_usd_per_month
from infra.preflight import (
    Check,
    Data,
    check_data,
    describe_data,
    facts_of,
    refuse_faults,
)
from infra.records import read_records
from infra.uploading import load_user_recipe
from infra.watch import look as look_at
from train.config import Recipe

CHECKPOINT_BYTES = 1.0e9  # what a run keeps, roughly: three checkpoints of a ResNet-50, logs, a report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--data", help="prepared data set: s3://… or a folder (default: the recipe's data.path)"
    )
    parser.add_argument("--ranks-per-node", type=_ranks, default="gpu", help="gpu (default), or a number")
    add_machine_arguments(parser)


@dataclass(frozen=True)
class Request:
    """What `up` was asked for, once it was looked at."""

    name: str
    instance_types: list[str]
    recipe: Recipe
    data: Data
    offer: Offer
    limits: Limits
    checks: list[Check]
    zones: list[str]


def run(options: argparse.Namespace, console: Console) -> int:
    name = deployment_name(options.name, options.recipe, options.overrides)
    options.name = name  # for whoever has to say what exists, should this be interrupted
    recipe = load_user_recipe(options.recipe, options.overrides, options.data or "")
    cloud = Cloud.open(options, console)
    console.say(f"{name}: {options.recipe}, {recipe.num_epochs} epochs, in {cloud.region}")
    with cloud.exclusive(name):
        known = cloud.load(name)
        if known is not None and (code := _already(cloud, known, options, console)) is not None:
            return code
        request = look(cloud, options, name, recipe, str(options.data or recipe.data.path))
        say_plan(cloud, options, request)
        if known is not None and (spent := look_at(cloud, known).cost_usd) >= 0.005:
            console.say(f"{name} has cost {dollars(spent)} before; this comes on top")
        if not console.confirm("Go on?"):
            console.say("nothing was made")
            return 1
        if known is not None and known.stage == "up":  # an end that is under way would end this, too
            end_instances(cloud, name, console)
        deployment = launch(cloud, _launch_of(options, request), known)
    _say_what_next(console, deployment)
    console.result(
        deployment.model_dump(mode="json") | {"checks": facts_of(request.checks), "already": False}
    )
    return 0


def look(cloud: Cloud, options: argparse.Namespace, name: str, recipe: Recipe, location: str) -> Request:
    """All checks; faults of all of them at once.

    Raises:
        UserError: what is in the way.
    """
    checks, offer, zones, types = look_at_machines(cloud, options)
    data: Data | None = None
    try:
        data = check_data(location)
        checks.append(Check("data", "ok", describe_data(data)))
    except (ValueError, RuntimeError) as error:
        hint = "" if is_s3(location) else "; or name one with --data s3://… or --data folder"
        checks.append(Check("data", "fault", f"{error}{hint}"))
    for check in checks:
        cloud.console.say(f"  {check.level:8} {check.sentence}")
    refuse_faults(checks)
    assert data is not None
    limits = limits_of(options, offer)
    return Request(name, types, recipe, data, offer, limits, checks, zones)


def say_plan(cloud: Cloud, options: argparse.Namespace, request: Request) -> None:
    """The worst case, and what stays."""
    nodes = f"{options.num_nodes} × {' or '.join(request.instance_types)}"
    say_limits(cloud.console, nodes, options.capacity, request.offer, request.limits, options.num_nodes)
    stored = request.data.num_bytes + CHECKPOINT_BYTES
    cloud.console.say(
        f"what stays: data and checkpoints in S3, about {stored / 1e9:.1f} GB: "
        f"{dollars(storage_usd_per_month(stored))} a month, until python -m infra down --everything"
    )
    if options.mlflow:
        cloud.console.say(
            f"--mlflow: its server runs day and night, {dollars(mlflow_usd_per_month())} a month on top, "
            "until python -m infra down --everything"
        )


def _already(cloud: Cloud, known: Deployment, options: argparse.Namespace, console: Console) -> int | None:
    """The exit code where there is nothing to start: it runs, or it is finished."""
    if known.kind != "train":
        raise UserError(f"{known.name} is a preparation of data: choose another --name")
    records = read_records(cloud.folder, known.name) if cloud.bucket_exists() else None
    end = records.end if records else None
    if end is not None and end.status == "finished":
        console.say(
            f"{known.name} is finished ({end.reason}): python -m infra pull {known.name} brings it here; "
            "choose another --name to train again"
        )
        console.result(known.model_dump(mode="json") | {"already": True, "end": end.model_dump(mode="json")})
        return 0
    if known.stage != "up" or end is not None or known.deadline <= cloud.now():
        return None
    differences = _differences(known, options)
    if differences:
        raise UserError(
            f"{known.name} is up with {'; '.join(differences)}: end it with python -m infra down "
            f"{known.name} (it goes on from its last checkpoint afterwards), or choose another --name"
        )
    if resumed := resume(cloud, known.name):
        console.say(f"{', '.join(resumed)} had stopped trying to start instances: it tries again")
    console.say(
        f"{known.name} is up already, until {utc(known.deadline)}: python -m infra status {known.name}"
    )
    console.result(known.model_dump(mode="json") | {"already": True})
    return 0


def _differences(known: Deployment, options: argparse.Namespace) -> list[str]:
    asked: dict[str, Any] = {
        "--max-usd": options.max_usd,
        "--max-hours": options.max_hours,
        "--num-nodes": options.num_nodes,
        "--capacity": options.capacity,
        "--instance-type": tuple(instance_types_of(options)),
        "overrides": tuple(options.overrides),
    }
    there: dict[str, Any] = {
        "--max-usd": known.max_usd,
        "--max-hours": known.max_hours,
        "--num-nodes": known.num_nodes,
        "--capacity": known.capacity,
        "--instance-type": known.instance_types,
        "overrides": known.overrides,
    }
    return [
        f"{key} {_words(there[key])}, not {_words(asked[key])}" for key in asked if asked[key] != there[key]
    ]


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _launch_of(options: argparse.Namespace, request: Request) -> Launch:
    return Launch(
        name=request.name,
        kind="train",
        recipe_path=options.recipe,
        overrides=list(options.overrides),
        recipe=request.recipe,
        data=request.data,
        prepare=None,
        instance_types=request.instance_types,
        capacity=options.capacity,
        num_nodes=options.num_nodes,
        ranks_per_node=options.ranks_per_node,
        offer=request.offer,
        limits=request.limits,
        zones=request.zones,
        max_usd=options.max_usd,
        max_hours=options.max_hours,
        email=options.email,
        image=options.image,
        mlflow=options.mlflow,
        root_gib=ROOT_GIB,
    )


def _say_what_next(console: Console, deployment: Deployment) -> None:
    console.say(
        f"{deployment.name} is up; everything ends by {utc(deployment.deadline)}, whatever happens\n"
        f"  python -m infra status {deployment.name}     how far it is, and what it costs\n"
        f"  python -m infra logs {deployment.name} -f    what the instances say\n"
        f"  python -m infra down {deployment.name}       fetch the best checkpoint, and remove everything "
        "but the bucket"
    )


def deployment_name(given: str | None, recipe: Path, overrides: list[str]) -> str:
    """`--name`, or `run.name`, or the recipe's file name, made fit for AWS.

    Raises:
        UserError: what was given is no name.
    """
    if given is not None:
        try:
            return check_deployment(given)
        except ValueError as error:
            raise UserError(f"--name {error}") from None
    word = next((text.split("=", 1)[1] for text in overrides if text.startswith("run.name=")), recipe.stem)
    fit = re.sub(r"[^a-z0-9]+", "-", word.lower())[:32].strip("-")
    if not fit:
        raise UserError(f"{word!r} makes no name of a deployment: give one with --name")
    return fit


def _ranks(text: str) -> str | int:
    if text == "gpu":
        return text
    if not text.isdigit() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text} is neither gpu nor a number from 1 to 1024")
    return int(text)
