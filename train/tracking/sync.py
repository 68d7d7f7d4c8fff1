"""`python -m train sync runs/demo`: send to MLflow what it missed of a run that has ended.

Finds out what the server has, and sends the rest of the folder's metrics.jsonl and of what `mlflow.json` asks
for; nothing arrives twice. A folder that was trained without MLflow gets a run from its recipe and summary.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.storage import exclusive_lock, write_atomically
from train.config import RecipeError, TrackingSection, flatten, load_recipe
from train.config.credentials import redact, without_credentials
from train.run_folder import METRICS_NAME, RECIPE_NAME, SUMMARY_NAME, read_status
from train.tracking.mlflow_client import (
    DIED_TAG,
    MlflowMissing,
    first_line,
    prepare_environment,
    tracking_uri,
    utc,
)
from train.tracking.mlflow_replay import Replay, RunDeleted
from train.tracking.mlflow_state import MlflowState, load_wanted, open_state

STATUSES = {"finished": "FINISHED", "restart": "KILLED", "failed": "FAILED"}
WAITS_SECONDS = (1.0, 3.0)  # between attempts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train sync", description="send to MLflow what it missed of runs that have ended"
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN_FOLDER")
    parser.add_argument("--uri", help="MLflow tracking URI (default: the run's own)")
    options = parser.parse_args(arguments)
    prepare_environment(num_retries=0)
    code = 0
    for folder in options.folders:
        try:
            print(sync(folder, options.uri))
        except (ValueError, RuntimeError, OSError) as error:
            print(f"error: {folder}: {redact(str(error), options.uri)}", file=sys.stderr)
            code = 1
    return code


def sync(folder: Path, uri: str | None = None) -> str:
    """Send what is missing; what was sent, in a sentence.

    Raises:
        ValueError: it is no run folder. RuntimeError: a training is at work there, or MLflow does not answer.
    """
    if not (folder / RECIPE_NAME).is_file() and load_wanted(folder) is None:
        raise ValueError("this is no run folder: it has neither recipe.yaml nor mlflow.json")
    with exclusive_lock(folder):
        tracking = _tracking(folder)
        uri = uri or _uri(folder, tracking)
        shown = without_credentials(uri)
        state = open_state(folder, uri, tracking.experiment, _summary(folder).get("mlflow_run_id"))
        _complete(state)
        replay = Replay(state, uri, folder.absolute().parent, is_live=False, say=_warn)
        _run(replay, uri, shown)
        if _note_run_id(folder, state.wanted.run_id):
            _run(replay, uri, shown)  # the summary has changed
        if state.fault is not None:
            _warn(f"warning: {state.fault}")
    sent = ", ".join(f"{number} {name}" for name, number in asdict(replay.sent).items())
    missing = "" if state.wanted.is_complete else "; some files were not taken"
    return f"{folder}: sent {sent} to {shown}; run {state.wanted.run_id} is {state.wanted.status}{missing}"


def _run(replay: Replay, uri: str, shown: str) -> None:
    for wait in (*WAITS_SECONDS, None):
        try:
            return replay.run_once()
        except (MlflowMissing, RunDeleted) as error:  # waiting does not help
            raise RuntimeError(str(error)) from None
        except Exception as error:  # MLflow raises all kinds
            if wait is None:
                raise RuntimeError(f"MLflow at {shown} failed ({first_line(error, uri)})") from None
        time.sleep(wait)


def _tracking(folder: Path) -> TrackingSection:
    try:
        tracking = load_recipe(folder / RECIPE_NAME).tracking
    except RecipeError:  # a sweep's, or one of another version
        tracking = TrackingSection()
    wanted = load_wanted(folder)
    return tracking if wanted is None else tracking.model_copy(update={"experiment": wanted.experiment})


def _uri(folder: Path, tracking: TrackingSection) -> str:
    """The server of the run; with the credentials of the environment where that names the same one."""
    wanted = load_wanted(folder)
    uri = tracking_uri(tracking, folder.absolute().parent)
    return uri if wanted is None or without_credentials(uri) == wanted.uri else wanted.uri


def _complete(state: MlflowState) -> None:
    """What the training itself would have wanted, had it come to its end or known of MLflow."""
    folder, wanted = state.folder, state.wanted
    summary, status = _summary(folder), read_status(folder).get("status")
    if not wanted.parameters and (folder / RECIPE_NAME).is_file():
        try:
            recipe = load_recipe(folder / RECIPE_NAME)
        except RecipeError:
            recipe = None
        if recipe is not None:
            state.add_parameters(flatten(recipe.model_dump(mode="json")))
            state.add_tags(
                {
                    "dataset": recipe.data.name,
                    "run_folder": str(folder.resolve()),
                    "weights_at_start": str(summary.get("weights_at_start") or recipe.weights_at_start),
                }
            )
    if wanted.status == "RUNNING":  # killed, for we hold its lock
        state.end(STATUSES.get(str(status), "FAILED"), _last_sign(folder))
        if status is None:
            state.add_tags({DIED_TAG: utc(wanted.ended or time.time())})
    else:
        state.end(wanted.status, wanted.ended)
    if wanted.status == "FINISHED" and not wanted.files:
        figures = {k: v for k, v in summary.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        state.add_figures(figures, _last_step(folder))
        for name in (RECIPE_NAME, METRICS_NAME, SUMMARY_NAME):
            if (folder / name).is_file():
                state.add_file(folder / name, None)
    state.save()


def _last_sign(folder: Path) -> float:
    """When a training that was killed wrote for the last time, in unix seconds."""
    times = [path.stat().st_mtime for path in folder.glob("*") if path.name != ".lock" and path.is_file()]
    return max(times, default=time.time())


def _last_step(folder: Path) -> int:
    from train.tracking.metrics_file import read_metrics

    path = folder / METRICS_NAME
    rows = read_metrics(path) if path.is_file() else []
    return int(rows[-1].get("step", 0)) if rows else 0


def _summary(folder: Path) -> dict[str, Any]:
    try:
        summary = json.loads((folder / SUMMARY_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def _note_run_id(folder: Path, run_id: str | None) -> bool:
    """Into summary.json, where the evaluation looks for it; whether that changed it."""
    summary = _summary(folder)
    if not summary or summary.get("mlflow_run_id") == run_id:
        return False
    summary["mlflow_run_id"] = run_id
    write_atomically(folder / SUMMARY_NAME, (json.dumps(summary, indent=1) + "\n").encode())
    return True


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
