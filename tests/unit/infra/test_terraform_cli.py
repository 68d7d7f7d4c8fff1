"""Terraform as the commands run it, with a stand-in that writes down how it was called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from infra.errors import UserError
from infra.terraform_cli import Terraform, TerraformFailed
from tests.conftest import ROOT

STAND_IN = r"""#!/usr/bin/env python3
import json, os, pathlib, signal, sys, time
here = pathlib.Path(os.environ["STAND_IN"])
words = sys.argv[1:]
env = {name: value for name, value in os.environ.items() if name.startswith("TF_")}
with (here / "calls").open("a") as file:
    file.write(json.dumps({"words": words, "env": env}) + "\n")
if words[:1] == ["version"]:
    print(json.dumps({"terraform_version": os.environ.get("STAND_IN_VERSION", "1.11.4")}))
    sys.exit()
if "untaint" in words:
    sys.exit()
if "init" in words:
    if (here / "no-network").exists():
        red, plain = "\x1b[31m", "\x1b[0m"
        sys.stderr.write(f"\n{red}│{plain} {red}Error: {plain}Failed to find provider packages\n│ \n")
        sys.exit(1)
    sys.exit()
state = next(word[len("-state="):] for word in words if word.startswith("-state="))
def save(serial, names):
    resources = [{"mode": "managed", "type": "aws_vpc", "name": name, "instances": [{}]} for name in names]
    outputs = {"bucket": {"value": "b"}}
    content = {"version": 4, "serial": serial, "lineage": "a", "outputs": outputs, "resources": resources}
    pathlib.Path(state).write_text(json.dumps(content))
def fault(**diagnostic):
    print(json.dumps({"@level": "error", "type": "diagnostic", "diagnostic": diagnostic}), flush=True)
if (here / "fail").exists():
    save(1, ["half"])
    fault(summary="creating EC2 VPC", detail="VpcLimitExceeded: The limit of VPCs\n is reached.")
    sys.exit(1)
if (here / "slow").exists():
    def stop(*_):
        save(2, ["one"])
        fault(summary="interrupted")
        time.sleep(0.3)
        (here / "saved").touch()
        sys.exit(1)
    signal.signal(signal.SIGINT, stop)
    (here / "ready").touch()
    until = time.time() + 60
    while (here / "slow").exists() and time.time() < until:
        time.sleep(0.05)
save(3, [] if "destroy" in words else ["one", "two"])
hook = {"action": "create", "elapsed_seconds": 2, "resource": {"addr": "aws_vpc.this"}}
print(json.dumps({"@level": "info", "type": "apply_complete", "hook": hook}))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "stand-in"
    folder.mkdir()
    path = folder / "terraform"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(folder))
    return folder


def calls(stand_in: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stand_in / "calls").read_text().splitlines()]


def test_apply_runs_a_copy_of_the_module_beside_its_state(stand_in: Path, tmp_path: Path) -> None:
    said: list[str] = []
    terraform = Terraform("base", tmp_path / "base", said.append)
    terraform.apply({"region": "us-east-1"})
    apply = calls(stand_in)[-1]["words"]
    module = Path(apply[0].removeprefix("-chdir="))
    assert module.is_relative_to(tmp_path / "base") and (module / "main.tf").is_file()
    assert (module / "../../bootstrap/sprint-end").resolve().is_file(), "modules read it from there"
    assert f"-state={tmp_path}/base/terraform.tfstate" in apply and "-json" in apply
    assert said[0].strip() == "made aws_vpc.this (2 s)" and said[-1].startswith("apply of base: done")
    assert terraform.outputs() == {"bucket": "b"}
    assert terraform.resources() == ["aws_vpc.one", "aws_vpc.two"]
    assert "apply_complete" in terraform.log.read_text()


def test_a_bucket_is_never_replaced_for_an_interruption(stand_in: Path, tmp_path: Path) -> None:
    terraform = Terraform("base", tmp_path / "base")
    half = {"mode": "managed", "name": "this", "instances": [{"status": "tainted"}]}
    resources = [{**half, "type": "aws_s3_bucket"}, {**half, "type": "aws_vpc"}]
    terraform.folder.mkdir()
    terraform.state_path.write_text(json.dumps({"serial": 1, "lineage": "a", "resources": resources}))
    terraform.apply({})
    untainted = [call["words"][-1] for call in calls(stand_in) if "untaint" in call["words"]]
    assert untainted == ["aws_s3_bucket.this"]


def test_a_fault_is_one_sentence_and_names_the_log(stand_in: Path, tmp_path: Path) -> None:
    terraform = Terraform("base", tmp_path / "base")
    (stand_in / "fail").touch()
    with pytest.raises(TerraformFailed) as error:
        terraform.apply({})
    words = str(error.value)
    assert "VpcLimitExceeded: The limit of VPCs is reached" in words
    assert str(terraform.log) in words and "\n" not in words
    assert terraform.resources() == ["aws_vpc.half"], "what exists is known"


def test_without_providers_it_says_what_to_do(stand_in: Path, tmp_path: Path) -> None:
    (stand_in / "no-network").touch()
    with pytest.raises(TerraformFailed, match=r"Failed to find provider packages\): check the network"):
        Terraform("base", tmp_path / "base").apply({})


def test_an_old_or_missing_terraform_is_refused(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_VERSION", "1.5.7")
    with pytest.raises(UserError, match=r"Terraform 1\.5\.7 is too old"):
        Terraform("base", tmp_path / "base").apply({})
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"not installed: get it from https://"):
        Terraform("base", tmp_path / "base").apply({})


def test_the_users_settings_do_not_lead_it_astray(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TF_CLI_CONFIG_FILE", str(tmp_path / "not-there"))
    monkeypatch.setenv("TF_CLI_ARGS_apply", "-target=x")
    monkeypatch.setenv("TF_VAR_region", "eu-west-1")
    monkeypatch.setenv("TF_PLUGIN_MIRROR", "/a/mirror")
    Terraform("base", tmp_path / "base").apply({})
    init, apply = (call for call in calls(stand_in) if "version" not in call["words"])
    assert "-plugin-dir=/a/mirror" in init["words"]
    assert not {"TF_CLI_CONFIG_FILE", "TF_CLI_ARGS_apply", "TF_VAR_region"} & set(apply["env"])


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_waits_for_the_end_and_twice_for_the_state(stand_in: Path, tmp_path: Path, times: int) -> None:
    (stand_in / "slow").touch()
    code = (
        "from pathlib import Path\nfrom infra.terraform_cli import Terraform\n"
        f"say = lambda line: print(line, flush=True)\n"
        f"Terraform('base', Path({str(tmp_path / 'base')!r}), say).apply({{}})\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 60
    while not (stand_in / "ready").exists():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, 2)  # as a terminal does it
    assert process.stderr is not None
    assert process.stderr.readline() == "\n"
    assert "Ctrl-C again stops it where it stands" in process.stderr.readline()
    if times == 2:
        os.killpg(process.pid, 2)
    else:
        (stand_in / "slow").unlink()  # it comes to its end
    err = process.communicate(timeout=60)[1]
    assert "KeyboardInterrupt" in err
    made = ["aws_vpc.one"] if times == 2 else ["aws_vpc.one", "aws_vpc.two"]
    assert Terraform("base", tmp_path / "base").resources() == made, "it was waited for"
    assert (stand_in / "saved").exists() == (times == 2) == ("saves its state" in err)


def test_destroy_of_nothing_asks_nobody(stand_in: Path, tmp_path: Path) -> None:
    Terraform("cluster", tmp_path / "cluster").destroy()
    assert not (stand_in / "calls").exists()


def state(serial: int, lineage: str = "a") -> bytes:
    return json.dumps({"serial": serial, "lineage": lineage, "resources": []}).encode()


def test_only_a_newer_state_of_the_same_history_is_taken(tmp_path: Path) -> None:
    terraform = Terraform("base", tmp_path / "base")
    assert terraform.take_state(state(3)) and terraform.serial() == 3
    assert not terraform.take_state(state(3)) and not terraform.take_state(state(2))
    assert not terraform.take_state(state(9, "another")) and terraform.serial() == 3
    assert not terraform.take_state(b"{") and not terraform.take_state(b'{"serial": 4}')
    assert terraform.take_state(state(4)) and terraform.serial() == 4


def test_another_module_or_variable_is_another_fingerprint(tmp_path: Path) -> None:
    base, cluster = Terraform("base", tmp_path / "b"), Terraform("cluster", tmp_path / "c")
    assert base.fingerprint({"a": 1}) == base.fingerprint({"a": 1})
    assert len({base.fingerprint({"a": 1}), base.fingerprint({"a": 2}), cluster.fingerprint({"a": 1})}) == 3
