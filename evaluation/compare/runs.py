"""What a run folder tells of its run; what is missing is a note, not an error.

Example:
    >>> record = read_run_folder(Path("runs/demo"))
    >>> record.summary["best_top1"], record.notes
    (0.913, ())
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data_prep.manifest import Manifest, load_manifest
from data_prep.plain_json import read_json
from data_prep.storage import is_s3
from evaluation.metrics import finite_number
from evaluation.predictions_file import PREDICTIONS_NAME
from train.checkpoint import BEST_NAME, BEST_WEIGHTS_NAME
from train.config import Recipe, parse_recipe
from train.config.reading import MAX_RECIPE_BYTES
from train.run_folder import METRICS_NAME, RECIPE_NAME, SUMMARY_NAME, read_status
from train.tracking.metrics_file import read_metrics
from train.tracking.mlflow_state import load_wanted

MAX_RUNS = 8  # that curves of different colours can be told apart of
MAX_NAME_LENGTH = 60


@dataclass(frozen=True)
class RunRecord:
    """A run as it was recorded.

    Attributes:
        name: as the page says it; different for every run of a comparison.
        source: how it was named on the command line.
        folder: of the run on this machine; None for an MLflow run without one.
        checkpoint: a file or run folder for `load_trained`; None where there is none.
        checkpoint_sha256: of the best checkpoint, as recorded.
        saved_predictions: the file that a report left; None where there is none.
        weights_bytes: size of best.safetensors, the weights alone.
        recipe: None where it is missing or of another version.
        summary: the fields of summary.json that are there; {} for a run that did not end.
        rows: of metrics.jsonl.
        hardware: that it was trained on, where the run said so.
        notes: sentences on what is missing.
    """

    name: str
    source: str
    folder: Path | None
    checkpoint: Path | None
    recipe: Recipe | None
    summary: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    checkpoint_sha256: str | None = None
    saved_predictions: Path | None = None
    weights_bytes: int | None = None
    hardware: str | None = None
    notes: tuple[str, ...] = ()

    def number(self, field: str) -> float | None:
        """A number of the summary; None where it is missing or none."""
        return finite_number(self.summary.get(field))


def read_run_folder(folder: Path, source: str = "") -> RunRecord:
    """Everything that the folder has.

    Raises:
        ValueError: it is no run folder: not one of recipe.yaml, metrics.jsonl and summary.json is there.
    """
    files = {name: (folder / name).is_file() for name in (RECIPE_NAME, METRICS_NAME, SUMMARY_NAME)}
    if not any(files.values()):
        raise ValueError(
            f"{folder} is no run folder: it holds none of {', '.join(files)}; name a folder such as runs/demo"
        )
    notes: list[str] = []
    recipe = read_recipe(folder / RECIPE_NAME, notes)
    summary = read_summary(folder / SUMMARY_NAME, notes)
    rows = read_rows(folder / METRICS_NAME, notes)
    if not summary:
        reason = read_status(folder).get("reason")
        notes.append(
            "It has no summary.json, so it did not end"
            + (f" ({str(reason)[:MAX_NAME_LENGTH]})" if reason else "")
            + ": its figures are those so far."
        )
    inside = folder / "checkpoints"
    has_checkpoint = (inside / BEST_NAME).is_file()
    saved = folder / "report" / PREDICTIONS_NAME
    if not has_checkpoint:
        notes.append("It has no checkpoints/best.pt: nothing is predicted with it.")
    weights = inside / BEST_WEIGHTS_NAME
    wanted = load_wanted(folder)
    return RunRecord(
        name=folder.absolute().name[:MAX_NAME_LENGTH],
        source=source or str(folder),
        folder=folder,
        checkpoint=folder if has_checkpoint else None,
        recipe=recipe,
        summary=summary,
        rows=rows,
        checkpoint_sha256=sha256_of(summary),
        saved_predictions=saved if saved.is_file() else None,
        weights_bytes=weights.stat().st_size if weights.is_file() else None,
        hardware=None if wanted is None else wanted.tags.get("hardware"),
        notes=tuple(notes),
    )


def read_recipe(path: Path, notes: list[str]) -> Recipe | None:
    try:
        with path.open("rb") as file:
            return parse_recipe(file.read(MAX_RECIPE_BYTES + 1).decode("utf-8", errors="replace"))
    except FileNotFoundError:
        notes.append(f"It has no {path.name}: its model is not known.")
    except (OSError, ValueError):
        notes.append(f"Its {path.name} is damaged or of another version.")
    return None


def read_summary(path: Path, notes: list[str]) -> dict[str, Any]:
    """{} where there is none, or none that can be read."""
    try:
        summary = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        summary = None
    if not isinstance(summary, dict):
        notes.append(f"Its {path.name} is damaged and was passed over.")
        return {}
    return summary


def read_rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """All whole rows; a note where lines are none."""
    try:
        rows = read_metrics(path)
        with path.open("rb") as file:
            num_lines = sum(1 for _ in file)
    except FileNotFoundError:
        notes.append(f"It has no {path.name}: there are no curves of it.")
        return []
    except (OSError, ValueError):
        notes.append(f"Its {path.name} cannot be read: there are no curves of it.")
        return []
    if num_damaged := num_lines - len(rows):
        notes.append(
            f"{num_damaged:,} of {num_lines:,} lines of its {path.name} are damaged and were passed over."
        )
    return rows


def sha256_of(summary: Mapping[str, Any]) -> str | None:
    digest = summary.get("checkpoint_sha256")
    return digest if isinstance(digest, str) else None


def with_own_names(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The same runs, each with a name of its own: of equal ones with where they are, or a number."""
    named: list[RunRecord] = []
    taken: set[str] = set()
    for record in records:
        name = record.name
        if sum(other.name == name for other in records) > 1 and record.folder is not None:
            name = f"{record.folder.absolute().parent.name}/{name}"
        number, plain = 2, name
        while name in taken:
            name = f"{plain} ({number})"
            number += 1
        taken.add(name)
        named.append(replace(record, name=name))
    return named


def own_manifest(record: RunRecord) -> Manifest | None:
    """Of the data set that the run was trained on, where that is still on this machine."""
    if record.recipe is None or is_s3(str(record.recipe.data.path)):
        return None
    try:
        return load_manifest(Path(record.recipe.data.path))
    except (OSError, ValueError):
        return None


def index_sha256(manifest: Manifest | None, split: Literal["train", "val"]) -> str | None:
    """What tells two splits apart: the SHA-256 of the sample index."""
    if manifest is None or split not in manifest.splits:
        return None
    return manifest.splits[split].index.sha256
