"""The whole story: up, an instance is taken away in the middle, another goes on, pull, down, nothing is left.

AWS is moto, Terraform and its provider are real, and the instances are played on this machine by what would
run on them, training the demo's recipe. CLOUD_TRANSCRIPT=1 writes what was said into docs/cloud.md.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.manifest import Manifest
from data_prep.storage import open_folder
from infra.layout import Keys, Node, read_record
from infra.records import parse_rows, read_records
from tests.integration.fake_imds import FakeMetadata
from tests.integration.infra.local_cloud import BUCKET, UP, Instance, LocalCloud, local_cloud, until
from tests.integration.infra.transcript import FAMILIAR, write_transcript

NAME, GROUP = "mine", "sprint-mine-spot"
RECIPE = (
    "configs/demo.yaml",
    "schedule.phases.0.epochs=3",
    "schedule.phases.1.epochs=1",
    "lr_finder={enabled: false, use: false}",
    "data.global_batch_size=16",
    "validation.batch_size=16",
    "run.preflight=false",
    "data.loader=reference",
    "data.num_workers=0",
)
PATIENCE = 900.0  # seconds; other tests may take most of the machine
OPTIONS = ("--name", NAME, "--ranks-per-node", "1", "--capacity", "spot", "--offline")


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCloud]:
    with local_cloud(tmp_path_factory.mktemp("user")) as cloud:
        yield cloud


def test_the_whole_story(cloud: LocalCloud, prepared_tars: tuple[Path, Manifest], tmp_path: Path) -> None:
    # Two commands: the first.
    said = cloud.run("up", *RECIPE, "--data", str(prepared_tars[0]), *UP, *OPTIONS)
    assert "WORST CASE $4.6" in said.out
    assert "a month, until python -m infra down --everything" in said.out
    assert cloud.group(GROUP)["DesiredCapacity"] == 1
    (first,) = cloud.instances(GROUP)

    seen = cloud.run("status").out
    assert f"{NAME}: booting ({first} started" in seen and "costs money now" in seen

    # The market takes the instance in the middle of the training.
    with FakeMetadata() as metadata:
        instance = Instance(
            cloud, tmp_path / "first", GROUP, first, AWS_EC2_METADATA_SERVICE_ENDPOINT=metadata.url
        )
        del instance.environment["AWS_EC2_METADATA_DISABLED"]
        instance.start()
        until(lambda: epochs_done(cloud) >= 1, instance.logs, PATIENCE)
        metadata.interrupt()
        until(lambda: phase_of(cloud, first) == "interrupted", instance.logs, PATIENCE)
        assert instance.billing_calls() == [], "the group has to replace it"
    cloud.client("ec2").terminate_instances(InstanceIds=[first])
    instance.power_cut()

    # The group launches another, which goes on from S3.
    (second,) = until(lambda: [i for i in cloud.instances(GROUP) if i != first], lambda: "no replacement")
    seen = cloud.run("status").out
    assert "epoch" in seen and "top-1" in seen, seen
    instance = Instance(cloud, tmp_path / "second", GROUP, second)
    assert instance.run(PATIENCE) == 0
    assert "was brought from s3://" in instance.logs()
    assert instance.billing_calls() == [f"suspend {GROUP}", f"0 {GROUP}", "shutdown -h now"]
    assert cloud.group(GROUP)["DesiredCapacity"] == 0 and cloud.instances(GROUP) == []

    assert f"{NAME}: finished" in cloud.run("status").out
    facts = cloud.run("status", "--json").facts["deployments"][0]
    assert facts["state"] == "finished" and facts["progress"]["epoch"] == 4
    assert 0 < facts["cost_usd"] < 1
    assert len(facts["nodes"]) == 2
    steps = [row["step"] for row in rows_of(cloud) if row["split"] == "val"]
    assert steps == sorted(set(steps)) and len(steps) == 4, "an epoch was lost, or counted twice"
    assert first in cloud.run("logs").out and second in cloud.run("logs").out

    # MLflow on the laptop has all of it, once.
    cloud.run("ui", "--once")
    cloud.run("ui", "--once")
    assert mlflow_steps(cloud) == steps

    # The second command.
    cloud.run("pull")
    best = cloud.runs / NAME / "checkpoints" / "best.pt"
    assert hashlib.sha256(best.read_bytes()).hexdigest() == facts["best"]["sha256"]
    assert (cloud.runs / NAME / "checkpoints" / "best.safetensors").is_file()
    assert list((cloud.runs / NAME / "report").glob("*.html"))
    said = cloud.run("down", "--yes")
    assert "is here already" in said.out
    assert not [name for name in cloud.left() if NAME in name or name.startswith("i-")], cloud.left()
    assert BUCKET in cloud.left()
    assert f"{NAME}: down" in cloud.run("status").out

    said = cloud.run("down", "--everything", "--yes")
    assert f"the bucket {BUCKET} holds" in said.out and "runs/" in said.out
    assert cloud.left() == []
    assert "nothing of it costs money" in cloud.run("status").out
    if os.environ.get("CLOUD_TRANSCRIPT"):
        write_transcript(cloud, {str(prepared_tars[0]): "data/small", **FAMILIAR})


def epochs_done(cloud: LocalCloud) -> float:
    """What the mirror has, from which another machine can go on."""
    records = read_records(open_folder(f"s3://{BUCKET}"), NAME)
    return records.progress.epoch if records.progress and records.newest else 0.0


def phase_of(cloud: LocalCloud, instance: str) -> str:
    return read_record(Node, cloud.bucket.get(Keys(NAME).node(instance))).phase


def rows_of(cloud: LocalCloud) -> list[dict]:
    return parse_rows(cloud.bucket.get(f"{Keys(NAME).report}metrics.jsonl"))


def mlflow_steps(cloud: LocalCloud) -> list[int]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{cloud.state / 'ui' / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    assert run.info.status == "FINISHED"
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "val_top1")]
