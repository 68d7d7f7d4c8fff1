"""`python -m infra pull [NAME]`: the best checkpoint, checked, and the report, into runs/NAME."""

from __future__ import annotations

import argparse
from pathlib import Path

from infra.cloud import Cloud
from infra.console import Console, size
from infra.errors import UserError
from infra.fetching import fetch_best, fetch_report, is_here
from infra.records import read_records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a deployment (default: the only one)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where to (default: runs/)")


def run(options: argparse.Namespace, console: Console) -> int:
    cloud = Cloud.open(options, console)
    deployment = cloud.choose(options.name)
    if not cloud.bucket_exists():
        raise UserError(f"the bucket {cloud.bucket} does not exist (any more): there is nothing to fetch")
    if deployment.kind == "prepare":
        raise UserError(
            f"{deployment.name} prepared data, which stays in {deployment.data}: train on it there"
        )
    best = read_records(cloud.folder, deployment.name).best
    if best is None:
        raise UserError(f"{deployment.name} has no checkpoint yet: python -m infra status says how far it is")
    folder = options.runs / deployment.name
    already = is_here(deployment, best) and Path(deployment.fetched.path).is_relative_to(folder.absolute())  # type: ignore[union-attr]
    if not already:
        console.say(
            f"fetching the best checkpoint (step {best.step:,}, {size(best.num_bytes)}) into {folder}"
        )
        deployment = fetch_best(cloud, deployment, folder)
    assert deployment.fetched is not None
    console.say(f"{deployment.fetched.path}: step {best.step:,}, SHA-256 {best.sha256} as in the mirror")
    report = fetch_report(cloud, deployment.name, folder)
    pages = [str(path) for path in report if path.name == "report.html" or path.suffix == ".html"]
    console.say(f"report: {pages[0]}" if pages else "there is no report (yet): it is made at the end")
    console.result(
        {
            "deployment": deployment.name,
            "checkpoint": deployment.fetched.model_dump(mode="json"),
            "files": [str(path) for path in report],
            "already": already,
        }
    )
    return 0
