"""The command line of the cloud, where no cloud is needed to answer."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from infra.__main__ import COMMANDS, command_line, main
from infra.aws import Aws, AwsError, explained
from infra.commands import ui, up
from infra.commands.logs import LogReader
from infra.commands.up import deployment_name
from infra.console import Console, duration, size
from infra.errors import UserError
from infra.layout import Keys
from infra.uploading import load_user_recipe, resolve_recipe
from tests.conftest import ROOT
from tests.unit.infra.fake_cloud import FakeCloud, deployment

DEMO = ROOT / "configs" / "demo.yaml"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main([command, "--help"])
    assert ending.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_documented_commands_have_these_options() -> None:
    """Those of the pages; what goes to `prepare` after -- is data_prep's."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/cloud.md"))
    commands = re.findall(r"^ *\$? ?python -m infra ([^#`\n]+)$", text, flags=re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        name, *words = shlex.split(re.split(r" -- |   ", command)[0].replace("RECIPE", "r.yaml"))
        command_line(name).parse_intermixed_args(words)


def test_what_is_no_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["launch"], ["up"], ["status", "--", "x"], ["up", "r.yaml", "--max-usd", "-3"]):
        with pytest.raises(SystemExit) as ending:
            main(words)
        assert ending.value.code == 2, words
    capsys.readouterr()


def test_without_credentials_it_says_how_to_get_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["status", "--state-dir", str(tmp_path)]) == 1
    assert "no AWS region is set" in capsys.readouterr().err
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    assert main(["status", "--json", "--state-dir", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "run aws configure" in said.err and "aws configure" in json.loads(said.out)["error"]


def test_overrides_may_stand_anywhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [
        "up",
        str(DEMO),
        "--max-usd",
        "5",
        "run.seed=x",
        "--max-hours",
        "1",
        "--state-dir",
        str(tmp_path),
    ]
    assert main(words) == 1
    assert "run.seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("ExpiredToken", "log in again"),
        ("InvalidClientTokenId", "does not know these credentials"),
        ("UnauthorizedOperation", "infra/terraform/user_policy.json"),
        ("VpcLimitExceeded", "ec2:create_vpc failed: VpcLimitExceeded: too many"),
    ],
)
def test_a_fault_of_aws_says_what_to_change(code: str, words: str) -> None:
    from botocore.exceptions import ClientError

    error = ClientError({"Error": {"Code": code, "Message": "too many\nof them"}}, "CreateVpc")
    found = explained(error, "ec2:create_vpc")
    assert words in str(found) and "\n" not in str(found) and found.code == code


def test_an_endpoint_that_does_not_answer_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(AwsError, match="AWS cannot be reached"):
        Aws("us-east-1").call("sts", "get_caller_identity")


def test_names_come_from_the_recipe_and_fit_aws() -> None:
    assert deployment_name(None, Path("configs/imagenet_resnet50_16.yaml"), []) == "imagenet-resnet50-16"
    assert deployment_name(None, DEMO, ["run.name=My_Run.2"]) == "my-run-2"
    assert len(deployment_name(None, Path("a" * 90), [])) == 32
    with pytest.raises(UserError, match="--name"):
        deployment_name("Mine", DEMO, [])


def test_the_recipe_runs_there_with_its_budget_and_mirror() -> None:
    recipe = resolve_recipe(DEMO, ["optimizer.peak_lr=0.01"], "mine", "b", "s3://b/data/x", 2.0, 50.0, 20.0)
    assert recipe.run.name == "mine" and recipe.optimizer.peak_lr == 0.01
    assert recipe.checkpoint.mirror == "s3://b/runs" and str(recipe.data.path) == "s3://b/data/x"
    assert recipe.budget.max_usd == 50 and recipe.budget.max_hours == 19.5, "it ends before it is ended"
    tight = resolve_recipe(DEMO, ["budget.max_usd=3"], "mine", "b", "s3://b/data/x", 2.0, 50.0, 1.0)
    assert tight.budget.max_usd == 3 and tight.budget.max_hours == 0.9


def test_a_file_of_this_machine_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.checkpoint=.*is a file of this machine"):
        load_user_recipe(DEMO, ["model.checkpoint=runs/other/checkpoints/best.pt"])


def test_logs_come_once_and_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cloud, keys = FakeCloud(tmp_path), Keys("mine")
    cloud.folder.write(keys.log("i-1", "train", 1), b"third\n")
    cloud.folder.write(keys.log("i-1", "train", 0), b"first \x1b[31mred\x07\nsecond\n")
    cloud.folder.write(keys.logs + "../x.log", b"no log\n")
    reader = LogReader(cloud, deployment(), None, None)  # type: ignore[arg-type]
    assert reader.show(Console())
    assert capsys.readouterr().out == "==> i-1: train\nfirst [31mred\nsecond\nthird\n"
    assert not reader.show(Console())
    cloud.folder.write(keys.log("i-2", "agent", 0), b"hello\n")
    assert reader.show(Console())
    assert capsys.readouterr().out == "==> i-2: agent\nhello\n"
    only = LogReader(cloud, deployment(), "i-1", "agent")  # type: ignore[arg-type]
    assert not only.show(Console()) and not only.has_shown


def test_the_tunnel_goes_through_ssm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ui.forward_words("eu-west-1", "i-1", 5001)
    assert words[:3] == ["aws", "ssm", "start-session"] and "portNumber=5000,localPortNumber=5001" in words
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="Session Manager plugin"):
        ui._forward(FakeCloud(tmp_path), "i-1", 5001, Console())  # type: ignore[arg-type]


def test_nobody_is_asked_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", type("Closed", (), {"isatty": lambda self: False})())
    with pytest.raises(UserError, match="add --yes"):
        Console().confirm("Go on?")
    assert Console(is_sure=True).confirm("Go on?")


def test_words_for_sizes_and_times() -> None:
    assert [size(n) for n in (0, 999, 65e9, 2e12)] == ["0 bytes", "999 bytes", "65.0 GB", "2.00 TB"]
    assert [duration(s) for s in (5, 240, 12000)] == ["5 s", "4 min", "3 h 20 min"]


def test_a_running_deployment_is_not_taken_for_another() -> None:
    """Asked for other machines than those that run, `up` says so, instead of "up already"."""
    words = ["r.yaml", "--max-usd", "50", "--max-hours", "20", "--instance-type"]
    known = deployment(instance_types=("g6.12xlarge",), capacity="spot-then-on-demand")
    same, other = (command_line("up").parse_args([*words, name]) for name in ("g6.12xlarge", "p5.48xlarge"))
    assert up._differences(known, same) == []
    assert up._differences(known, other) == ["--instance-type g6.12xlarge, not p5.48xlarge"]


def test_what_an_instance_wrote_does_not_rule_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Console().say("failed: \x1b[2Jno\x07 GPU\x9b31m\nnext")
    assert capsys.readouterr().out == "failed: [2Jno GPU31m\nnext\n"
