"""The review: a person's verdicts in a CSV file, and what becomes of them.

`review.csv` has a row a suspect and an empty column `verdict`: keep (the label is right), drop (leave the
image out), relabel:NAME (it is of the class NAME), or nothing (not looked at).

Example:
    >>> review = read_review(Path("runs/demo/audit/review.csv"), suspects, class_names)
    >>> corrections_of(review)
"""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from data_prep.corrections import Correction
from data_prep.plain_json import read_bounded
from evaluation.audit.suspects import Accuracy

MAX_REVIEW_BYTES = 256 << 20
MAX_FAULTS = 10
COLUMNS = (
    "rank",
    "sample_id",
    "split",
    "key",
    "given",
    "suggested",
    "score",
    "beyond_threshold",
    "duplicates",
)
REVIEW_COLUMNS = (*COLUMNS[:7], "verdict")
# A spreadsheet takes a cell that begins so for a formula, and may run it.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Suspect:
    """A row of the ranked list.

    Attributes:
        rank: counted from 1. given, suggested: labels.
        score: probability of the given label.
        beyond_threshold: whether confident learning takes the label for wrong.
        duplicates: keys of images with the same bytes and another label.
    """

    rank: int
    sample_id: int
    split: str
    key: str
    given: int
    suggested: int
    score: float
    beyond_threshold: bool
    duplicates: tuple[str, ...] = ()


def harmless(text: str) -> str:
    """The text as a cell that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


def suspects_csv(suspects: Sequence[Suspect], class_names: Sequence[str], for_review: bool = False) -> str:
    """The ranked list, or the sheet that a person fills in."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(REVIEW_COLUMNS if for_review else COLUMNS)
    for row in suspects:
        given, suggested = (harmless(class_names[label]) for label in (row.given, row.suggested))
        common = [row.rank, row.sample_id, row.split, harmless(row.key), given, suggested, f"{row.score:.4f}"]
        duplicates = harmless("; ".join(row.duplicates))
        writer.writerow(
            [*common, ""] if for_review else [*common, "yes" if row.beyond_threshold else "no", duplicates]
        )
    return buffer.getvalue()


@dataclass(frozen=True)
class Verdict:
    """What a person decided about a suspect; `label` is the new one, for relabel."""

    suspect: Suspect
    kind: Literal["keep", "drop", "relabel"]
    label: int | None = None


def read_review(
    path: Path, suspects: Sequence[Suspect], class_names: Sequence[str]
) -> tuple[list[Verdict], int]:
    """The verdicts in a reviewed file, and how many rows have none.

    Raises:
        ValueError: it is no such file, or has rows that cannot be understood; names all of them.
    """
    try:
        text = read_bounded(path, MAX_REVIEW_BYTES).decode("utf-8-sig")
        # Spreadsheets of many countries write semicolons, whatever they read.
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    except FileNotFoundError:
        raise ValueError(f"--apply {path} does not exist") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--apply {path} is no CSV file in UTF-8 ({error})") from None
    if rows and not {"sample_id", "key", "verdict"} <= set(rows[0]):
        raise ValueError(f"--apply {path} lacks one of the columns sample_id, key and verdict")
    by_id = {suspect.sample_id: suspect for suspect in suspects}
    verdicts: list[Verdict] = []
    faults: list[str] = []
    num_empty = 0
    for line, row in enumerate(rows, start=2):
        try:
            verdict = _verdict(row, by_id, class_names)
        except ValueError as error:
            faults.append(f"line {line}: {error}")
            continue
        if verdict is None:
            num_empty += 1
            continue
        verdicts.append(verdict)
        del by_id[verdict.suspect.sample_id]  # a second verdict on it is a fault
    if faults:
        more = f"; and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
        raise ValueError(f"--apply {path}: {'; '.join(faults[:MAX_FAULTS])}{more}")
    return verdicts, num_empty


def _verdict(
    row: dict[str, str | None], by_id: dict[int, Suspect], class_names: Sequence[str]
) -> Verdict | None:
    """ValueError: what is wrong with the row. None: it has no verdict."""
    text = (row["verdict"] or "").strip()
    if not text:
        return None
    number = (row["sample_id"] or "").strip()
    suspect = by_id.get(int(number)) if number.isascii() and number.isdigit() else None
    if suspect is None:
        raise ValueError(f"sample_id {number!r} is not in this audit, or has a verdict already")
    if (row["key"] or "") not in (suspect.key, harmless(suspect.key)):
        raise ValueError(f"sample {number} is {suspect.key!r} in this audit, not {row['key']!r}")
    kind, colon, name = text.partition(":")
    kind, name = kind.strip().lower(), name.strip()
    if kind in ("keep", "drop") and not colon:
        return Verdict(suspect, kind)  # type: ignore[arg-type]
    if kind != "relabel" or not name:
        raise ValueError(f"verdict {text!r} is none of keep, drop and relabel:CLASS")
    if name not in class_names:
        near = difflib.get_close_matches(name, class_names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {len(class_names)} classes"
        raise ValueError(f"there is no class {name!r}; {hint}")
    label = list(class_names).index(name)
    return Verdict(suspect, "keep") if label == suspect.given else Verdict(suspect, "relabel", label)


def corrections_of(verdicts: Sequence[Verdict], class_names: Sequence[str]) -> list[Correction]:
    """What `data_prep prepare --corrections` is to change."""
    return [
        Correction(
            key=verdict.suspect.key,
            given=class_names[verdict.suspect.given],
            verdict=verdict.kind,
            class_name=None if verdict.label is None else class_names[verdict.label],
        )
        for verdict in verdicts
        if verdict.kind != "keep"
    ]


def corrected_accuracy(
    verdicts: Sequence[Verdict],
    predicted: NDArray[np.int64],
    labels: NDArray[np.int64],
    sample_ids: NDArray[np.int64],
) -> tuple[Accuracy, Accuracy]:
    """Top-1 against the labels as given, and as the verdicts leave them."""
    place_of = {int(sample_id): place for place, sample_id in enumerate(sample_ids)}
    after, is_kept = labels.copy(), np.ones(len(labels), bool)
    for verdict in verdicts:
        place = place_of[verdict.suspect.sample_id]
        if verdict.kind == "drop":
            is_kept[place] = False
        elif verdict.label is not None:
            after[place] = verdict.label
    return Accuracy.of(predicted == labels), Accuracy.of((predicted == after)[is_kept])
