"""The machines of `up` and `prepare`: their options, and whether the account may have them, at what price."""

from __future__ import annotations

import argparse

from infra.cloud import Cloud
from infra.errors import UserError
from infra.offer import Limits, Offer, disks_usd_per_hour, find_offer, limit
from infra.preflight import Check, check_quota, check_zones, markets_of, vcpus_of

DEFAULT_TYPE = "g6.12xlarge"
ROOT_GIB = 200


def add_machine_arguments(parser: argparse.ArgumentParser, default_type: str = DEFAULT_TYPE) -> None:
    """What `up` and `prepare` have in common."""
    parser.add_argument("--max-usd", type=_positive, required=True, help="it never costs more than this")
    parser.add_argument("--max-hours", type=_positive, required=True, help="everything ends after so long")
    parser.add_argument("--name", help="of the deployment (default: run.name, or the recipe's name)")
    parser.add_argument(
        "--instance-type", default=default_type, help=f"one, or several with commas (default: {default_type})"
    )
    parser.add_argument(
        "--capacity", choices=["spot", "on-demand", "spot-then-on-demand"], default="spot-then-on-demand"
    )
    parser.add_argument("--num-nodes", type=int, default=1)
    parser.add_argument(
        "--zone",
        help="an availability zone (default: all that offer the type; with several nodes the cheapest)",
    )
    parser.add_argument("--usd-per-hour", type=_positive, help="of one instance, where no price is known")
    parser.add_argument(
        "--offline", action="store_true", help="prices of train/prices.yaml; AWS is not asked"
    )
    parser.add_argument("--email", default="", help="told of interruptions and of the end")
    parser.add_argument("--mlflow", action="store_true", default=None, help="with a lasting MLflow server")
    parser.add_argument("--image", default="", help="a container image, instead of an installation")
    parser.add_argument("--yes", action="store_true", help="do not ask")


def look_at_machines(
    cloud: Cloud, options: argparse.Namespace
) -> tuple[list[Check], Offer, list[str], list[str]]:
    """Account, bucket, quotas, zones and price."""
    if not 1 <= options.num_nodes <= 64:
        raise UserError(f"--num-nodes {options.num_nodes} is not from 1 to 64")
    types = instance_types_of(options)
    if not types:
        raise UserError(f"--instance-type {options.instance_type!r} names no type, such as {DEFAULT_TYPE}")
    if options.num_nodes > 1 and len(types) > 1:
        raise UserError("several nodes have to be equal: give one --instance-type, or --num-nodes 1")
    there = "is there" if cloud.bucket_exists() else "will be made"
    checks = [
        Check("account", "ok", f"account {cloud.account_id}, region {cloud.region}"),
        Check("bucket", "ok", f"bucket {cloud.bucket} {there}"),
    ]
    for market in markets_of(options.capacity):
        checks += [
            check_quota(cloud.aws, t, options.num_nodes, market, vcpus_of(cloud.aws, t)) for t in types
        ]
    zones_check, zones = check_zones(cloud.aws, types)
    root_gib, more_usd = _disks_of(cloud)
    offer = find_offer(
        types, options.capacity, cloud.region, root_gib, options.usd_per_hour, options.offline, more_usd
    )
    checks += [zones_check, Check("price", "ok", f"price {offer.words}")]
    if options.zone is not None:
        if zones and options.zone not in zones:
            raise UserError(f"--zone {options.zone} offers no {', '.join(types)}: one of {', '.join(zones)}")
        zones = [options.zone]
    elif options.num_nodes > 1 and zones:  # nodes talk all the time: one zone, and the others are not tried
        zones = [min(zones, key=lambda zone: (_place(zone, offer.zones), zone))]
        checks.append(Check("zone", "ok", f"all nodes in {zones[0]} (another one with --zone)"))
    return checks, offer, zones, types


def _place(zone: str, cheapest_first: tuple[str, ...]) -> int:
    return cheapest_first.index(zone) if zone in cheapest_first else len(cheapest_first)


def instance_types_of(options: argparse.Namespace) -> list[str]:
    return [word.strip() for word in options.instance_type.split(",") if word.strip()]


def _disks_of(cloud: Cloud) -> tuple[float, float]:
    """GiB of the root volume, and what an hour of other disks costs, with the user's own variables."""
    own = cloud.own("cluster")
    outputs = cloud.base.outputs if cloud.base else {}
    data_gib = 0.0
    if own.get("data_snapshot_id", outputs.get("data_snapshot_id")):
        data_gib = float(cloud.terraform_base().variables().get("data_volume_gib") or 0)
    try:
        root_gib, iops, throughput = (
            float(own.get(name, usual))
            for name, usual in (("root_gib", ROOT_GIB), ("root_iops", 3000), ("root_throughput", 250))
        )
    except (TypeError, ValueError):
        raise UserError(
            "root_gib, root_iops and root_throughput of cluster.tfvars.json take numbers"
        ) from None
    return root_gib, disks_usd_per_hour(iops, throughput, data_gib)


def limits_of(options: argparse.Namespace, offer: Offer) -> Limits:
    nodes = options.num_nodes
    spot = (offer.expected_usd, offer.side_usd, nodes) if options.capacity == "spot" else None
    return limit(options.max_usd, options.max_hours, offer.worst_usd * nodes, spot)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
