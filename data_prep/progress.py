"""Progress bars: live in a terminal, a plain line now and then elsewhere (a log, a pipe)."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

PLAIN_LINE_SECONDS = 15.0


def progress_bar(total: int, description: str, enabled: bool = True) -> tqdm[Any]:
    """A bar over `total` images; to be used as a context manager, `update()` for each."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=description, unit="img", disable=not enabled)
    return tqdm(
        total=total,
        desc=description,
        unit="img",
        disable=not enabled,
        file=_PlainLines(),
        mininterval=PLAIN_LINE_SECONDS,
        maxinterval=PLAIN_LINE_SECONDS,
        bar_format="{desc}: {n_fmt} of {total_fmt} images, {rate_fmt}",
    )


class _PlainLines:
    """Turns what tqdm writes to rewrite a line into lines of their own."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line and "?" not in line:  # tqdm's first line, before there is a rate
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
