"""What MLflow has of a stormy training against its metrics.jsonl: one run, every row once, in order."""

from __future__ import annotations

from pathlib import Path

from train.tracking.metrics_file import read_metrics
from train.tracking.mlflow_rows import as_row

# What a row that is written again has anew; the server keeps that of the first time.
TIMED = ("images_per_second", "data_wait_fraction", "mfu", "cost_usd", "epoch_cost_usd", "estimated_cost_usd")


def mlflow_differences(uri: str, experiment: str, folder: Path) -> list[str]:
    """In sentences; empty where the server has what the file has."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    known = client.get_experiment_by_name(experiment)
    runs = [] if known is None else client.search_runs([known.experiment_id])
    if len(runs) != 1:
        return [f"MLflow has {len(runs)} runs of one training"]
    info = runs[0].info
    found = [] if info.status == "FINISHED" else [f"MLflow takes the run for {info.status}"]
    wanted: dict[str, list[tuple[int, float]]] = {}
    for row in map(as_row, read_metrics(folder / "metrics.jsonl")):
        if row is not None:
            for name, value in row.metrics.items():
                if name not in TIMED:
                    wanted.setdefault(name, []).append((row.step, value))
    for name, values in wanted.items():
        history = sorted(client.get_metric_history(info.run_id, name), key=lambda metric: metric.timestamp)
        there = [(metric.step, metric.value) for metric in history]
        if there == values:
            continue
        steps, expected = [step for step, _ in there], [step for step, _ in values]
        if missing := sorted(set(expected) - set(steps)):
            found.append(f"MLflow lacks {name} of steps {missing[:5]}")
        elif len(steps) > len(expected):
            twice = sorted({step for step in steps if steps.count(step) > expected.count(step)})
            found.append(f"MLflow has {name} more than once of steps {twice[:5]}")
        elif steps != expected and name in ("epoch", "learning_rate") and sorted(steps) == sorted(expected):
            pass  # a train row and a validation's of the same step, written in the same millisecond
        else:
            found.append(f"MLflow has {name} in another order, or other values")
    return found
