"""What follows from the end of a start: pure functions of status, counts and times.

A start ends with `status.json` (see docs/never_lose_a_run.md): `finished` and `failed` end the deployment,
`restart` asks for another start; where there is none, it died
without a word, which may happen so often an hour.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from infra.layout import EndStatus

HOUR = 3600.0
MAX_RESTARTS = 50  # asked for by training itself, on one instance
MAX_STARTED = 10  # instances a node and hour, before the machine image or the market is taken for broken


@dataclass(frozen=True)
class Decision:
    """`again` after `wait_seconds`; `end` the deployment with `status`; `leave` this machine alone."""

    action: Literal["again", "end", "leave"]
    reason: str
    status: EndStatus = "failed"
    wait_seconds: float = 0.0


@dataclass
class RestartPolicy:
    """Counts what one instance has seen, and what earlier ones wrote down.

    Args:
        max_attempts: starts within an hour that may die without a word.
        between_starts_seconds: at least, where a start asked for another.
        retry_seconds: after the first death; it grows with each.
        deaths: epoch seconds of earlier ones.
    """

    max_attempts: int
    between_starts_seconds: float = 60.0
    retry_seconds: float = 15.0
    deaths: list[float] = field(default_factory=list)
    num_restarts: int = 0

    def decide(self, status: str | None, reason: str, began: float, now: float) -> Decision:
        """What to do after a start that `began` and ended `now` (epoch seconds).

        Args:
            status: of status.json; None where there is none.
            reason: its reason, or the last words of the log.
        """
        if status == "finished":
            return Decision("end", reason, "stopped" if reason.endswith("budget") else "finished")
        if status == "failed" and "taken over" in reason:
            # Another machine of this deployment goes on with the run: its capacity is not ours to end.
            return Decision("leave", reason)
        if status == "failed":
            return Decision("end", reason, "failed")
        if status == "restart":
            self.num_restarts += 1
            if self.num_restarts > MAX_RESTARTS:
                return Decision("end", f"training asked for more than {MAX_RESTARTS} restarts: {reason}")
            return Decision(
                "again", reason, wait_seconds=max(0.0, self.between_starts_seconds - (now - began))
            )
        self.deaths = [moment for moment in self.deaths if now - moment < HOUR] + [now]
        if len(self.deaths) >= self.max_attempts:
            return Decision("end", f"died {len(self.deaths)} times within an hour: {reason}")
        return Decision("again", reason, wait_seconds=self.retry_seconds * 2 ** (len(self.deaths) - 1))


def too_many_instances(num_started: int, num_nodes: int) -> str | None:
    """A sentence where more instances began within an hour than a working deployment has; else None."""
    if num_started <= MAX_STARTED * num_nodes:
        return None
    return (
        f"{num_started} instances have begun within an hour and none got on: look at the logs of the last "
        "ones, and try another instance type or market"
    )
