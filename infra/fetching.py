"""Bringing a deployment's results here: the best checkpoint, its SHA-256 that of the mirror, and the report.

The checkpoint is fetched by `python -m train fetch`; whole files stay, so it goes on after an interruption.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from data_prep.storage import sha256_file, write_atomically
from infra.cloud import Cloud
from infra.deployment import Deployment, Fetched
from infra.errors import UserError
from infra.layout import Keys
from infra.records import Checkpoint

MAX_REPORT_FILES = 10_000
MAX_REPORT_BYTES = 1 << 30
# Of the run's folder itself; the rest is its report.
OF_THE_RUN = ("summary.json", "status.json", "metrics.jsonl", "lr_finder.png", "lr_finder.json")
NOT_BROUGHT = ("recipe.yaml", "mlflow.json")  # come with the checkpoint


def is_here(deployment: Deployment, best: Checkpoint) -> bool:
    """Whether this very checkpoint was fetched, and its file still has that SHA-256."""
    fetched = deployment.fetched
    if fetched is None or fetched.sha256 != best.sha256:
        return False
    path = Path(fetched.path)
    return path.is_file() and path.stat().st_size == best.num_bytes and sha256_file(path) == best.sha256


def fetch_best(cloud: Cloud, deployment: Deployment, folder: Path) -> Deployment:
    """Bring the newest and the best checkpoint to `folder`; the deployment, with what was fetched on record.

    Raises:
        UserError: there is none, it is damaged, or the folder is another run's.
    """
    mirror = cloud.location(Keys(deployment.name).run)
    words = [sys.executable, "-m", "train", "fetch", mirror, str(folder), "--json"]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1].removeprefix("error: ")
        raise UserError(f"the checkpoint was not fetched: {reason}")
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    best, path = facts["best"], Path(facts["path"])
    if sha256_file(path) != best["sha256"]:
        raise UserError(
            f"{path} has not the mirror's SHA-256: run python -m infra pull {deployment.name} again"
        )
    fetched = Fetched(
        step=int(best["step"]), sha256=best["sha256"], path=str(path.absolute()), time=cloud.now()
    )
    deployment = deployment.model_copy(update={"fetched": fetched})
    cloud.save(deployment)
    return deployment


def fetch_report(cloud: Cloud, name: str, folder: Path) -> list[Path]:
    """Bring the report, and the run's figures as they were uploaded last; the files that there are now.

    Raises:
        UserError: there is far too much of it. RuntimeError: S3 cannot be read.
    """
    prefix = Keys(name).report
    files = cloud.folder.files(prefix)
    if len(files) > MAX_REPORT_FILES or sum(file.num_bytes for file in files) > MAX_REPORT_BYTES:
        raise UserError(f"{cloud.location(prefix)} is larger than a report: look at it, and fetch it by hand")
    brought = []
    for file in files:
        inside = file.name.removeprefix(prefix)
        if inside in NOT_BROUGHT:
            continue
        path = folder / inside if inside in OF_THE_RUN else folder / "report" / inside.removeprefix("report/")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{file.name} leads out of {folder}: somebody else wrote into the bucket")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = cloud.folder.read(file.name)
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, content)
        brought.append(path)
    return brought
