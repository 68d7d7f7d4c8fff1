"""Terraform against a local AWS: finds binary and provider, starts moto, applies a module in its own folder.

For tests of the modules and of the commands around them:

    def test_it(cloud: Cloud, terraform_environment: dict[str, str], tmp_path: Path) -> None:
        base = Module("base", tmp_path, terraform_environment | cloud.environment)
        outputs = base.apply(base_variables())
        cluster = Module("cluster", tmp_path, terraform_environment | cloud.environment)
        cluster.apply(cluster_variables(outputs, capacity="spot"))
        cloud.client("autoscaling").describe_auto_scaling_groups()
        cluster.destroy()

`terraform_environment` (a fixture, as `cloud` is) skips the test where Terraform is missing. It holds
TF_PLUGIN_MIRROR where a mirror was found, so a command that is started with it (python -m infra) finds the
provider, too. `cloud` is one moto server for all tests of a process; `cloud.reset()` empties it: a test that
counts what is there calls that first.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.integration.s3_server import moto_server

REGION = "us-east-1"
ACCOUNT = "123456789012"  # moto's
AMI = "ami-12c6146b"  # one that moto knows
TIMEOUT_SECONDS = 400.0
MIRROR_FINDER = ROOT.parent / "shared" / "tools" / "terraform-mirror"


def find_terraform() -> str | None:
    """The binary: on the path, or where scripts/setup.sh puts it."""
    return shutil.which("terraform") or shutil.which("terraform", path=str(Path(sys.executable).parent))


@functools.lru_cache
def find_mirror() -> Path | None:
    """A folder of providers on this machine, for `init -plugin-dir`; None: init asks the network.

    Looked for in TF_PLUGIN_MIRROR, then by the tool beside the repository.
    """
    if named := os.environ.get("TF_PLUGIN_MIRROR"):
        return Path(named)
    if MIRROR_FINDER.exists():
        done = subprocess.run(
            [MIRROR_FINDER], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode == 0 and done.stdout.strip():
            return Path(done.stdout.strip())
    return None


def plain_environment(home: Path) -> dict[str, str]:
    """The process's, without what belongs to the user's AWS and Terraform, and with the mirror."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TF_", "S3_"))
    }
    environment |= {"HOME": str(home), "TF_IN_AUTOMATION": "1", "CHECKPOINT_DISABLE": "1"}
    if (mirror := find_mirror()) is not None:
        environment["TF_PLUGIN_MIRROR"] = str(mirror)
    terraform = find_terraform()
    if terraform is not None and shutil.which("terraform") is None:
        environment["PATH"] = f"{Path(terraform).parent}{os.pathsep}{environment['PATH']}"
    return environment


@dataclass(frozen=True)
class Cloud:
    """A moto server at `url`; `environment` leads boto3, the AWS CLI and Terraform to it."""

    url: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "dummy",
            "AWS_SECRET_ACCESS_KEY": "dummy",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "2",  # an operation that moto lacks is tried again for minutes
        }

    def client(self, service: str) -> Any:
        import boto3

        return boto3.client(
            service,
            endpoint_url=self.url,
            region_name=REGION,
            aws_access_key_id="dummy",
            aws_secret_access_key="dummy",
        )

    def reset(self) -> None:
        """Forget everything."""
        request = urllib.request.Request(f"{self.url}/moto-api/reset", method="POST")
        with urllib.request.urlopen(request, timeout=60):
            pass


@pytest.fixture(scope="session")
def cloud() -> Iterator[Cloud]:
    with moto_server() as port:
        yield Cloud(f"http://127.0.0.1:{port}")


def skip_without_terraform() -> None:
    """Where Terraform is missing, or its provider can come from nowhere: no test needs the network."""
    if find_terraform() is None:
        pytest.skip("Terraform is not installed (scripts/setup.sh could not fetch it)")
    if find_mirror() is None:
        try:
            socket.create_connection(("registry.terraform.io", 443), 10).close()
        except OSError:
            pytest.skip("Terraform's AWS provider is not on this machine, and its registry cannot be reached")


@pytest.fixture(scope="session")
def terraform_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`plain_environment` with a home of its own; skips where Terraform is missing."""
    skip_without_terraform()
    return plain_environment(tmp_path_factory.mktemp("terraform-home"))


class Module:
    """A copy of infra/terraform/<name> and infra/bootstrap below `folder`; the state lies beside it.

    Attributes:
        folder: the module's own, for tests that change a file before anything runs.
        bootstrap: the copy of infra/bootstrap.
        state: path of the state.
    """

    def __init__(self, name: str, folder: Path, environment: dict[str, str]) -> None:
        infra = folder / name / "infra"
        self.name, self.environment = name, environment
        self.folder, self.bootstrap = infra / "terraform" / name, infra / "bootstrap"
        self.state = folder / name / "terraform.tfstate"
        if not infra.exists():
            leave = shutil.ignore_patterns(".terraform*", "*.tfstate*", "__pycache__")
            shutil.copytree(ROOT / "infra" / "terraform" / name, self.folder, ignore=leave)
            shutil.copytree(ROOT / "infra" / "bootstrap", self.bootstrap, ignore=leave)

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`terraform words…` in the module; fails the test with all that was said unless `check` is false."""
        terraform = find_terraform()
        assert terraform is not None
        done = subprocess.run(
            [terraform, f"-chdir={self.folder}", *words],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        assert not check or done.returncode == 0, f"terraform {' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done

    def init(self) -> None:
        """Once; offline where a mirror is there."""
        if (self.folder / ".terraform").exists():
            return
        mirror = find_mirror()
        self.run("init", "-input=false", "-no-color", *([f"-plugin-dir={mirror}"] if mirror else []))

    def plan(self, variables: dict[str, Any]) -> dict[str, Any]:
        """The plan as `terraform show -json` tells it."""
        plan = self.folder / "plan"
        self._with("plan", variables, f"-out={plan}")
        shown: dict[str, Any] = json.loads(self.run("show", "-json", str(plan)).stdout)
        return shown

    def refusal(self, variables: dict[str, Any]) -> str:
        """What a plan that has to fail says, in one line."""
        done = self._with("plan", variables, check=False)
        assert done.returncode == 1, done.stdout
        return " ".join(done.stderr.replace("│", " ").split())

    def apply(self, variables: dict[str, Any]) -> dict[str, Any]:
        """The outputs."""
        self._with("apply", variables, "-auto-approve")
        return self.outputs()

    def outputs(self) -> dict[str, Any]:
        outputs = json.loads(self.state.read_text())["outputs"]
        return {name: output["value"] for name, output in outputs.items()}

    def show(self) -> dict[str, Any]:
        """The state as `terraform show -json` tells it."""
        shown: dict[str, Any] = json.loads(self.run("show", "-json", str(self.state)).stdout)
        return shown

    def destroy(self, check: bool = True) -> subprocess.CompletedProcess[str]:
        """With the variables of the last apply."""
        return self._with("destroy", None, "-auto-approve", check=check)

    def _with(
        self, command: str, variables: dict[str, Any] | None, *words: str, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        self.init()
        file = self.folder / "test.tfvars.json"
        if variables is not None:
            file.write_text(json.dumps(variables))
        common = ("-input=false", "-no-color", f"-state={self.state}", f"-var-file={file}")
        return self.run(command, *common, *words, check=check)


def base_variables(**changes: Any) -> dict[str, Any]:
    """Of a base that moto takes: its answer to TLS alone is 403. Without expiry, a minute faster."""
    return {"region": REGION, "enable_tls_only": False, "enable_lifecycle": False} | changes


def cluster_variables(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Of a cluster that moto takes, in the network and bucket of `base` (its outputs)."""
    return {
        "deployment": "mine",
        "region": base["region"],
        "bucket": base["bucket"],
        "vpc_id": base["vpc_id"],
        "subnet_ids": sorted(base["subnet_ids"].values()),
        "role_name": base["role_name"],
        "instance_profile_name": base["instance_profile_name"],
        "mlflow_security_group_id": base["mlflow_security_group_id"],
        "data_snapshot_id": base["data_snapshot_id"],
        "ami_id": AMI,  # moto has no parameter for the Deep Learning AMI
        "enable_budget": False,
        "end_time": "2035-01-31T12:00:00Z",
        "deadline": 2053857300,
        "code_key": f"code/{'0' * 64}.tar.gz",
        "code_sha256": "0" * 64,
    } | changes
