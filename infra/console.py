"""What a command says: plain words for people, or one JSON object for programs (`--json`)."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from infra.errors import UserError


def plain(text: str) -> str:
    """Without control characters: much of what is said comes from records that instances write."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


class Console:
    """With `as_json`, words go to stderr, and stdout gets the result alone."""

    def __init__(self, as_json: bool = False, is_sure: bool = False) -> None:
        self.as_json, self._is_sure = as_json, is_sure

    def say(self, line: str = "") -> None:
        print(plain(line), file=sys.stderr if self.as_json else sys.stdout, flush=True)

    def warn(self, line: str) -> None:
        print(f"warning: {plain(line)}", file=sys.stderr, flush=True)

    def result(self, facts: dict[str, Any]) -> None:
        """Once, at the end."""
        if self.as_json:
            print(json.dumps(facts, indent=1), flush=True)

    def confirm(self, question: str) -> bool:
        """Whether the user says yes; `--yes` has said it already.

        Raises:
            UserError: nobody is there to be asked.
        """
        if self._is_sure:
            return True
        if not sys.stdin.isatty():
            raise UserError(f"nobody is there to answer “{question}”: add --yes to agree beforehand")
        print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")


def dollars(amount: float) -> str:
    return f"${amount:,.2f}"


def size(num_bytes: float) -> str:
    """`64.2 GB`; decimal units, as S3 bills."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.2f} TB"


def duration(seconds: float) -> str:
    """`3 h 20 min`, `4 min`, `12 s`."""
    seconds = max(0.0, seconds)
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
