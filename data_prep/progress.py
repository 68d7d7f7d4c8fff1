"""Progress bars: live in a terminal, a plain line now and then elsewhere (a log, a pipe)."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

PLAIN_LINE_SECONDS = 15.0


def progress_bar(
    total: int, description: str, enabled: bool = True, initial: int = 0, unit: str = "img"
) -> tqdm[Any]:
    """A bar over `total` images, bytes (unit "B") or units; a context manager, `update()` for each."""
    in_bytes = unit == "B"
    common: dict[str, Any] = {
        "total": total,
        "initial": initial,
        "desc": description,
        "unit": unit,
        "disable": not enabled,
    }
    if sys.stderr.isatty():
        return tqdm(**common, unit_scale=in_bytes)
    noun = "" if in_bytes else " images" if unit == "img" else f" {unit}s"
    return tqdm(
        **common,
        unit_scale=in_bytes,
        file=_PlainLines(),
        mininterval=PLAIN_LINE_SECONDS,
        maxinterval=PLAIN_LINE_SECONDS,
        bar_format="{desc}: {n_fmt} of {total_fmt}" + noun + ", {rate_fmt}",
    )


class _PlainLines:
    """Turns what tqdm writes to rewrite a line into lines of their own."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line and "?" not in line:  # tqdm's first line, before there is a rate
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
