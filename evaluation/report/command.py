"""The command `report`: a checkpoint on a split of a data set → figures, plots, one page.

python -m evaluation runs/demo --data data/intel
python -m evaluation report runs/demo/checkpoints/best.pt --data data/intel --out report
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_prep.plain_json import read_json
from data_prep.storage import is_s3
from evaluation.image_properties import measure_properties
from evaluation.predict import TrainedModel, load_trained_with_sha256, predict, run_folder_of
from evaluation.predictions_file import SavedPredictions, report_folder
from evaluation.report import model_sections
from evaluation.report.page import HELD_OUT
from evaluation.report.write import ReportFiles, write_report
from evaluation.stored_images import StoredImages
from train.config import RecipeError, load_recipe
from train.config.credentials import without_credentials
from train.cost import find_price
from train.data.loaders import BACKENDS
from train.data.staging import stage
from train.run_folder import METRICS_NAME, RECIPE_NAME, SUMMARY_NAME
from train.tracking.metrics_file import read_metrics
from train.tracking.mlflow_client import add_to_run, tracking_uri
from train.validation import View, views_of

DESCRIPTION = "checkpoint + shards → report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a checkpoint file, or a run folder (its best one)")
    parser.add_argument("--data", required=True, help="the prepared data set: a folder or s3://…")
    parser.add_argument("--split", choices=["val", "train"], default="val")
    parser.add_argument(
        "--out", type=Path, help="default: report/ in the run's folder, report-train/ of train"
    )
    parser.add_argument("--loader", choices=["auto", *BACKENDS], default="auto")
    parser.add_argument("--resolution", type=int, help="side in pixels (default: the recipe's)")
    parser.add_argument("--no-mlflow", action="store_true", help="do not add the report to the MLflow run")
    parser.add_argument("--tracking-uri", help="MLflow server to add the report to (default: the run's own)")
    model_sections.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Evaluate and write the report; the exit code."""
    if options.resolution is not None and not 8 <= options.resolution <= 2048:
        raise ValueError(f"--resolution is {options.resolution}: it must be from 8 to 2048 pixels")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained, checkpoint_sha256 = load_trained_with_sha256(options.checkpoint, device)
    resolution = options.resolution or trained.recipe.validation_resolution
    model_sections.check_arguments(options, trained.model, resolution)
    is_remote = is_s3(options.data)
    options.data = (
        stage(options.data, trained.recipe.data.stage_folder).folder if is_remote else Path(options.data)
    )
    stored = StoredImages(options.data, options.split)
    raw = predict(trained, options.data, options.split, options.loader, options.resolution)
    predictions = SavedPredictions(
        raw.logits,
        raw.labels,
        raw.sample_ids,
        raw.class_names,
        data_index_sha256=stored.index_sha256,
        checkpoint_sha256=checkpoint_sha256,
        split=options.split,
        view=_view(trained, options).words,
    )
    run_folder = run_folder_of(options.checkpoint)
    out = options.out or ((run_folder or Path()) / report_folder(options.split))
    summary = _read_summary(run_folder)
    files = write_report(
        out,
        predictions,
        stored.read,
        title=f"{trained.recipe.model.name} on {options.data.name}",
        metrics_rows=_read_rows(run_folder),
        summary=summary,
        details=_details(trained, options),
        more_sections=model_sections.build_model_sections(trained, predictions, options, resolution),
        sample_key=stored.key,
        properties=measure_properties(stored, predictions.sample_ids),
    )
    print(
        f"top-1 {files.metrics['report_top1']:.2%}, top-5 {files.metrics['report_top5']:.2%} on "
        f"{predictions.num_samples:,} {options.split} images; report: {files.html}"
    )
    if not options.no_mlflow:
        _log_to_mlflow(run_folder, options.tracking_uri, summary, files, options.split)
    return 0


def _details(trained: TrainedModel, options: argparse.Namespace) -> dict[str, str]:
    view = _view(trained, options)
    price = find_price(trained.recipe.budget)
    data = trained.recipe.data
    held_out = (
        {} if data.fold is None else {HELD_OUT: f"fold {data.fold} of {data.folds} of the training images"}
    )
    return {
        "checkpoint": str(options.checkpoint),
        "epoch": str(trained.progress["epoch"]),
        "data set": f"{options.data} ({options.split})",
        "model": f"{trained.recipe.model.library} {trained.recipe.model.name}",
        "resolution": str(view.resolution),
        "crop": f"{view.crop_ratio:g} of the shorter side",
        "flip average": "yes: the mean of the logits of an image and its mirror image"
        if view.flip_average
        else "no",
        "weights": "the run's average (EMA)" if view.weights == "ema" else "of the last step",
        "weights at the start": str(
            trained.progress.get("weights_at_start") or trained.recipe.weights_at_start
        ),
        "cost is counted at": f"${price.usd_per_hour:.2f} an hour ({price.source})" if price else "no price",
        "command": f"python -m evaluation {options.checkpoint} --data {options.data}"
        + _further_words(options),
        **held_out,
    }


def _further_words(options: argparse.Namespace) -> str:
    """The options that change what the page shows, as they would be typed."""
    words = "" if options.split == "val" else f" --split {options.split}"
    words += f" --resolution {options.resolution}" if options.resolution else ""
    if options.robustness:
        words += f" --robustness {options.robustness} --robustness-images {options.robustness_images}"
        words += f" --robustness-severities {options.robustness_severities}"
    return words


def _view(trained: TrainedModel, options: argparse.Namespace) -> View:
    headline = views_of(trained.recipe)[0]
    return replace(headline, resolution=options.resolution or headline.resolution)


def _read_summary(run_folder: Path | None) -> dict[str, Any] | None:
    if run_folder is None or not (run_folder / SUMMARY_NAME).is_file():
        return None
    try:
        summary = read_json(run_folder / SUMMARY_NAME)
    except ValueError:
        return None
    return summary if isinstance(summary, dict) else None


def _read_rows(run_folder: Path | None) -> list[dict[str, Any]] | None:
    if run_folder is None or not (run_folder / METRICS_NAME).is_file():
        return None
    return read_metrics(run_folder / METRICS_NAME)


def _log_to_mlflow(
    run_folder: Path | None,
    named_uri: str | None,
    summary: dict[str, Any] | None,
    files: ReportFiles,
    split: str = "val",
) -> None:
    run_id = (summary or {}).get("mlflow_run_id")
    if run_folder is None or run_id is None:
        return
    # Never the address inside a checkpoint, which may come from anybody: the run folder's, or a named one.
    try:
        tracking = load_recipe(run_folder / RECIPE_NAME).tracking
    except RecipeError:
        return
    uri = named_uri or tracking_uri(tracking, run_folder.parent)
    metrics = dict(files.metrics)
    if split != "val":
        metrics = {f"report_{split}_{name.removeprefix('report_')}": value for name, value in metrics.items()}
    fault = add_to_run(uri, run_id, files.html.parent, report_folder(split), metrics)
    shown = without_credentials(uri)
    print(f"warning: {fault}" if fault else f"added to MLflow run {run_id} ({shown})", file=sys.stderr)
