"""A run from an MLflow server: its figures, report and best checkpoint, as its training sent them."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.plain_json import read_json
from data_prep.progress import progress_bar
from data_prep.storage import sha256_file
from serve.download.marker import is_of, mark
from train.checkpoint import BEST_NAME, BEST_WEIGHTS_NAME
from train.config.credentials import without_credentials
from train.run_folder import SUMMARY_NAME
from train.tracking.mlflow_client import first_line, open_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

FOLDERS = ("checkpoints", "report", "profile")  # that trainings and reports send; others stay there
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,200}")


def bring(run: str, folder: Path, uri: str) -> Path:
    """Download an MLflow run (its id, or its name) to `folder`; files that are there whole stay.

    Raises:
        ValueError: no such run, none with a checkpoint, or `folder` holds another one.
        RuntimeError: the server cannot be reached, or what came is damaged.
    """
    shown = without_credentials(uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        # MLflow would make one.
        raise ValueError(
            f"there is no MLflow store at {shown}: name it with --tracking-uri, or a folder or s3://… in "
            f"place of {run!r}"
        )
    client = open_client(uri)
    try:
        found = find_run(client, run)
        files = None if found is None else _list(client, found.info.run_id)
    except Exception as error:  # MLflow raises all kinds
        raise RuntimeError(f"MLflow at {shown} cannot be read ({first_line(error, uri)})") from None
    if found is None or files is None:
        raise ValueError(f"MLflow at {shown} has no run {run!r}: name its id, or its name")
    if f"checkpoints/{BEST_NAME}" not in files:
        raise ValueError(
            f"run {run!r} at {shown} holds no checkpoint: it has not finished, or was not sent whole"
        )
    run_id = found.info.run_id
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _fetch(client, run_id, SUMMARY_NAME, folder)
        digest = str(read_json(folder / SUMMARY_NAME)["checkpoint_sha256"])
        origin = f"{shown} {run_id}"
        _refuse_another(folder, None if is_of(folder, "mlflow", origin) else digest)
        mark(folder, "mlflow", origin)
        with progress_bar(sum(files.values()), "download", unit="B") as bar:
            for name, num_bytes in files.items():
                if not _is_there(folder / name, num_bytes, digest):
                    _fetch(client, run_id, name, folder)
                bar.update(num_bytes)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"run {run!r} at {shown} cannot be brought ({error})") from None
    except Exception as error:
        raise RuntimeError(
            f"MLflow at {shown} failed in the middle ({first_line(error, uri)}): the same command goes on"
        ) from None
    best = folder / "checkpoints" / BEST_NAME
    if sha256_file(best) != digest:
        best.unlink()
        raise RuntimeError(
            f"{best} arrived damaged (its SHA-256 is not the run's): the same command tries again"
        )
    return folder


def find_run(client: MlflowClient, run: str) -> Run | None:
    """A run by its id, or the newest one of that name."""
    if re.fullmatch(r"[0-9a-f]{32}", run):
        return client.get_run(run)
    quoted = run.replace("'", "")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(
        experiments, f"attributes.run_name = '{quoted}'", order_by=["attributes.start_time DESC"]
    )
    if len(runs) > 1:
        print(
            f"note: {len(runs)} runs are called {run}: taking the newest, {runs[0].info.run_id}",
            file=sys.stderr,
        )
    return runs[0] if runs else None


def _list(client: MlflowClient, run_id: str) -> dict[str, int]:
    """Artifact → bytes; of names that are plain ones, since a server may be anybody's."""
    files: dict[str, int] = {}
    waiting: list[Any] = list(client.list_artifacts(run_id))
    while waiting:
        item = waiting.pop()
        parts = item.path.split("/")
        if not all(PLAIN_NAME.fullmatch(part) for part in parts):
            continue
        if item.is_dir:
            waiting += client.list_artifacts(run_id, item.path) if parts[0] in FOLDERS else []
        else:
            files[item.path] = int(item.file_size or 0)
    return dict(sorted(files.items()))


def _fetch(client: MlflowClient, run_id: str, name: str, folder: Path) -> None:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as temporary:
        path = Path(client.download_artifacts(run_id, name, temporary))
        # Of a server's folder on this machine MLflow gives the file itself, which is not ours to move.
        if path.is_relative_to(temporary):
            path.replace(target)
        else:
            shutil.copyfile(path, Path(temporary) / "copy")
            (Path(temporary) / "copy").replace(target)


def _is_there(path: Path, num_bytes: int, digest: str) -> bool:
    """Whether a large file was brought before; small ones are brought again."""
    if not path.is_file() or path.stat().st_size != num_bytes:
        return False
    if path.name == BEST_NAME:
        return sha256_file(path) == digest
    return path.name == BEST_WEIGHTS_NAME and _weights_digest(path) == digest


def _weights_digest(path: Path) -> str | None:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("checkpoint_sha256")
    except Exception:  # damaged, in whatever way
        return None


def _refuse_another(folder: Path, digest: str | None) -> None:
    """ValueError: something was trained there, or (`digest`) its best checkpoint is another run's."""
    best = folder / "checkpoints" / BEST_NAME
    is_another = digest is not None and best.is_file() and sha256_file(best) != digest
    if is_another or any((folder / "checkpoints").glob("step-*.pt")):
        raise ValueError(f"{folder} holds checkpoints of another run: choose another folder with --out")
