"""`python -m serve register`: a run's best checkpoint as a version in MLflow's model registry.

python -m serve register runs/mine --name scenes --alias best
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from data_prep.plain_json import read_json
from evaluation.predict import run_folder_of
from serve.commands import export
from serve.download.registry import register
from serve.model_folder import CARD_NAME, EXPORT_NAME, is_exported
from serve.portable.model_info import INFO_NAME, load_info
from train.config import RecipeError, TrackingSection, load_recipe
from train.run_folder import RECIPE_NAME, SUMMARY_NAME
from train.tracking.mlflow_client import tracking_uri

CHECK_IMAGES = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="a run folder, a checkpoint, or an exported folder with ONNX")
    parser.add_argument("--name", required=True, help="of the registered model")
    parser.add_argument("--alias", help="point this alias (e.g. best) at the version; without it, none moves")
    parser.add_argument("--data", help="the prepared data set, to compare the model with its checkpoint")
    parser.add_argument("--tracking-uri", help="MLflow server (default: the run's own)")


def run(options: argparse.Namespace) -> int:
    """Export to ONNX, where that is not done, and register."""
    run_folder = None if is_exported(options.run) else run_folder_of(options.run)
    tracking, run_id = _of_run(run_folder)
    runs_folder = run_folder.parent if run_folder else Path("runs")
    uri = options.tracking_uri or tracking_uri(tracking, runs_folder)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        if is_exported(options.run):
            _copy_onnx(options.run, folder)
        else:
            export.run(
                argparse.Namespace(
                    source=str(options.run),
                    format=["onnx"],
                    int8=False,
                    out=folder,
                    data=options.data,
                    check_images=CHECK_IMAGES,
                )
            )
        version = register(folder, options.name, options.alias, uri, tracking.experiment, runs_folder, run_id)
    at = f"@{options.alias}" if options.alias else f"/{version}"
    moved = f", alias {options.alias} points to it" if options.alias else ", no alias was moved"
    print(f"{options.name} version {version}{moved}: mlflow.pyfunc.load_model('models:/{options.name}{at}')")
    return 0


def _copy_onnx(source: Path, folder: Path) -> None:
    """What the registry needs of an exported folder: ONNX alone, and what describes it."""
    path = load_info(source).file(source, "onnx")
    folder.mkdir()
    for name in (path.name, INFO_NAME, CARD_NAME, EXPORT_NAME):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _of_run(folder: Path | None) -> tuple[TrackingSection, str | None]:
    """Where the run was tracked, and its id there."""
    if folder is None:
        return TrackingSection(), None
    try:
        summary = read_json(folder / SUMMARY_NAME)
        run_id = summary.get("mlflow_run_id") if isinstance(summary, dict) else None
    except (OSError, ValueError):
        run_id = None
    try:
        return load_recipe(folder / RECIPE_NAME).tracking, run_id
    except (RecipeError, OSError):
        return TrackingSection(), run_id
