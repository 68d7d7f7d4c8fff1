"""Where the time goes between a launch and its first step: each restart pays it again.

Example:
    >>> startup = Startup()
    >>> startup.mark("model")             # what was done since the mark before
    >>> startup.describe()
    '6.1 s after the launch: torchrun 2.4, imports 2.2, model 0.4, first step 1.1'
"""

from __future__ import annotations

import os
import time
from pathlib import Path

LEAST_SHOWN_SECONDS = 0.05


class Startup:
    """Marks on the way to the first step, beginning with the start of this process or of torchrun."""

    def __init__(self) -> None:
        own = _age_seconds(os.getpid())
        is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        agent = _age_seconds(os.getppid()) if "TORCHELASTIC_RUN_ID" in os.environ and is_first else own
        now = time.monotonic()
        self._began = now - agent
        self._marks = [("torchrun", now - own), ("imports", now)]

    def mark(self, name: str) -> None:
        """Name what was done since the last mark."""
        self._marks.append((name, time.monotonic()))

    @property
    def seconds(self) -> dict[str, float]:
        """Name → seconds, in their order."""
        before = self._began
        found: dict[str, float] = {}
        for name, at in self._marks:
            found[name] = found.get(name, 0.0) + at - before
            before = at
        return found

    def describe(self) -> str:
        parts = [f"{name} {s:.1f}" for name, s in self.seconds.items() if s >= LEAST_SHOWN_SECONDS]
        return f"{self._marks[-1][1] - self._began:.1f} s after the launch: {', '.join(parts)}"


def _age_seconds(pid: int) -> float:
    """How long a process has existed; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
    return max(age, 0.0)
