"""Logs: a JSON object a line on stdout. Never a body, a query, a key or a file's name."""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import UTC, datetime
from typing import Any

_OUTPUT = logging.getLogger("serve.http")


def set_up() -> None:
    """Everything that this process logs becomes JSON lines; libraries' from warnings on, uvicorn's errors."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    _OUTPUT.setLevel(logging.INFO)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.ERROR)  # its warnings are of clients: requests' lines say it
    logging.raiseExceptions = False  # a full disk or a closed pipe costs lines, not requests


def event(what: str, **facts: Any) -> None:
    """One line: `{"time": …, "event": what, …}`."""
    _OUTPUT.info(what, extra={"facts": facts})


def failure(what: str, error: BaseException, **facts: Any) -> None:
    """One line with the traceback."""
    _OUTPUT.error(what, exc_info=error, extra={"facts": facts})


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        now = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": now, "level": record.levelname.lower()}
        if record.name == _OUTPUT.name:
            line["event"] = record.getMessage()
        else:
            line |= {"event": "library", "logger": record.name, "message": record.getMessage()[:2000]}
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)[-8000:]
        return json.dumps(line, default=str)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start
