"""`python -m infra status [NAME]`: how far it is, what it has cost, why it waits, what still costs money."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from infra.cloud import Cloud
from infra.console import Console, dollars, duration
from infra.deployment import Deployment
from infra.errors import UserError
from infra.launch import utc
from infra.watch import Lasting, Seen, facts_of, look, what_costs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a deployment (default: all)")


def run(options: argparse.Namespace, console: Console) -> int:
    cloud = Cloud.open(options, console)
    if options.name is not None:
        cloud.load(options.name)  # where it is in another region, that is said
    known = [d for name in cloud.names() if (d := cloud.load(name)) is not None]
    chosen = known if options.name is None else [d for d in known if d.name == options.name]
    if options.name is not None and not chosen:
        names = ", ".join(d.name for d in known) or "none"
        raise UserError(f"there is no deployment {options.name} in {cloud.region}; known: {names}")
    seen = [look(cloud, deployment) for deployment in chosen]
    costs = what_costs(cloud, known)
    for one in seen:
        for line in lines_of(one, cloud.now()):
            console.say(line)
    if not seen:
        console.say(f"there is no deployment in {cloud.region} (account {cloud.account_id})")
    say_costs(console, costs)
    elsewhere = say_elsewhere(cloud, console)
    console.result(
        {
            "account_id": cloud.account_id,
            "region": cloud.region,
            "bucket": cloud.bucket,
            "deployments": [facts_of(one) for one in seen],
            "costs": [asdict(cost) for cost in costs],
            "elsewhere": {deployment.name: deployment.region for deployment in elsewhere},
        }
    )
    return 0


def lines_of(seen: Seen, now: float) -> list[str]:
    deployment, progress = seen.deployment, seen.records.progress
    lines = [f"{deployment.name}: {seen.state} ({seen.detail})"]
    if progress is not None:
        epochs = f" of {progress.num_epochs}" if progress.num_epochs else ""
        top1 = f", top-1 {progress.top1:.2%}" if progress.top1 is not None else ""
        best = f" (best {progress.best_top1:.2%})" if progress.best_top1 is not None else ""
        speed = f", {progress.images_per_second:,.0f} images/s" if progress.images_per_second else ""
        lines.append(f"  epoch {progress.epoch:.1f}{epochs}, step {progress.step:,}{top1}{best}{speed}")
    if progress is not None and progress.eta_seconds is not None and seen.records.end is None:
        lines.append(
            f"  about {duration(progress.eta_seconds)} of training left, at the pace of the last epochs"
        )
    price = f", up to {dollars(deployment.usd_per_hour)} an hour" if seen.is_live else ""
    lines.append(f"  cost so far {dollars(seen.cost_usd)} of at most {dollars(deployment.max_usd)}{price}")
    if seen.is_live and deployment.deadline > now:
        lines.append(
            f"  ends by itself at {utc(deployment.deadline)}, in {duration(deployment.deadline - now)}"
        )
    for group in seen.groups:
        there = ", ".join(f"{i['id']} {i['state']} in {i['zone']}" for i in group.instances) or "none there"
        lines.append(f"  group {group.name}: wants {group.wanted}, {there}")
    if seen.activity is not None:
        activity = seen.activity
        said = f": {activity['message']}" if activity["message"] else ""
        lines.append(
            f"  last activity {activity['time'][:19]}: {activity['status']}, {activity['description']}{said}"
        )
    lines += [f"  {line}" for line in _results(seen, deployment)]
    return lines


def _results(seen: Seen, deployment: Deployment) -> list[str]:
    best, fetched = seen.records.best, deployment.fetched
    if best is None:
        return []
    if fetched is not None and fetched.sha256 == best.sha256:
        return [f"best checkpoint (step {best.step:,}) is here: {fetched.path}"]
    return [
        f"best checkpoint (step {best.step:,}) is in S3: python -m infra pull {deployment.name} brings it"
    ]


def say_elsewhere(cloud: Cloud, console: Console) -> list[Deployment]:
    """What this machine knows in other regions, where it was not looked."""
    elsewhere = [deployment for deployment in cloud.elsewhere() if deployment.may_exist]
    for deployment in elsewhere:
        console.say(
            f"not looked at: {deployment.name} in {deployment.region}, which may cost money: "
            f"python -m infra status --region {deployment.region}"
        )
    return elsewhere


def say_costs(console: Console, costs: list[Lasting]) -> None:
    """What still costs money, with a sum."""
    if not costs:
        console.say("nothing of it costs money now")
        return
    console.say("what costs money now:")
    for cost in costs:
        hourly = f"{dollars(cost.usd_per_hour)} an hour" if cost.usd_per_hour else ""
        monthly = f"{dollars(cost.usd_per_month)} a month" if cost.usd_per_month or not hourly else ""
        console.say(f"  {cost.what}: {' = '.join(word for word in (hourly, monthly) if word)}")
