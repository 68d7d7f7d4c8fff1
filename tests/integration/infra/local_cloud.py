"""AWS on this machine: a moto server of one's own, real Terraform with the real provider, the real commands.

`LocalCloud.run` is `python -m infra …` as a user types it. `Instance` plays what a group has launched, from
the launch template's user data on: all that runs is what would run there.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from infra.__main__ import main
from tests.conftest import ROOT
from tests.integration.infra.sandbox import Sandbox
from tests.integration.infra.terraform import ACCOUNT, AMI, REGION, find_mirror, skip_without_terraform
from tests.integration.s3_server import MOTO, Bucket, moto_server

BUCKET = f"sprint-{ACCOUNT}-{REGION}"
# What moto lacks, and what only takes time there.
BASE = {
    "enable_tls_only": False,
    "enable_lifecycle": False,
    "availability_zones": [f"{REGION}a", f"{REGION}b"],
}
CLUSTER = {"ami_id": AMI, "enable_budget": False}
# moto 5.2 cannot launch from a template's second version: it keeps that one's user data as a plain string.
MENDED_MOTO = f"""
from moto.core.types import Base64EncodedString
from moto.ec2.models.launch_templates import LaunchTemplateVersion
def user_data(self):
    found = self.data.get("UserData")
    return Base64EncodedString(found) if isinstance(found, str) else found
LaunchTemplateVersion.user_data = property(user_data)
{MOTO}
"""
UP = ("--max-usd", "5", "--max-hours", "1", "--yes")


@dataclass
class Said:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def facts(self) -> Any:
        return json.loads(self.out)


class LocalCloud:
    """See the module. `folder` is the user's: .infra, runs."""

    def __init__(self, port: int, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.folder, self.state, self.runs = folder, folder / ".infra", folder / "runs"
        self.state.mkdir(parents=True, exist_ok=True)
        (self.state / "base.tfvars.json").write_text(json.dumps(BASE))
        (self.state / "cluster.tfvars.json").write_text(json.dumps(CLUSTER))
        self.spoken: list[tuple[str, Said]] = []
        self.played: list[Instance] = []

    def words(self, command: str, *words: str) -> list[str]:
        runs = ["--runs", str(self.runs)] if command in ("pull", "down") else []
        return [command, "--state-dir", str(self.state), *runs, *words]

    def run(self, command: str, *words: str, code: int | None = 0) -> Said:
        """`python -m infra COMMAND …`, in this process; its exit code must be `code`."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                found = main(self.words(command, *words))
            except SystemExit as ending:
                found = int(ending.code or 0)
        said = Said(found, out.getvalue(), err.getvalue())
        self.spoken.append((shlex.join([command, *words]), said))
        assert code is None or found == code, f"{command}: {found}\n{said.out}\n{said.err}"
        return said

    def start(self, command: str, *words: str) -> subprocess.Popen[str]:
        """The same, in a process of its own, as a terminal starts it."""
        return subprocess.Popen(
            [sys.executable, "-m", "infra", *self.words(command, *words)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def client(self, service: str) -> Any:
        import boto3

        return boto3.client(service, region_name=REGION, endpoint_url=self.url)

    @property
    def bucket(self) -> Bucket:
        bucket = object.__new__(Bucket)
        bucket.name, bucket.s3 = BUCKET, self.client("s3")
        bucket.server = SimpleNamespace(url=self.url, direct=self.url)  # type: ignore[assignment]
        return bucket

    def group(self, name: str) -> dict[str, Any]:
        asked = self.client("autoscaling").describe_auto_scaling_groups(AutoScalingGroupNames=[name])
        return dict(asked["AutoScalingGroups"][0])

    def instances(self, name: str) -> list[str]:
        return [instance["InstanceId"] for instance in self.group(name)["Instances"]]

    def user_data(self, group: str) -> str:
        """What an instance of the group is given."""
        asked = self.client("ec2").describe_launch_template_versions(
            LaunchTemplateName=group, Versions=["$Latest"]
        )
        data = asked["LaunchTemplateVersions"][0]["LaunchTemplateData"]["UserData"]
        content = base64.b64decode(data)
        return (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()

    def left(self) -> list[str]:
        """Everything of ours that AWS has, by name."""
        ec2, scaling, iam = self.client("ec2"), self.client("autoscaling"), self.client("iam")
        found = [
            g["AutoScalingGroupName"] for g in scaling.describe_auto_scaling_groups()["AutoScalingGroups"]
        ]
        found += [t["LaunchTemplateName"] for t in ec2.describe_launch_templates()["LaunchTemplates"]]
        found += [t["TopicArn"] for t in self.client("sns").list_topics()["Topics"]]
        found += [a["AlarmName"] for a in self.client("cloudwatch").describe_alarms()["MetricAlarms"]]
        found += [
            g["GroupName"]
            for g in ec2.describe_security_groups()["SecurityGroups"]
            if "sprint" in g["GroupName"]
        ]
        found += [v["VpcId"] for v in ec2.describe_vpcs()["Vpcs"] if not v["IsDefault"]]
        found += [r["RoleName"] for r in iam.list_roles()["Roles"] if "sprint" in r["RoleName"]]
        found += [b["Name"] for b in self.client("s3").list_buckets()["Buckets"]]
        for reservation in ec2.describe_instances()["Reservations"]:
            for instance in reservation["Instances"]:
                if instance["State"]["Name"] not in ("terminated", "shutting-down"):
                    found.append(instance["InstanceId"])
        return found


class Instance(Sandbox):
    """An instance of a group, played on this machine: its user data are those of the launch template."""

    def __init__(self, cloud: LocalCloud, root: Path, group: str, instance: str, **environment: str) -> None:
        self._text = cloud.user_data(group)
        cloud.played.append(self)
        super().__init__(
            root,
            cloud.bucket,
            "0" * 64,
            instance=instance,
            wait_scale=0.4,
            environment={"STUB_PERFORM": "s3 s3api autoscaling", **environment},
        )

    def _write_user_data(self) -> None:
        for file in yaml.safe_load(self._text)["write_files"]:
            path = self.root / file["path"].lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            content = file["content"].encode()
            if file.get("encoding") == "gz+b64":
                content = gzip.decompress(base64.b64decode(content))
            path.write_bytes(content)
            path.chmod(int(file["permissions"], 8))


def until(condition: Callable[[], Any], what: Callable[[], str], seconds: float = 60) -> Any:
    """Look twice a second: whoever is waited for needs the machine."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.5)
    return value


@contextlib.contextmanager
def local_cloud(folder: Path) -> Iterator[LocalCloud]:
    """A server of its own, and an environment that leads to it."""
    from data_prep import s3_requests

    skip_without_terraform()
    with moto_server(MENDED_MOTO) as port, pytest.MonkeyPatch.context() as patch:
        cloud = LocalCloud(port, folder)
        for name in list(os.environ):
            if name.startswith(("AWS_", "S3_", "TF_", "MLFLOW_")) and name != "TF_PLUGIN_MIRROR":
                patch.delenv(name)
        for name, value in {
            "HOME": str(folder),
            "AWS_ENDPOINT_URL": cloud.url,
            "AWS_ACCESS_KEY_ID": "dummy",
            "AWS_SECRET_ACCESS_KEY": "dummy",
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_MAX_ATTEMPTS": "2",
            "AWS_EC2_METADATA_DISABLED": "true",
            "S3_MAX_WAIT_SECONDS": "0.05",
            "S3_TIMEOUT_SECONDS": "20",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }.items():
            patch.setenv(name, value)
        if (mirror := find_mirror()) is not None:
            patch.setenv("TF_PLUGIN_MIRROR", str(mirror))
        s3_requests._client.cache_clear()
        try:
            yield cloud
        finally:
            for instance in cloud.played:
                instance.power_cut()
            s3_requests._client.cache_clear()
