"""The commands of the cloud where something is in the way: interrupted, locked, lost, not fetched."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.manifest import Manifest
from data_prep.storage import open_folder
from infra.deployment import StateFolder
from infra.layout import End, Job, Keys, read_record
from tests.integration.infra.local_cloud import BUCKET, UP, Instance, LocalCloud, local_cloud

NAME, GROUP = "mine", "sprint-mine-on-demand"
OPTIONS = ("--name", NAME, "--capacity", "on-demand", "--usd-per-hour", "1")


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCloud]:
    with local_cloud(tmp_path_factory.mktemp("user")) as cloud:
        yield cloud


def up(cloud: LocalCloud, data: Path, *words: str, code: int = 0) -> Any:
    return cloud.run("up", "configs/demo.yaml", "--data", str(data), *UP, *OPTIONS, *words, code=code)


# In the order of a life: the tests below build on one another.


def test_before_anything_is_made_all_faults_are_said(empty: LocalCloud, tmp_path: Path) -> None:
    said = up(empty, tmp_path / "nowhere", "--instance-type", "g6.12xlarge", code=1)
    assert "does not exist" in said.err and "--data" in said.err
    said = empty.run("up", "configs/demo.yaml", "model.nam=x", "--data", "x", *UP, code=1)
    assert "model.nam" in said.err
    said = empty.run("up", "configs/demo.yaml", "--data", "x", *UP, "--name", "Mine!", code=1)
    assert "no name of a deployment" in said.err
    assert empty.left() == [], "nothing was made"
    assert "there is no deployment" in empty.run("status").out
    assert "there is no deployment" in empty.run("pull", code=1).err


def test_without_a_yes_nothing_is_made(empty: LocalCloud, prepared_tars: tuple[Path, Manifest]) -> None:
    words = [word for word in UP if word != "--yes"]
    process = empty.start(
        "up", "configs/demo.yaml", "--data", str(prepared_tars[0]), *words, *OPTIONS, "--json"
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "WORST CASE $1.0" in err
    assert "add --yes" in json.loads(out)["error"]
    assert empty.left() == []


@pytest.mark.long
def test_ctrl_c_says_what_exists_and_the_same_command_goes_on(
    empty: LocalCloud, prepared_tars: tuple[Path, Manifest]
) -> None:
    words = ("up", "configs/demo.yaml", "--data", str(prepared_tars[0]), *UP, *OPTIONS)
    process = empty.start(*words)
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if line.startswith("  made "):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    assert "interrupted. No instance runs" in err and "The same command goes on" in err
    assert "Traceback" not in err
    assert empty.client("autoscaling").describe_auto_scaling_groups()["AutoScalingGroups"] == []

    facts = empty.run(*words, "--json").facts
    assert facts["stage"] == "up" and not facts["already"]
    assert empty.group(GROUP)["DesiredCapacity"] == 1
    keys, bucket = Keys(NAME), empty.bucket
    job = read_record(Job, bucket.get(keys.job))
    assert job.data.startswith(f"s3://{BUCKET}/data/tars-") and job.data_manifest_sha256
    assert time.time() + 3000 < job.deadline < facts["deadline"], "instances end before the guard"
    recipe = bucket.get(keys.recipe).decode()
    assert f"mirror: s3://{BUCKET}/runs" in recipe and "max_usd: 5.0" in recipe
    assert "infra/base.tfstate" in bucket.files() and f"infra/cluster-{NAME}.tfstate" in bucket.files()
    schedule = empty.client("autoscaling").describe_scheduled_actions(AutoScalingGroupName=GROUP)
    (reaper,) = schedule["ScheduledUpdateGroupActions"]
    assert reaper["MaxSize"] == 0 and abs(reaper["StartTime"].timestamp() - facts["deadline"]) < 2


@pytest.mark.long
def test_a_second_up_has_nothing_to_do_or_is_refused(
    empty: LocalCloud, prepared_tars: tuple[Path, Manifest]
) -> None:
    before = empty.group(GROUP)
    assert "is up already" in up(empty, prepared_tars[0]).out
    assert empty.group(GROUP) == before
    assert "is up with --max-usd 5, not 7" in up(empty, prepared_tars[0], "--max-usd", "7", code=1).err
    with StateFolder(empty.state).lock(NAME):
        assert "another up, down or prepare of mine is at work" in up(empty, prepared_tars[0], code=1).err
    with open_folder(f"s3://{BUCKET}/{Keys(NAME).job_folder}").lock():
        assert "another machine changes mine" in up(empty, prepared_tars[0], code=1).err


@pytest.mark.long
def test_after_an_end_up_starts_again_unless_it_is_finished(
    empty: LocalCloud, prepared_tars: tuple[Path, Manifest]
) -> None:
    scaling, keys, bucket = empty.client("autoscaling"), Keys(NAME), empty.bucket
    before = StateFolder(empty.state).load(NAME)
    assert before is not None
    bucket.put(keys.end, End(status="finished", reason="16 of 16 epochs", time=1.0).to_json())
    assert f"python -m infra pull {NAME}" in up(empty, prepared_tars[0]).out
    bucket.put(keys.end, End(status="stopped", reason="budget.max_usd=5 is spent", time=1.0).to_json())
    # As an instance leaves it, but for the suspended launches, which moto cannot resume.
    scaling.set_desired_capacity(AutoScalingGroupName=GROUP, DesiredCapacity=0)
    assert f"{NAME}: stopped (budget.max_usd=5 is spent" in empty.run("status").out
    facts = up(empty, prepared_tars[0], "--max-usd", "7", "--json").facts
    group = empty.group(GROUP)
    assert group["DesiredCapacity"] == 1 and len(group["Instances"]) == 1
    assert keys.end not in bucket.files(), "new instances would end at once"
    assert facts["max_usd"] == 7 and facts["deadline"] > before.deadline


@pytest.mark.long
def test_a_preparation_writes_its_data_set_and_ends(
    empty: LocalCloud, image_folder: Path, tmp_path: Path
) -> None:
    source = "images-of-somebody"
    empty.client("s3").create_bucket(Bucket=source)
    for path in image_folder.rglob("*.jpg"):
        empty.client("s3").upload_file(str(path), source, f"set/{path.relative_to(image_folder)}")
    words = (
        "prepare",
        f"s3://{source}/set",
        "--to",
        "small",
        *UP,
        "--usd-per-hour",
        "1",
        "--capacity",
        "spot",
    )
    assert "leave them out" in empty.run(*words, "--", "--out", "x", code=1).err
    facts = empty.run(*words, "--json", "--", "--format", "dali", "--workers", "1").facts
    assert facts["data"] == f"s3://{BUCKET}/data/small"
    group = "sprint-prepare-small-spot"
    (instance,) = empty.instances(group)
    played = Instance(empty, tmp_path / "instance", group, instance)
    assert played.run(240) == 0, played.logs()
    seen = empty.run("status", "prepare-small").out
    assert "prepare-small: finished" in seen, (seen, played.logs())
    assert empty.group(group)["DesiredCapacity"] == 0
    assert "data/small/manifest.json" in empty.bucket.files()
    assert "is finished" in empty.run(*words).out
    assert "nothing to fetch" in empty.run("down", "prepare-small", "--yes").out
    assert "data/small/manifest.json" in empty.bucket.files(), "the data set stays"


@pytest.mark.long
def test_another_machine_goes_on_with_what_is_in_s3(empty: LocalCloud, tmp_path: Path) -> None:
    """The laptop is lost: its state folder is gone."""
    for name in ("base", "deployments"):
        shutil.rmtree(empty.state / name)
    assert f"{NAME}: booting" in empty.run("status").out
    # A checkpoint that the mirror names, and that is not there.
    item = {"name": "step-00000020.pt", "key": "checkpoints/x.pt", "step": 20, "sha256": "a" * 64, "bytes": 7}
    latest = {"version": 1, "writer": "0" * 32, "sequence": 1, "run": NAME, "step": 20, "files": []}
    latest |= {"checkpoints": [item], "best": item["name"]}
    empty.bucket.put(Keys(NAME).run + "latest.json", json.dumps(latest).encode())
    said = empty.run("down", NAME, "--yes", code=1)
    assert "the checkpoint was not fetched" in said.err and "--force" in said.err
    assert empty.group(GROUP)["DesiredCapacity"] == 0, "but nothing runs any more"
    said = empty.run("down", NAME, "--yes", "--force")
    assert "it stays in the bucket" in said.err
    assert not [name for name in empty.left() if NAME in name], empty.left()
    assert f"{Keys(NAME).run}latest.json" in empty.bucket.files()


@pytest.mark.long
def test_what_was_not_fetched_keeps_the_bucket(empty: LocalCloud) -> None:
    said = empty.run("down", "--everything", "--yes", code=1)
    assert f"the best checkpoint of {NAME} is in the bucket only" in said.err
    assert BUCKET in empty.left()
    said = empty.run("down", "--everything", "--force", code=1)
    assert "nobody is there to answer" in said.err and "data/" in said.out and BUCKET in empty.left()
    said = empty.run("down", "--everything", "--force", "--yes")
    assert "everything is gone" in said.out
    assert empty.left() == ["images-of-somebody"]
    assert "there is nothing" in empty.run("down", "--everything", "--yes").out
