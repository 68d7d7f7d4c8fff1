"""A web page to try models on: upload, paste or photograph, and see classes, confidences and Grad-CAM.

python -m serve demo runs/mine
python -m serve demo runs/mine exported/other --port 7861
python -m serve demo --mlflow mlflow:imagenet-sprint --tracking-uri http://mlflow:5000
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", type=Path, metavar="RUN|CHECKPOINT|FOLDER")
    parser.add_argument("--mlflow", metavar="mlflow:EXPERIMENT", help="offer the runs of an experiment, too")
    parser.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="of MLflow (MLFLOW_TRACKING_URI, or else runs/mlflow.db)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: everybody in this network")
    parser.add_argument("--port", type=int, default=7860, help="0: any free one")
    parser.add_argument(
        "--share",
        choices=["yes", "no"],
        default="no",
        help="yes: Gradio's public tunnel, for anybody with the link",
    )
    parser.add_argument("--keep", type=int, default=2, metavar="N", help="models in memory at once")
    parser.add_argument(
        "--examples", type=Path, metavar="FOLDER", help="images to try; else some of the data set"
    )
    parser.add_argument("--title", default="Image classifier")


def run(options: argparse.Namespace) -> int:
    from serve.demo.command import serve_demo

    return serve_demo(options)
