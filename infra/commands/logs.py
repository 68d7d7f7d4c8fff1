"""`python -m infra logs [NAME] [-f]`: what the instances wrote, as it arrives in S3 (every 30 s)."""

from __future__ import annotations

import argparse
import re
import sys
import time

from infra.cloud import Cloud
from infra.console import Console
from infra.deployment import Deployment
from infra.errors import UserError
from infra.layout import End, Keys, read_record

POLL_SECONDS = 5.0
PIECE = re.compile(r"([A-Za-z0-9-]+)/(.+)-(\d{6,})\.log")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a deployment (default: the only one)")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the deployment ends")
    parser.add_argument("--instance", help="of this instance only")
    parser.add_argument("--log", help="of this log only: bootstrap, agent, train …")
    parser.add_argument("--every", type=float, default=POLL_SECONDS, help=argparse.SUPPRESS)


def run(options: argparse.Namespace, console: Console) -> int:
    cloud = Cloud.open(options, console)
    deployment = cloud.choose(options.name)
    if not cloud.bucket_exists():
        raise UserError(f"{deployment.name} has no bucket yet: run python -m infra up again")
    reader = LogReader(cloud, deployment, options.instance, options.log)
    while True:
        end = _end(cloud, deployment)  # asked before: what was written until then is shown
        shown = reader.show(console)
        if end is not None or not options.follow:
            break
        if not shown:
            time.sleep(options.every)
    if not reader.has_shown:
        console.say(
            f"{deployment.name} has no logs yet: an instance writes its first ones when it has booted"
        )
    if end is not None:
        print(f"{deployment.name} has ended: {end.status} ({end.reason})", file=sys.stderr)
    return 0


class LogReader:
    """Shows each piece once, in order; says whose it is where that changes."""

    def __init__(self, cloud: Cloud, deployment: Deployment, instance: str | None, log: str | None) -> None:
        self._folder, self._prefix = cloud.folder, Keys(deployment.name).logs
        self._instance, self._log = instance, log
        self._shown: set[str] = set()
        self._source = ""

    @property
    def has_shown(self) -> bool:
        return bool(self._shown)

    def show(self, console: Console) -> bool:
        """Print what is new; whether there was something."""
        is_new = False
        for file in self._folder.files(self._prefix):
            place = PIECE.fullmatch(file.name.removeprefix(self._prefix))
            if place is None or file.name in self._shown:
                continue
            instance, log, _ = place.groups()
            if self._instance not in (None, instance) or self._log not in (None, log):
                continue
            self._shown.add(file.name)
            is_new = True
            self._print(console, instance, log, self._folder.read(file.name).decode("utf-8", "replace"))
        return is_new

    def _print(self, console: Console, instance: str, log: str, text: str) -> None:
        if console.as_json:
            console.result({"instance": instance, "log": log, "text": text})
            return
        source = f"==> {instance}: {log}"
        if source != self._source:
            print(source)
            self._source = source
        # What an instance writes must not rule the terminal it is shown on.
        print(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text.replace("\r", "\n")), end="", flush=True)


def _end(cloud: Cloud, deployment: Deployment) -> End | None:
    try:
        return read_record(End, cloud.folder.read(Keys(deployment.name).end))
    except (FileNotFoundError, ValueError):
        return None
