"""`python -m train logs`: the table of logs.md, written from MLflow.

Only what stands between the two markers is replaced, so notes above and below stay.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.storage import write_atomically
from train.config import TrackingSection
from train.config.credentials import redact, without_credentials
from train.tracking.console import duration
from train.tracking.mlflow_client import all_runs, open_client, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import Run

BEGIN, END = "<!-- runs: begin (python -m train logs) -->", "<!-- runs: end -->"
COLUMNS = (
    "date",
    "run",
    "model",
    "data",
    "px (train → val)",
    "epochs",
    "final top-1",
    "final top-5",
    "best top-1 (epoch)",
    "img/s",
    "wall",
    "cost",
    "hardware",
    "weights",
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train logs", description="refresh the table of logs.md")
    parser.add_argument("--file", type=Path, default=Path("logs.md"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the default MLflow store")
    parser.add_argument("--uri", help="MLflow tracking URI")
    parser.add_argument("--experiment", default=TrackingSection().experiment)
    options = parser.parse_args(arguments)
    uri = options.uri or tracking_uri(TrackingSection(), options.runs)
    shown = without_credentials(uri)
    try:
        if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
            raise ValueError(
                f"there is no MLflow store at {shown}: train something first, or name it with --uri"
            )
        rows = [table_row(run) for run in finished_runs(uri, options.experiment)]
        refresh_table(options.file, rows)
    except (ValueError, OSError) as error:
        print(f"error: {redact(str(error), uri)}", file=sys.stderr)
        return 1
    except Exception as error:  # MLflow's own: one sentence, too
        print(f"error: MLflow at {shown} does not answer ({type(error).__name__})", file=sys.stderr)
        return 1
    print(f"{options.file}: {len(rows)} runs from {shown}")
    return 0


def finished_runs(uri: str, experiment: str) -> list[Run]:
    """Finished runs that were validated, newest first."""
    client = open_client(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise ValueError(
            f"{without_credentials(uri)} has no experiment {experiment!r}: name it with --experiment"
        )
    runs = all_runs(client, found.experiment_id, "attributes.status = 'FINISHED'")
    validated = [run for run in runs if "final_top1" in run.data.metrics]
    return sorted(validated, key=lambda run: run.info.start_time, reverse=True)


def table_row(run: Run) -> tuple[str, ...]:
    """The cells of one run, in the order of COLUMNS."""
    metrics, params, tags = run.data.metrics, run.data.params, run.data.tags
    sides = {name: value for name, value in params.items() if name.startswith("data.resolution")}
    resolution = " → ".join(sides[name] for name in sorted(sides, key=_epoch_of)) or "?"
    started = datetime.datetime.fromtimestamp(run.info.start_time / 1000, datetime.UTC)
    cost = metrics.get("cost_usd")
    return (
        f"{started:%Y-%m-%d}",
        run.info.run_name,
        params.get("model.name", ""),
        tags.get("dataset", ""),
        f"{resolution} → {metrics.get('validation_resolution', float('nan')):.0f}",
        f"{metrics.get('epochs', float('nan')):.0f}",
        _percent(metrics.get("final_top1")),
        _percent(metrics.get("final_top5")),
        f"{_percent(metrics.get('best_top1'))} ({metrics.get('best_epoch', float('nan')):.0f})",
        f"{metrics.get('images_per_second', float('nan')):,.0f}",
        duration(metrics.get("wall_seconds", 0)),
        "" if cost is None else f"${cost:.2f} ({tags.get('price', '').split(',')[0]})",
        tags.get("hardware", ""),
        tags.get("weights_at_start", ""),
    )


def _epoch_of(name: str) -> int:
    """`data.resolution.10` → 10: the epoch from which that resolution is trained at."""
    return int(name.rpartition(".")[2]) if name[-1].isdigit() else 0


def refresh_table(path: Path, rows: Sequence[tuple[str, ...]]) -> None:
    """Replace the table between the markers of `path`; they are added to a file without them."""
    text = path.read_text(encoding="utf-8") if path.is_file() else "# Training log\n"
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS)), *(_line(row) for row in rows)]
    table = "\n".join([BEGIN, *lines, END])
    if BEGIN in text and END in text:
        before, _, rest = text.partition(BEGIN)
        text = before + table + rest.partition(END)[2]
    else:
        text = f"{text.rstrip()}\n\n{table}\n"
    write_atomically(path, text.encode())


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
