"""What instances need, put into the bucket: code, recipe, job, and where it is not there yet the data set."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from data_prep.manifest import MANIFEST_NAME
from data_prep.storage import is_s3
from infra.cloud import Cloud
from infra.code import pack_code
from infra.errors import UserError
from infra.layout import Job, Keys, at, code_key, data_prefix
from infra.preflight import Data
from train.config import Recipe, RecipeError, dump_recipe, load_recipe

MARGIN_HOURS = 0.5  # before the deadline, for setting up and for the report
ROOT = Path(__file__).parent.parent


def upload_code(cloud: Cloud) -> str:
    """The SHA-256 of the tar, which is in the bucket on return; sent only where it is not there yet."""
    packed, sha256 = pack_code()
    key = code_key(sha256)
    info = cloud.folder.info(key)
    if info is None or info.num_bytes != len(packed):
        cloud.console.say(f"uploading the code ({len(packed) / 1e6:.1f} MB): {key}")
        cloud.folder.write(key, packed)
    return sha256


def upload_data(cloud: Cloud, data: Data) -> str:
    """Where the instances read the data set: in our bucket, copied there if it is elsewhere.

    Raises:
        UserError: the copy failed; it goes on with the same command.
    """
    if data.location.startswith(f"s3://{cloud.bucket}/"):
        return data.location.rstrip("/")
    target = at(cloud.bucket, data_prefix(data.name)).rstrip("/")
    if cloud.folder.info(f"{data_prefix(data.name)}{MANIFEST_NAME}") is not None:
        cloud.console.say(f"the data set is in the bucket already: {target}")
        return target
    where = "S3" if is_s3(data.location) else "this machine"
    cloud.console.say(
        f"copying {data.num_bytes / 1e9:.2f} GB from {where} to {target} (it can be interrupted)"
    )
    words = [sys.executable, "-m", "data_prep", "copy", data.location, target]
    done = subprocess.run(words, check=False, stdout=2)  # stdout is for --json
    if done.returncode:
        raise UserError(f"the data set was not copied to {target}: see above, and run the same command again")
    return target


def resolve_recipe(
    path: Path,
    overrides: list[str],
    name: str,
    bucket: str,
    data: str,
    usd_per_hour: float,
    max_usd: float,
    hours: float,
) -> Recipe:
    """The recipe as it runs there: its name, data, mirror and budget set.

    Raises:
        UserError: it has faults, or names a file that is only here.
    """
    own = load_user_recipe(path, overrides, data)
    hours_left = max(hours - MARGIN_HOURS, 0.9 * hours)
    limits = {
        "budget.max_usd": min(max_usd, own.budget.max_usd or max_usd),
        "budget.max_hours": round(min(hours_left, own.budget.max_hours or hours_left), 4),
        "budget.usd_per_hour": round(usd_per_hour, 4),
    }
    words = [
        *overrides,
        f"data.path={data}",
        f"run.name={name}",
        f"checkpoint.mirror={at(bucket, 'runs')}",
        *(f"{key}={value}" for key, value in limits.items()),
    ]
    return load_recipe(path, words)


def load_user_recipe(path: Path, overrides: list[str], data: str = "") -> Recipe:
    """Raises UserError: as `resolve_recipe`."""
    try:
        recipe = load_recipe(path, [*overrides, *([f"data.path={data}"] if data else [])])
    except RecipeError as error:
        raise UserError(str(error)) from None
    start = recipe.model.checkpoint
    if start is not None and not is_s3(str(start)):
        raise UserError(
            f"model.checkpoint={start} is a file of this machine, and instances do not have it: train from "
            "random weights, or from model.pretrained=true"
        )
    return recipe


def upload_job(cloud: Cloud, job: Job, recipe: Recipe | None) -> None:
    """Recipe first, then the job that names it; the end of a former start is forgotten before."""
    keys = Keys(job.deployment)
    cloud.folder.delete(keys.end)
    if recipe is not None:
        cloud.folder.write(keys.recipe, dump_recipe(recipe).encode())
    cloud.folder.write(keys.job, job.to_json())
