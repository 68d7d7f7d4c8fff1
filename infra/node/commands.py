"""The commands that the agent starts: data, check, training, evaluation. Nothing of them is run here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from infra.layout import Job, mirror
from infra.node.group import PORT, Group
from infra.node.settings import Settings

VERSION_DIGITS = 12


def data_folder(job: Job, settings: Settings, version: str) -> Path:
    """Where the data set is copied to: a folder of its own for each version (the manifest's SHA-256)."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", job.data.rstrip("/").rpartition("/")[2]).strip(".-")[:40]
    return settings.cache / "data" / f"{name or 'data'}-{version[:VERSION_DIGITS]}"


def copy_command(source: str, target: Path) -> list[str]:
    return [_python(), "-m", "data_prep", "copy", source, str(target)]


def overrides(job: Job, settings: Settings, data: Path) -> list[str]:
    """The job's own, then what follows from this machine, which has the last word."""
    own = [
        f"run.name={job.deployment}",
        f"run.folder={settings.runs}",
        f"data.path={data}",
        f"checkpoint.mirror={mirror(job.bucket)}",
    ]
    if (usd_per_hour := job.usd_per_hour_of(settings.market)) is not None:
        own.append(f"budget.usd_per_hour={usd_per_hour}")
        if job.max_usd is not None:
            own.append(f"budget.max_usd={job.max_usd}")
    return [*job.overrides, *own]


def check_command(job: Job, recipe: Path, words: list[str], ranks: int) -> list[str]:
    world_size = ranks * job.num_nodes
    return [_python(), "-m", "train", "check", str(recipe), *words, f"--nproc-per-node={world_size}"]


def train_command(
    job: Job, settings: Settings, recipe: Path, words: list[str], group: Group | None
) -> list[str]:
    return [*_torchrun(job, settings, str(job.ranks_per_node), group), "-m", "train", str(recipe), *words]


def prepare_command(job: Job, settings: Settings, group: Group | None) -> list[str]:
    """One process a machine; each has workers of its own."""
    arguments = ["data_prep", "prepare", *(job.prepare.arguments if job.prepare else ())]
    if group is None:
        return [_python(), "-m", *arguments]
    return [*_torchrun(job, settings, "1", group), "-m", *arguments]


def report_command(settings: Settings, data: Path) -> list[str]:
    return [_python(), "-m", "evaluation", "report", str(settings.run), "--data", str(data)]


def environment(job: Job, settings: Settings) -> dict[str, str]:
    """For training. An address with a password goes this way, since command lines are seen and logged."""
    found = dict(os.environ)
    if job.mlflow_uri:
        found["MLFLOW_TRACKING_URI"] = job.mlflow_uri
    if settings.instance_type.startswith(("g5", "g6")):
        # No NVLink and no peer-to-peer there: twice the speed of collectives, as AWS's samples say.
        found.setdefault("NCCL_SHM_USE_CUDA_MEMCPY", "1")
    return found


def _torchrun(job: Job, settings: Settings, ranks: str, group: Group | None) -> list[str]:
    """The agent counts restarts, over all that can happen; so torchrun makes none of its own."""
    launcher = [shutil.which("torchrun") or "torchrun", f"--nproc-per-node={ranks}", "--max-restarts=0"]
    if group is None:
        return [*launcher, "--standalone"]
    is_leader = group.participants[0].instance == settings.instance
    return [
        *launcher,
        f"--nnodes={job.num_nodes}",
        f"--rdzv-id={job.deployment}-{group.generation}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={group.leader}:{rendezvous_port()}",
        # Who is the host is known, and need not be guessed from names and addresses.
        f"--rdzv-conf=is_host={int(is_leader)},join_timeout={max(5, round(settings.waits.join))}",
        f"--local-addr={settings.address}",
    ]


def _python() -> str:
    """The environment's, as torchrun is: sprint-bootstrap has put it first into PATH."""
    return shutil.which("python") or sys.executable


def ranks_of(job: Job) -> int:
    """Ranks that torchrun will start on this machine; 0 where GPUs are wanted and there are none."""
    if job.ranks_per_node != "gpu":
        return job.ranks_per_node
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def rendezvous_port() -> int:
    return int(os.environ.get("SPRINT_RENDEZVOUS_PORT", PORT))
