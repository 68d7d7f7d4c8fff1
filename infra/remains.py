"""After Ctrl-C: what exists now and what it costs, from what this machine has on record; AWS is not asked."""

from __future__ import annotations

import argparse

from infra.console import dollars
from infra.deployment import BASE_NAME, Deployment, StateFolder
from infra.errors import UserError


def what_remains(options: argparse.Namespace) -> str:
    """A sentence or two; never fails."""
    try:
        return _words(StateFolder(options.state_dir), getattr(options, "name", None), options.command)
    except (UserError, OSError, ValueError):
        return "python -m infra status says what exists and what it costs."


def _words(states: StateFolder, name: str | None, command: str) -> str:
    names = [name] if name else states.names()
    known = [d for n in names if (d := states.load(n)) is not None]
    running = [d for d in known if d.may_exist]
    if running:
        parts = [_running(deployment) for deployment in running]
        again = f"The same command goes on; python -m infra status {running[0].name} looks"
        return f"{'; '.join(parts)}. {again}, python -m infra down {running[0].name} removes it."
    if list(states.root.glob(f"base/*/{BASE_NAME}")):
        again = " The same command goes on;" if command in ("up", "prepare", "down") else ""
        return (
            "No instance runs, so nothing costs money by the hour; the bucket and what is in it may exist "
            f"($0.023 a GB and month).{again} python -m infra status looks."
        )
    return "Nothing exists in AWS, and nothing costs money."


def _running(deployment: Deployment) -> str:
    price = f"at up to {dollars(deployment.usd_per_hour)} an hour"
    if deployment.stage == "up":
        return f"{deployment.name} goes on in the cloud, {price}, until it is finished or its hours are over"
    what = "is half made" if deployment.stage == "applying" else "is half removed"
    return f"{deployment.name} {what}: its instances may run, {price}"
