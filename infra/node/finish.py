"""The end of a deployment: a report if it can be had, the figures in S3, and `end.json`, written once."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from pathlib import Path
from typing import Any

from infra.errors import UserError
from infra.layout import End, EndStatus, Job, Keys
from infra.node import commands
from infra.node.interrupts import Interrupts
from infra.node.settings import Settings
from infra.node.shipping import Shipper
from infra.node.store import Store
from infra.node.verdict import Ending

MAX_SUMMARY_BYTES = 128 << 10
MAX_REPORT_BYTES = 512 << 20
MAX_REPORT_FILES = 5000
BESIDE = ("summary.json", "metrics.jsonl", "recipe.yaml", "status.json", "lr_finder.png", "lr_finder.json")

say = logging.getLogger(__name__)


def summary_of(run: Path) -> dict[str, Any] | None:
    """`summary.json` of a run's folder; None where there is none that can be used."""
    path = run / "summary.json"
    try:
        if path.stat().st_size > MAX_SUMMARY_BYTES:
            return None
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None


def words_of(reason: str, summary: dict[str, Any] | None) -> str:
    """The reason with the figures that everybody asks for first."""
    words = [reason]
    for key, form in (("final_top1", "top-1 {:.2%}"), ("cost_usd", "${:.2f}"), ("wall_seconds", "{:,.0f} s")):
        value = (summary or {}).get(key)
        if isinstance(value, int | float):
            words.append(form.format(value))
    return ", ".join(words)


def evaluate(
    job: Job, settings: Settings, interrupts: Interrupts, shipper: Shipper, data: Path
) -> str | None:
    """A report of the run, bounded in time. Why there is none, where there is none: nothing else follows."""
    if not job.evaluate:
        return None
    shipper.phase("evaluating")
    try:
        ended = interrupts.run(
            commands.report_command(settings, data),
            "evaluate",
            commands.environment(job, settings),
            timeout_seconds=settings.waits.evaluation,
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if ended.code == 0 else ended.stopped_for or ended.last_words


def upload_report(settings: Settings, store: Store) -> None:
    """The report and the figures beside it, to `reports/<deployment>/`; what cannot be is said, and left."""
    keys, num_bytes = Keys(settings.deployment), 0
    beside = [settings.run / name for name in BESIDE]
    files = beside + sorted((settings.run / "report").rglob("*"))[:MAX_REPORT_FILES]
    for path in files:
        if path.is_symlink() or not path.is_file():
            continue
        num_bytes += path.stat().st_size
        if num_bytes > MAX_REPORT_BYTES:
            say.warning("the report is larger than %d MiB: the rest is left out", MAX_REPORT_BYTES >> 20)
            return
        name = path.relative_to(settings.run).as_posix().removeprefix("report/")
        try:
            store.upload(f"{keys.report}{name}", path)
        except (UserError, OSError) as error:
            say.warning("%s could not be uploaded: %s", name, error)
            return


def write_end(
    settings: Settings, store: Store, status: EndStatus, reason: str, summary: dict[str, Any] | None
) -> None:
    """`end.json`, where nobody wrote one; a fault is said: the end of billing does not wait for it."""
    end = End(status=status, reason=reason, time=time.time(), instance=settings.instance, summary=summary)
    try:
        if not store.create(Keys(settings.deployment).end, end.to_json()):
            say.info("end.json was there already")
    except UserError as error:
        say.warning("end.json could not be written: %s", error)


def stay_for_the_end(settings: Settings, interrupts: Interrupts) -> None:
    """After a notice the market takes the machine within minutes; until then, or until SIGTERM, wait."""
    until = time.monotonic() + settings.waits.after_notice
    with contextlib.suppress(Ending):
        while time.monotonic() < until and interrupts.reason() != "signal":
            time.sleep(settings.waits.poll)
