"""How the agent's work ends. sprint-bootstrap reads the verdict, a line each: action, status, reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infra.layout import EndStatus


@dataclass(frozen=True)
class Verdict:
    """`end` sets the deployment's capacity to 0; `leave` only shuts this machine down, and it is replaced."""

    action: Literal["end", "leave"]
    status: EndStatus | Literal["interrupted"]
    reason: str

    def write(self, path: Path) -> None:
        """In one piece: half a verdict would be none."""
        lines = [self.action, self.status, " ".join(self.reason.split())[:500] or "no reason"]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        temporary.replace(path)


class Ending(Exception):
    """Raised from anywhere: the agent's work is over, with this verdict."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.reason)
        self.verdict = verdict


def failed(reason: str) -> Ending:
    return Ending(Verdict("end", "failed", reason))


def leaving(reason: str) -> Ending:
    return Ending(Verdict("leave", "interrupted", reason))
