"""The user data as Terraform renders it: small enough, valid, and what an instance would find on its disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.integration.infra.sandbox import BOOTSTRAP, Sandbox, bootstrap_files, render, user_data_variables
from tests.integration.s3_server import Bucket

MAX_BYTES = 16 << 10  # of EC2, before its own encoding


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> str:
    """By Terraform itself."""
    terraform = shutil.which("terraform")
    if terraform is None:
        pytest.skip("terraform is not installed")
    folder = tmp_path_factory.mktemp("render")
    (folder / "variables.json").write_text(json.dumps(user_data_variables()))
    template = BOOTSTRAP / "user_data.yaml.tftpl"
    expression = f'jsonencode(templatefile("{template}", jsondecode(file("{folder}/variables.json"))))\n'
    environment = {name: value for name, value in os.environ.items() if name != "TF_CLI_CONFIG_FILE"}
    said = subprocess.run(
        [terraform, "console"], cwd=folder, input=expression, env=environment, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    return str(json.loads(json.loads(said.stdout)))


def test_it_fits(rendered: str) -> None:
    long = user_data_variables(
        deployment="a" * 32, bucket="b" * 63, topic_arn=f"arn:aws:sns:ap-southeast-2:123456789012:{'c' * 60}",
        image="1" * 200, wheels=f"wheels/{'d' * 64}/", files=bootstrap_files(),
    )  # fmt: skip
    assert len(render(long).encode()) < MAX_BYTES - 1024, "leave some room for the next line"


def test_the_tests_render_as_terraform_does(rendered: str) -> None:
    mine = yaml.safe_load(render(user_data_variables()))
    theirs = yaml.safe_load(rendered)
    deadline = re.compile(r'SPRINT_DEADLINE="\d+"')
    for content in (mine, theirs):
        content["write_files"][0]["content"] = deadline.sub("", content["write_files"][0]["content"])
    assert mine == theirs


def test_units_start_what_is_there_and_fail_into_the_end(tmp_path: Path, bucket: Bucket) -> None:
    sandbox = Sandbox(tmp_path / "root", bucket, "0" * 64)
    units = {path.name for path in (sandbox.root / "etc/systemd/system").iterdir()}
    assert units == {"sprint.service", "sprint-failed.service", "sprint-watch.service", "sprint-watch.timer"}
    for name in units - {"sprint-watch.timer"}:
        script = Path(sandbox.unit(name)["ExecStart"].split()[0])
        assert script.stat().st_mode & stat.S_IXUSR, name
    assert sandbox.unit("sprint.service")["OnFailure"] == "sprint-failed.service"
    assert sandbox.unit("sprint.service")["KillMode"] == "mixed"
    assert sandbox.unit("sprint-failed.service")["FailureAction"] == "poweroff-force"
    # The watch first, so that the deadline holds whatever happens to the rest.
    started = [words[-1] for words in sandbox.commands if words[0] == "systemctl" and len(words) > 2]
    assert started == [
        "sprint-watch.timer",
        "apt-daily-upgrade.timer",  # masked: it restarts services
        "sprint.service",
        "sprint.service",
    ]
    assert sandbox.unit("sprint.service")["RefuseManualStop"] == "yes", (
        "a restart would be a machine that leaves"
    )
    analyze = shutil.which("systemd-analyze")
    if analyze is not None:
        paths = [str(sandbox.root / "etc/systemd/system" / name) for name in sorted(units)]
        said = subprocess.run([analyze, "verify", "--man=no", *paths], capture_output=True, text=True)
        faults = [
            line for line in said.stderr.splitlines() if "is not executable" not in line and "sprint" in line
        ]
        assert not faults, faults


@pytest.mark.parametrize(
    ("state", "seconds_left", "idle_seconds", "ends"),
    [
        ("active", 600, 0, None),
        ("active", -1, 0, "deadline"),
        ("failed", 600, 0, None),  # it may be about to be started
        ("inactive", 600, 700, "failed"),
        ("activating", 600, 700, None),
    ],
)
def test_the_watch_ends_what_is_late_or_idle(
    tmp_path: Path, bucket: Bucket, state: str, seconds_left: int, idle_seconds: int, ends: str | None
) -> None:
    deadline = int(time.time()) + seconds_left
    sandbox = Sandbox(tmp_path / "root", bucket, "0" * 64, deadline=deadline)
    (sandbox.root / "service-state").write_text(state)
    if idle_seconds:
        seen = sandbox.root / "run/sprint/seen"
        seen.parent.mkdir(parents=True)
        seen.touch()
        os.utime(seen, (time.time() - idle_seconds,) * 2)
    assert sandbox.run_unit("sprint-watch.service") == 0
    if ends is None:
        assert sandbox.billing_calls() == []
    else:
        assert sandbox.billing_calls()[-1] == "shutdown -h now"
        assert sandbox.end()["status"] == ends
        sandbox.run_unit("sprint-watch.service")  # a minute later, while it shuts down
        assert sandbox.billing_calls().count("shutdown -h now") == 1


def test_an_end_that_was_cut_off_is_taken_up_again(tmp_path: Path, bucket: Bucket) -> None:
    sandbox = Sandbox(tmp_path / "root", bucket, "0" * 64, deadline=1)
    lock = sandbox.root / "run/sprint/ending"
    lock.mkdir(parents=True)
    os.utime(lock, (time.time() - 400,) * 2)
    sandbox.run_unit("sprint-watch.service")
    assert sandbox.billing_calls()[-1] == "shutdown -h now"


def test_a_reason_cannot_break_out_of_its_place(tmp_path: Path, bucket: Bucket) -> None:
    sandbox = Sandbox(tmp_path / "root", bucket, "0" * 64)
    end = sandbox.root / "usr/local/sbin/sprint-end"
    reason = 'x", "status": "finished\n$(touch pwned) `touch pwned` ' + "y" * 5000
    subprocess.run([end, reason, "failed"], env=sandbox.environment, cwd=tmp_path, check=True)
    assert sandbox.end()["status"] == "failed" and len(sandbox.end()["reason"]) <= 500
    assert not (tmp_path / "pwned").exists()


def variables_of_the_template() -> set[str]:
    text = (BOOTSTRAP / "user_data.yaml.tftpl").read_text()
    return set(re.findall(r"\$\{(\w+)\}", text)) - {"path", "content"} | {"groups", "files"}


def test_the_module_passes_what_the_template_asks_for() -> None:
    assert variables_of_the_template() == set(user_data_variables())
    module = ROOT / "infra/terraform/cluster"
    text = "\n".join(path.read_text() for path in module.glob("*.tf"))
    if "user_data.yaml.tftpl" not in text:
        pytest.skip("the cluster module does not use the template yet")
    call = text[text.index("user_data.yaml.tftpl") :][:4000]
    for name in variables_of_the_template():
        assert re.search(rf"\b{name}\s*=", call), name
