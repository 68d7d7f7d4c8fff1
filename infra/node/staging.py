"""The data set from S3 to this machine's disk, whole and with its checksums; and the recipe."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path

from data_prep.manifest import MANIFEST_NAME, load_manifest
from data_prep.storage import is_s3, open_folder
from infra.layout import Job
from infra.node import commands
from infra.node.process import Ended
from infra.node.settings import Settings
from infra.node.store import Store

ATTEMPTS = 3

say = logging.getLogger(__name__)


def write_recipe(store: Store, job: Job, settings: Settings) -> Path:
    """The job's recipe as a file.

    Raises:
        ValueError: there is none.
    """
    content = store.get(job.recipe) if job.recipe else None
    if content is None:
        raise ValueError(f"there is no recipe at s3://{job.bucket}/{job.recipe}: run `up` again")
    path = settings.cache / "recipe" / "recipe.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def stage_data(
    job: Job, settings: Settings, run: Callable[[list[str]], Ended], pause: Callable[[float], None]
) -> Path:
    """The folder of the job's data set on this machine, a whole copy of the version that the job names.

    Raises:
        ValueError: it cannot be had.
    """
    if not is_s3(job.data):
        return Path(job.data)
    try:
        version = hashlib.sha256(open_folder(job.data).read(MANIFEST_NAME)).hexdigest()
    except FileNotFoundError:
        raise ValueError(f"there is no data set at {job.data}: {MANIFEST_NAME} is missing") from None
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{job.data} cannot be read: {error}") from None
    if job.data_manifest_sha256 not in ("", version):
        raise ValueError(
            f"{job.data} is not the version that was planned with (its {MANIFEST_NAME} has another SHA-256): "
            "run `up` again"
        )
    target = commands.data_folder(job, settings, version)
    on_volume = find_on_volume(settings.data_volume, version)
    if on_volume is not None:
        say.info("data come from the data volume: %s", on_volume)
        if run(commands.copy_command(str(on_volume), target)).code == 0:
            return target
        say.warning("%s could not be copied: data come from %s", on_volume, job.data)
    for attempt in range(1, ATTEMPTS + 1):
        ended = run(commands.copy_command(job.data, target))
        if ended.code == 0:
            return target
        pause(settings.waits.retry * attempt)  # ends here where the agent was told to stop
    raise ValueError(f"{job.data} could not be copied: {ended.last_words.removeprefix('error: ')}")


def find_on_volume(volume: Path, version: str) -> Path | None:
    """The folder just below `volume` with this very version of a data set, by its manifest's SHA-256."""
    for manifest in sorted(volume.glob(f"*/{MANIFEST_NAME}")):
        try:
            if hashlib.sha256(manifest.read_bytes()).hexdigest() == version:
                return manifest.parent
        except OSError as error:
            say.warning("%s cannot be read: %s", manifest, error)
    return None


def slow_loader(data: Path) -> str:
    """A warning where shards for FFCV are to be read without it, which costs most of the speed; or ""."""
    if load_manifest(open_folder(str(data))).format != "ffcv":
        return ""
    package = importlib.util.find_spec("ffcv")
    if package is not None and any(Path(str(package.origin)).parent.glob("_libffcv*")):
        return ""
    return "warning: FFCV could not be installed, and the slower reference loader reads the images"


def read_status(path: Path) -> tuple[str | None, str]:
    """Status and reason of status.json; (None, "") where there is none that can be used."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return str(content["status"]), str(content.get("reason", ""))[:500]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, ""
