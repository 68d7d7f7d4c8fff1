"""Files of figures with a date: prices, speeds, machines. Old ones are used, with a word on their age."""

from __future__ import annotations

from datetime import date, datetime
from functools import cache
from pathlib import Path
from typing import Any

import yaml

MAX_AGE_DAYS = 180
HERE = Path(__file__).parent


@cache
def load_dated(name: str) -> dict[str, Any]:
    """A YAML file of this folder; it has a `date`."""
    table: dict[str, Any] = yaml.safe_load((HERE / name).read_text(encoding="utf-8"))
    return table


def age_warning(what: str, taken: date | str, today: date | None = None) -> str | None:
    """A sentence where figures are older than `MAX_AGE_DAYS`, else None."""
    day = taken if isinstance(taken, date) else datetime.strptime(taken, "%Y-%m-%d").date()
    age_days = ((today or date.today()) - day).days
    if age_days <= MAX_AGE_DAYS:
        return None
    return f"{what} are from {day} ({age_days} days old): they may have moved"
