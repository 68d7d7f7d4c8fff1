"""Read what people said of the images: a matrix of coordinates, or one of similarities.

Plain text, CSV or TSV (comments, a line of column names and a column of row names or numbers may be there),
or NPY. Nothing is unpickled, and files are read only so far.

Example:
    >>> people = read_coordinates(Path("mds_360.txt"))
    >>> people.values.shape
    (360, 8)
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.plain_json import read_bounded

MAX_BYTES = 64 << 20
MAX_ROWS = 20_000
MAX_DIMENSIONS = 1024
MAX_COMPARED = 2_000  # rows of a similarity matrix: of 2 million pairs, a thousand permutations take a minute
MAX_NAME_CHARS = 200


@dataclass(frozen=True)
class HumanMatrix:
    """One file of human data.

    Attributes:
        values: float64, shape (rows, dimensions), or (rows, rows) for similarities, larger is more alike.
        names: of the rows, as the file has them; None where it has none.
        notes: sentences on what was made of the file.
    """

    values: NDArray[np.float64]
    names: tuple[str, ...] | None
    path: Path
    notes: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        return len(self.values)


def read_coordinates(path: Path) -> HumanMatrix:
    """Coordinates of a human similarity space (of multidimensional scaling, say), one row a sample or class.

    Raises:
        ValueError: the file is no such matrix; the sentence says what stands where. OSError: no such file.
    """
    values, names, notes = _read_matrix(path)
    values, notes = _without_numbering(values, notes)
    if values.shape[1] > MAX_DIMENSIONS:
        raise ValueError(
            f"{path} has {values.shape[1]:,} columns: at most {MAX_DIMENSIONS:,} dimensions can be read"
        )
    if len(values) < 4:
        raise ValueError(f"{path} has {len(values)} rows: a space of fewer than 4 points cannot be compared")
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(1))[0]) + 1
        raise ValueError(f"{path}: row {row} holds a value that is no finite number")
    if constant := [int(column) + 1 for column in np.flatnonzero(np.ptp(values, axis=0) == 0)]:
        raise ValueError(f"{path}: dimension {constant[0]} is the same for all rows: remove that column")
    return HumanMatrix(values, names, path, tuple(notes))


def read_similarities(path: Path, *, are_distances: bool = False) -> HumanMatrix:
    """Judged similarities, a row and a column a class (or sample); larger is more alike.

    The diagonal may be anything, since it is never used. A matrix that is not symmetric is averaged with its
    transpose, and says so.

    Args:
        are_distances: the file holds dissimilarities: their sign is turned.

    Raises:
        ValueError: the file is no such matrix. OSError: no such file.
    """
    values, names, notes = _read_matrix(path)
    if values.shape[1] == len(values) + 1:
        values, notes = _without_numbering(values, notes)
    rows, columns = values.shape
    if rows != columns:
        raise ValueError(
            f"{path} has {rows:,} rows and {columns:,} columns of numbers: similarities need as many columns "
            "as rows (coordinates are given with --coordinates)"
        )
    if not 4 <= rows <= MAX_COMPARED:
        raise ValueError(f"{path} compares {rows:,} things: it must be from 4 to {MAX_COMPARED:,}")
    off_diagonal = ~np.eye(rows, dtype=bool)
    if not np.isfinite(values[off_diagonal]).all():
        raise ValueError(f"{path} has gaps (values that are no finite numbers): every pair needs a judgment")
    diagonal = np.diag(values)
    looks_far = np.isfinite(diagonal).all() and float(diagonal.mean()) < float(values[off_diagonal].min())
    looks_near = np.isfinite(diagonal).all() and float(diagonal.mean()) > float(values[off_diagonal].mean())
    if looks_far and not are_distances:
        raise ValueError(
            f"{path} seems to hold distances (its diagonal is smaller than all else): give it with "
            "--distances"
        )
    if looks_near and are_distances:
        raise ValueError(
            f"{path} seems to hold similarities (its diagonal is larger than the rest): give it with "
            "--similarities"
        )
    difference = float(np.abs(values - values.T)[off_diagonal].max())
    if difference > 1e-6 * float(np.ptp(values[off_diagonal])):
        notes.append("the matrix is not symmetric: each pair has the mean of its two values")
    values = (values + values.T) / 2
    return HumanMatrix(-values if are_distances else values, names, path, tuple(notes))


def read_order(path: Path) -> list[str]:
    """Names of rows, one a line; blank lines and lines that begin with # are passed over.

    Raises:
        ValueError: too large, no text, or empty. OSError: no such file.
    """
    lines = [line.strip() for line in _text(path).splitlines()]
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise ValueError(f"{path} names no row")
    return names


def _read_matrix(path: Path) -> tuple[NDArray[np.float64], tuple[str, ...] | None, list[str]]:
    if path.suffix.lower() == ".npy":
        return _read_npy(path), None, []
    rows, names = _parse_text(_text(path), path)
    return np.array(rows, dtype=np.float64), names, []


def _read_npy(path: Path) -> NDArray[np.float64]:
    content = read_bounded(path, MAX_BYTES)
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise ValueError(f"{path} is no NPY file of plain numbers") from None
    if array.ndim != 2 or array.dtype.kind not in "fiu" or not array.size:
        raise ValueError(
            f"{path} holds {array.dtype} of shape {array.shape}: expected numbers, (rows, dimensions)"
        )
    if len(array) > MAX_ROWS:
        raise ValueError(f"{path} has {len(array):,} rows: at most {MAX_ROWS:,} can be read")
    return array.astype(np.float64)


def _text(path: Path) -> str:
    try:
        return read_bounded(path, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8: save it as plain text, CSV or NPY") from None


def _parse_text(text: str, path: Path) -> tuple[list[list[float]], tuple[str, ...] | None]:
    """Rows of numbers and, where each row begins with one, their names.

    Prose and column names may stand before the first row; after it, a line that is none is an error: were it
    passed over, all rows behind it would belong to the wrong image.
    """
    rows: list[list[float]] = []
    names: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith(("#", "%")):
            continue
        name, numbers = _split_line(line)
        is_row = bool(numbers) and None not in numbers
        if not is_row and not rows:
            continue
        values = [value for value in numbers if value is not None]
        if not is_row or len(values) != len(rows[0] if rows else values):
            expected = f"{len(rows[0])} numbers as in the first row" if rows else "numbers"
            raise ValueError(f"{path}, line {number}: expected {expected}, found {line.strip()[:60]!r}")
        if rows and bool(name) != bool(names):
            raise ValueError(f"{path}, line {number}: some rows begin with a name and some do not")
        rows.append(values)
        names += [name[:MAX_NAME_CHARS]] if name else []
        if len(rows) > MAX_ROWS:
            raise ValueError(f"{path} has more than {MAX_ROWS:,} rows")
    if not rows:
        raise ValueError(f"{path} holds no row of numbers")
    return rows, tuple(names) or None


def _split_line(line: str) -> tuple[str, list[float | None]]:
    """The words before the first number, joined, and what follows; None for what is no number."""
    separator = next((one for one in ("\t", ";", ",") if one in line), None)
    fields = line.split() if separator is None else next(csv.reader([line], delimiter=separator))
    fields = [field.strip() for field in fields]
    while fields and not fields[-1]:  # a separator at the end of the line
        fields.pop()
    numbers = [_number(field) for field in fields]
    start = 0
    # A name that is separated by spaces may consist of several words: "Rock Salt 0.4 1.2".
    limit = len(fields) if separator is None else min(1, len(fields))
    while start < limit and numbers[start] is None:
        start += 1
    return " ".join(fields[:start]), numbers[start:]


def _number(field: str) -> float | None:
    try:
        value = float(field)
    except ValueError:
        return None
    return value if "_" not in field and not math.isinf(value) else None


def _without_numbering(
    values: NDArray[np.float64], notes: list[str]
) -> tuple[NDArray[np.float64], list[str]]:
    """Without a first column that counts the rows from 0 or 1: it says where a row stands, not what it is."""
    for first in (0, 1):
        if values.shape[1] > 1 and np.array_equal(values[:, 0], np.arange(first, first + len(values))):
            return values[:, 1:], [*notes, "the first column numbers the rows and was left out"]
    return values, notes
