"""What rank 0 says: one live line where there is a terminal, one plain line an epoch everywhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

BAR_WIDTH = 20
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

    def progress(self, line: str, fraction: float | None = None) -> None:
        """A line that the next one replaces; without a terminal, one every half minute.

        Args:
            fraction: of the work that is done, drawn as a bar where there is room for it.
        """
        if not self.is_enabled:
            return
        if self._live:
            self._erase()
            width = shutil.get_terminal_size().columns - 1
            if fraction is not None and width - len(line) > BAR_WIDTH:
                line = f"{bar(fraction)} {line}"
            line = line[:width]  # a line that wraps cannot be replaced
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


def bar(fraction: float) -> str:
    """`━━━━━━──────────────`: twenty places, as many of them heavy as are done."""
    done = min(max(round(fraction * BAR_WIDTH), 0), BAR_WIDTH)
    return "━" * done + "─" * (BAR_WIDTH - done)


def duration(seconds: float) -> str:
    """`75` → `1:15`, `4000` → `1:06:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
