"""A comparison as a run of MLflow: the page and its files as artifacts, each run's figures as metrics."""

from __future__ import annotations

import re
import time
from pathlib import Path

from evaluation.compare.comparison import Comparison
from evaluation.compare.write import ComparisonFiles
from evaluation.metrics import finite_number
from train.config.credentials import redact, without_credentials
from train.tracking.mlflow_client import first_line, open_client, open_experiment

MAX_METRICS = 900  # of a request; MLflow takes 1000


def log_comparison(comparison: Comparison, files: ComparisonFiles, uri: str, experiment: str) -> str:
    """Log it; a sentence on where it is, or why not: the files are there in any case."""
    shown = without_credentials(uri)
    try:
        from mlflow.entities import Metric, Param

        client = open_client(uri)
        folder = Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:///") else Path("runs")
        experiment_id = open_experiment(client, experiment, uri, folder)
        names = "-".join(run.letter.lower() + "-" + _plain(run.name) for run in comparison.runs)
        logged = client.create_run(
            experiment_id, run_name=f"compare-{names}"[:200], tags={"kind": "comparison"}
        )
        run_id, now = logged.info.run_id, int(time.time() * 1000)
        metrics = [Metric(name, value, now, 0) for name, value in comparison_metrics(comparison).items()]
        params = [Param(f"run_{run.letter}", redact(run.name)[:200]) for run in comparison.runs]
        for begin in range(0, max(len(metrics), 1), MAX_METRICS):
            client.log_batch(run_id, metrics[begin : begin + MAX_METRICS], params if begin == 0 else [])
        for path in files.paths:  # and nothing else that may lie in that folder
            client.log_artifact(run_id, str(path), "comparison")
        client.set_terminated(run_id, "FINISHED")
    except Exception as error:  # whatever MLflow raises, the files are there
        return f"warning: MLflow at {shown} did not take the comparison ({first_line(error, uri)})"
    return f"logged to MLflow at {shown} as run {run_id}"


def comparison_metrics(comparison: Comparison) -> dict[str, float]:
    """`A_resnet18/top1` and so on: all numbers of every run, and of its paired test."""
    metrics: dict[str, float] = {}
    for run in comparison.runs:
        for key, value in run.figures.items():
            if (number := finite_number(value)) is not None:
                metrics[f"{run.letter}_{_plain(run.name)}/{key}"] = number
    for pair in comparison.pairs:
        prefix = f"{pair.run.letter}_{_plain(pair.run.name)}"
        metrics[f"{prefix}/difference"] = pair.result.difference
        metrics[f"{prefix}/mcnemar_p"] = pair.result.p_value
        metrics[f"{prefix}/holm_p"] = pair.result.adjusted_p
    return metrics


def _plain(name: str) -> str:
    """What MLflow takes in the name of a metric."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:60] or "run"
