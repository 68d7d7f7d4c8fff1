"""The data card of a prepared data set, and with --audit its duplicates and faults.

    python -m data_prep stats data/intel --audit
    python -m data_prep stats s3://my-bucket/imagenet --out imagenet-card

Writes `data_card.html` (one page, nothing else needed) and `data_card.png` (one picture); with --audit also
`audit.json` and `audit.csv`.

Example:
    >>> write_card("data/intel", out=None, audit=True)
    PosixPath('data/intel/card/data_card.html')
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.storage import is_s3, write_atomically

if TYPE_CHECKING:
    from data_prep.stats.audit_report import AuditReport
    from data_prep.stats.samples import DataSet

__all__ = ["add_arguments", "run", "write_card"]

PAGE_NAME, PICTURE_NAME = "data_card.html", "data_card.png"
AUDIT_NAME, TABLE_NAME = "audit.json", "audit.csv"
MAX_FAULTS = 5  # printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m data_prep stats`."""
    parser.add_argument("folder", help="folder of a prepared data set, or s3://bucket/prefix")
    parser.add_argument(
        "--out", type=Path, help="folder for the card (default: FOLDER/card; of S3 ./NAME-card)"
    )
    parser.add_argument("--audit", action="store_true", help="look for duplicates, leaks and faulty images")
    parser.add_argument("--workers", type=int, default=0, help="processes of the audit (default: one a core)")


def run(options: argparse.Namespace) -> int:
    """Write the card and say what was found. Returns 1 where samples are damaged, else 0."""
    if options.workers < 0:
        raise ValueError(f"--workers is {options.workers}: it must be at least 0")
    written = _write(options.folder, options.out, options.audit, options.workers, progress=True)
    print(f"wrote {written.page} and {PICTURE_NAME}")
    if written.report is not None:
        from data_prep.stats.audit_report import summary_lines

        print(f"audit of {written.report.counts.num_images:,} images:")
        for line in summary_lines(written.report):
            print(f"  {line}")
    for fault in written.faults[:MAX_FAULTS]:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if written.faults else 0


def write_card(
    location: str, out: Path | None, audit: bool = False, num_workers: int = 0, progress: bool = True
) -> Path:
    """Write the data card of the data set at a path or `s3://bucket/prefix`; returns the path of its page.

    Args:
        out: folder for the files; None for `<location>/card`, or `./<name>-card` of a data set in S3.
        audit: look at every image, too, and write `audit.json` and `audit.csv`.
        num_workers: processes of the audit; 0 for one a core, 1 for this process.

    A damaged sample does not end it: the card names it, and so does the report of the audit.

    Raises:
        ValueError: there is no such data set, or a file of it is missing or damaged.
        RuntimeError: a worker was killed, S3 cannot be read, or the disk is full.
    """
    return _write(str(location), out, audit, num_workers, progress).page


@dataclass(frozen=True)
class _Written:
    page: Path
    report: AuditReport | None
    faults: list[str]  # of damaged samples, a sentence each


def _write(location: str, out: Path | None, audit: bool, num_workers: int, progress: bool) -> _Written:
    # Only here: drawing needs matplotlib, which the other commands shall not wait for.
    from data_prep.stats.card import render_card
    from data_prep.stats.contact_sheet import choose_rows
    from data_prep.stats.facts import facts_of
    from data_prep.stats.overview import overview_png
    from data_prep.stats.samples import open_data_set

    data_set = open_data_set(location)
    if not data_set.num_samples:
        raise ValueError(f"{location} has no images: there is nothing to show")
    facts = facts_of(data_set)
    rows, faults = choose_rows(data_set)
    folder = out or _default_folder(data_set)
    folder.mkdir(parents=True, exist_ok=True)
    report, findings, section = None, None, ""
    if audit:
        from data_prep.stats.audit import audit as audit_data_set
        from data_prep.stats.audit_page import render_audit
        from data_prep.stats.audit_report import audit_csv, summary_lines

        report = audit_data_set(data_set, num_workers, progress)
        faults = [
            f"{data_set.describe(entry.split, entry.sample_id)} {entry.fault}" for entry in report.damaged
        ]
        findings, section = summary_lines(report), render_audit(data_set, report)
        write_atomically(folder / AUDIT_NAME, (report.model_dump_json(indent=1) + "\n").encode())
        write_atomically(folder / TABLE_NAME, audit_csv(report).encode())
    write_atomically(folder / PICTURE_NAME, overview_png(facts, rows, findings))
    leaks = [line for line in findings or () if "also in train" in line]
    page = render_card(facts, rows, section, [*leaks, *faults[:MAX_FAULTS]])
    write_atomically(folder / PAGE_NAME, page.encode("utf-8", "backslashreplace"))
    return _Written(folder / PAGE_NAME, report, faults)


def _default_folder(data_set: DataSet) -> Path:
    if is_s3(data_set.location):
        return Path(f"{data_set.name}-card")
    return Path(data_set.location) / "card"
