"""What rank 0 says: one live line where there is a terminal, one plain line an epoch everywhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

PLAIN_LINE_SECONDS = 30.0  # how often progress is said where no line can be rewritten


class Console:
    """Progress of a run; silent on other ranks."""

    def __init__(self, enabled: bool, stream: TextIO | None = None) -> None:
        self.is_enabled = enabled
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._live_length = 0
        self._last_plain = time.monotonic()

    def say(self, line: str) -> None:
        """A line that stays."""
        if self.is_enabled:
            self._erase()
            print(line, file=self._stream, flush=True)

    def progress(self, line: str) -> None:
        """A line that the next one replaces; without a terminal, one every half minute."""
        if not self.is_enabled:
            return
        if self._live:
            self._erase()
            self._stream.write(line)
            self._stream.flush()
            self._live_length = len(line)
        elif time.monotonic() - self._last_plain > PLAIN_LINE_SECONDS:
            print(line, file=self._stream, flush=True)
            self._last_plain = time.monotonic()

    def _erase(self) -> None:
        if self._live_length:
            self._stream.write("\r" + " " * self._live_length + "\r")
            self._live_length = 0


def duration(seconds: float) -> str:
    """`75` → `1:15`, `4000` → `1:06:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
