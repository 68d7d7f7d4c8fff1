"""The command `compare`: runs → one table, one page, and paired tests on the same images.

python -m evaluation compare runs/resnet18 runs/residual_cnn --data data/intel
python -m evaluation compare mlflow:imagenet-sprint --mlflow http://host:5000
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from data_prep.manifest import load_manifest
from data_prep.storage import is_s3
from evaluation.compare.comparison import Comparison, compare
from evaluation.compare.examine import examine
from evaluation.compare.mlflow_runs import is_mlflow_reference, read_mlflow_runs
from evaluation.compare.runs import MAX_RUNS, RunRecord, read_run_folder, with_own_names
from evaluation.compare.write import write_comparison
from train.config import TrackingSection
from train.data.loaders import BACKENDS
from train.data.staging import stage
from train.tracking.mlflow_client import tracking_uri

DESCRIPTION = "runs → one table and page, paired tests on the same images"
DEFAULT_RUNS_FOLDER = Path("runs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run folder, an MLflow run id, or mlflow:EXPERIMENT (2 to 8 in all)",
    )
    parser.add_argument(
        "--data", help="the prepared data set to predict on, for paired tests: a folder or s3://…"
    )
    parser.add_argument("--split", choices=["val", "train"], default="val")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="default: comparison/")
    parser.add_argument(
        "--baseline", metavar="RUN", help="what the others are tested against (default: the best)"
    )
    parser.add_argument("--loader", choices=["auto", *BACKENDS], default="auto")
    parser.add_argument("--no-measure", action="store_true", help="measure neither speed nor memory here")
    parser.add_argument(
        "--mlflow", metavar="URI", help="where MLflow runs are read (default: runs/mlflow.db)"
    )
    parser.add_argument(
        "--log-to",
        metavar="URI",
        help="log the comparison to this MLflow as a run compare-… (default: where the runs themselves are)",
    )
    parser.add_argument("--no-mlflow", action="store_true", help="do not log the comparison")
    parser.add_argument("--experiment", default=TrackingSection().experiment, help="that it is logged to")


def run(options: argparse.Namespace) -> int:
    """Read, measure, predict, compare, write; the exit code."""
    with tempfile.TemporaryDirectory(prefix="compare-") as scratch:
        records, notes = _read(options, Path(scratch))
        data = _data_folder(options.data, options.split, records)
        examined = [
            examine(
                chr(ord("A") + position),
                record,
                data=data,
                split=options.split,
                loader=options.loader,
                with_measurements=not options.no_measure,
                say=_say,
            )
            for position, record in enumerate(records)
        ]
    comparison = compare(examined, options.baseline, notes)
    files = write_comparison(options.out, comparison, split=options.split)
    for line in _summary(comparison):
        print(line)
    print(f"comparison: {files.html}")
    if (uri := _log_uri(options, records)) is not None:
        from evaluation.compare.mlflow_log import log_comparison

        _say(log_comparison(comparison, files, uri, options.experiment))
    return 0


def _log_uri(options: argparse.Namespace, records: list[RunRecord]) -> str | None:
    """Where the comparison is logged: as named, else where all the runs are; None for nowhere."""
    if options.no_mlflow or options.log_to is not None:
        return None if options.no_mlflow else str(options.log_to)
    uris = {_uri_of(record, options.mlflow) for record in records}
    return uris.pop() if len(uris) == 1 else None


def _uri_of(record: RunRecord, read_from: str | None) -> str | None:
    if record.summary.get("mlflow_run_id") is None:
        return None
    if is_mlflow_reference(record.source):
        return read_from or tracking_uri(TrackingSection(), DEFAULT_RUNS_FOLDER)
    if record.folder is None or record.recipe is None or not record.recipe.tracking.mlflow:
        return None
    return tracking_uri(record.recipe.tracking, record.folder.parent)


def _read(options: argparse.Namespace, scratch: Path) -> tuple[list[RunRecord], list[str]]:
    records: list[RunRecord] = []
    notes: list[str] = []
    for reference in options.runs:
        if Path(reference).is_dir():
            records.append(read_run_folder(Path(reference), reference))
        elif is_mlflow_reference(reference):
            uri = options.mlflow or tracking_uri(TrackingSection(), DEFAULT_RUNS_FOLDER)
            found, left_out = read_mlflow_runs(reference, uri, scratch)
            records += found
            notes += [left_out] if left_out else []
        else:
            raise ValueError(
                f"{reference} is neither a run folder nor an MLflow run: name a folder such as runs/demo, a "
                "run id of 32 digits, or mlflow:EXPERIMENT"
            )
    if len(records) < 2:
        raise ValueError("a comparison needs two runs or more: name another run folder or MLflow run")
    if len(records) > MAX_RUNS:
        raise ValueError(
            f"{len(records)} runs are too many for one page: compare at most {MAX_RUNS} at a time"
        )
    return with_own_names(records), notes


def _data_folder(data: str | None, split: str, records: list[RunRecord]) -> Path | None:
    """On this machine, with the split in it."""
    if data is None:
        return None
    folder = Path(data)
    if is_s3(data):
        recipe = next((record.recipe for record in records if record.recipe is not None), None)
        folder = stage(data, recipe.data.stage_folder if recipe is not None else Path("data/staged")).folder
    splits = load_manifest(folder).splits
    if split not in splits:
        raise ValueError(f"{data} has no split {split!r}: it holds {', '.join(splits)}")
    return folder


def _summary(comparison: Comparison) -> list[str]:
    lines = []
    for run in comparison.runs:
        score = "no accuracy" if run.score is None else f"top-1 {run.score:.2%}"
        lines.append(f"{run.letter} {run.name}: {score}{', the best' if run is comparison.best else ''}")
    return [*lines, *comparison.verdicts]


def _say(line: str) -> None:
    print(line, file=sys.stderr)
