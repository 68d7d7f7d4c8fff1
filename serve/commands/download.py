"""`python -m serve download`: a run from elsewhere into a folder here; called again, it goes on.

python -m serve download s3://bucket/runs/mine --out runs/mine
python -m serve download mine --from mlflow --tracking-uri http://host:5000 --out runs/mine
python -m serve download /mnt/share/runs/mine --out runs/mine
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data_prep.storage import is_s3
from train.checkpoint import BEST_NAME
from train.config import TrackingSection
from train.tracking.mlflow_client import tracking_uri


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="s3://bucket/runs/NAME, a folder, or an MLflow run's id or name")
    parser.add_argument(
        "--from", dest="origin", choices=["mlflow", "s3", "folder"], help="default: what RUN looks like"
    )
    parser.add_argument("--out", type=Path, required=True, help="the run folder to write, e.g. runs/NAME")
    parser.add_argument(
        "--tracking-uri", help="the MLflow server (default: MLFLOW_TRACKING_URI, or beside --out)"
    )


def run(options: argparse.Namespace) -> int:
    """Bring the run; what arrived is checked by SHA-256."""
    origin = options.origin or _origin(options.run)
    if origin == "s3":
        from serve.download import from_s3

        if not is_s3(options.run):
            raise ValueError(f"{options.run} is no place in S3: name s3://bucket/runs/NAME")
        path = from_s3.bring(options.run, options.out)
    elif origin == "folder":
        from serve.download import from_folder

        path = from_folder.bring(Path(options.run), options.out)
    else:
        from serve.download import from_mlflow

        uri = options.tracking_uri or tracking_uri(TrackingSection(), options.out.parent)
        path = from_mlflow.bring(options.run, options.out, uri)
    if path.is_file():
        print(f"{path}: {path.stat().st_size:,} bytes; no checksum was there to compare with")
        return 0
    best = path / "checkpoints" / BEST_NAME
    print(f"{path}: {best.name}, {best.stat().st_size:,} bytes, SHA-256 as it was saved")
    print(f"next: python -m serve predict {path} PHOTO…, or python -m serve export {path} --out exported")
    return 0


def _origin(run: str) -> str:
    if is_s3(run):
        return "s3"
    # A path that leads nowhere is a mistyped one, and no name in MLflow.
    return "folder" if Path(run).is_dir() or run.startswith((".", "/", "~")) or "/" in run else "mlflow"
