"""Every way in which an instance can end, with the real scripts and the real agent: each ends billing.

The scenarios run once, three at a time; the tests look at what was called.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from data_prep.pipeline import PrepareOptions, prepare
from data_prep.sources import open_source
from infra.code import pack_code
from infra.layout import End, Event, Keys, Node, code_key, read_record
from tests.conftest import write_image_folder
from tests.integration.fake_imds import FakeMetadata
from tests.integration.infra.sandbox import DEPLOYMENT, FALLBACK_GROUP, SPOT_GROUP, TOPIC, Sandbox
from tests.integration.s3_server import SECRET, Bucket, FaultyS3

FINISHED = {"status": "finished", "reason": "3 of 3 epochs", "seconds": 0.3, "summary": {"final_top1": 0.75}}
RESTART = {"status": "restart", "reason": "SIGUSR1"}
ENDED = [
    f"suspend {SPOT_GROUP}",
    f"0 {SPOT_GROUP}",
    f"suspend {FALLBACK_GROUP}",
    f"0 {FALLBACK_GROUP}",
    "shutdown -h now",
]


@dataclass
class Scenario:
    """How an instance is made, what is done to it while it runs, and what it must say at the end."""

    scenes: list[dict[str, Any]] = field(default_factory=lambda: [FINISHED])
    options: dict[str, Any] = field(default_factory=dict)
    job: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Sandbox], None] = lambda sandbox: None
    meddle: Callable[[Sandbox], None] = lambda sandbox: None
    has_data: bool = True


def told(sandbox: Sandbox) -> None:
    """A SIGTERM while it trains, as at a shutdown."""
    sandbox.wait_for(lambda: sandbox.calls("torchrun"))
    assert sandbox.process is not None
    sandbox.process.send_signal(signal.SIGTERM)


def told_while_installing(sandbox: Sandbox) -> None:
    sandbox.wait_for(lambda: (sandbox.root / "in-pip").exists())
    assert sandbox.process is not None
    sandbox.process.send_signal(signal.SIGTERM)


def noticed(sandbox: Sandbox) -> None:
    """The market takes the machine: training sees it and leaves, and then the machine goes."""
    with FakeMetadata() as metadata:
        sandbox.environment["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = metadata.url
        del sandbox.environment["AWS_EC2_METADATA_DISABLED"]
        sandbox.start()
        sandbox.wait_for(lambda: sandbox.calls("torchrun"))
        metadata.interrupt()
        sandbox.wait_for(lambda: any(event["kind"] == "notice" for event in sandbox.events()))
        sandbox.notice_file.touch()
        sandbox.wait_for(lambda: sandbox.node()["phase"] == "interrupted")
        time.sleep(0.5)
        assert sandbox.billing_calls() == [], "it has to stay until it is taken"
        assert sandbox.process is not None
        sandbox.process.send_signal(signal.SIGTERM)
        sandbox.finish()


def agent_killed(sandbox: Sandbox) -> None:
    sandbox.wait_for(lambda: sandbox.calls("torchrun"))
    for pid in sandbox._pids():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"infra.node" in words and b"-m" in words:
            os.kill(pid, signal.SIGKILL)


def script_killed(sandbox: Sandbox) -> None:
    """The main process of the service: only its OnFailure= is left."""
    sandbox.wait_for(lambda: sandbox.calls("torchrun"))
    assert sandbox.process is not None
    os.kill(sandbox.process.pid, signal.SIGKILL)


def write(name: str, text: str) -> Callable[[Sandbox], None]:
    return lambda sandbox: (sandbox.root / name).write_text(text) and None


def slow_pip(sandbox: Sandbox) -> None:
    pip = sandbox.root / "opt/sprint/venv/bin/pip"
    pip.write_text('#!/bin/bash\ntouch "$SPRINT_ROOT/in-pip"; exec sleep 30\n')


def broken_pip(sandbox: Sandbox) -> None:
    (sandbox.root / "opt/sprint/venv/bin/pip").write_text("#!/bin/bash\necho no such index >&2; exit 1\n")


def spoilt_job(sandbox: Sandbox) -> None:
    sandbox.bucket.put(Keys(DEPLOYMENT).job, b'{"format": 1, "deployment": ')


def spoilt_code(sandbox: Sandbox) -> None:
    """Bytes of another archive under the pinned name."""
    sandbox.bucket.put(sandbox._variables["code_key"], b"another archive")


def ended_before(sandbox: Sandbox) -> None:
    end = End(status="finished", reason="all epochs", time=time.time())
    sandbox.bucket.put(Keys(DEPLOYMENT).end, end.to_json())


def began_too_often(sandbox: Sandbox) -> None:
    for number in range(12):
        event = Event(kind="started", time=time.time(), instance=f"i-{number}")
        sandbox.bucket.put(Keys(DEPLOYMENT).event(event.time, event.instance, "started"), event.to_json())


def left_too_often(sandbox: Sandbox) -> None:
    """Machines that came no further than installing."""
    for number in range(12):
        sandbox.bucket.put(Keys(DEPLOYMENT).node(f"i-{number}"), Node(instance=f"i-{number}").to_json())


def flaky_aws(sandbox: Sandbox) -> None:
    sandbox.fail(autoscaling_set_desired_capacity=3, s3_cp=1, sns_publish=1)


def no_rights(sandbox: Sandbox) -> None:
    sandbox.fail(autoscaling_set_desired_capacity=-1, autoscaling_suspend_processes=-1, sns_publish=-1)


def two_disks(sandbox: Sandbox) -> None:
    """Links as udev makes them, two to a disk, and to partitions."""
    ended_before(sandbox)
    links = sandbox.root / "dev/disk/by-id"
    links.mkdir(parents=True)
    for number in (1, 2):
        disk = sandbox.root / f"dev/nvme{number}n1"
        disk.touch()
        for name in (f"AWS{number}", f"AWS{number}_1", f"AWS{number}-part1"):
            (links / f"nvme-Amazon_EC2_NVMe_Instance_Storage_{name}").symlink_to(disk)
    (links / "nvme-Amazon_Elastic_Block_Store_vol0").symlink_to(sandbox.root / "dev/nvme0n1")
    labels = sandbox.root / "dev/disk/by-label"
    labels.mkdir()
    (labels / "sprint-data").symlink_to(sandbox.root / "dev/nvme1n1")


def mounted_by_the_image(sandbox: Sandbox) -> None:
    two_disks(sandbox)
    (sandbox.root / "dev/disk/by-label/sprint-data").unlink()
    (sandbox.root / "mounted").write_text(f"{sandbox.root}/opt/dlami/nvme\n")


def wheels(sandbox: Sandbox) -> None:
    """Wheels in the bucket, one of them not what its sum says."""
    sandbox.bucket.put("wheels/abc/one.whl", b"a wheel")
    sandbox.bucket.put("wheels/abc/SHA256SUMS", f"{'0' * 64}  one.whl\n".encode())


def image(sandbox: Sandbox) -> None:
    """The container's agent is what leaves the verdict."""
    docker = sandbox.root / "stubs/docker"
    verdict = (
        'if [ "$1" = run ]; then\n'
        '  printf "end\\nfinished\\nby the image\\n" >"$SPRINT_ROOT/run/sprint/verdict"\n'
        "fi\n"
    )
    docker.write_text(docker.read_text() + verdict)
    (sandbox.root / "gpus").write_text("GPU 0: NVIDIA L4 (UUID: GPU-0)\n")


SCENARIOS = {
    # First, since it takes its time however fast the others are.
    "deadline while training": Scenario([RESTART | {"until": "term"}], options={"seconds_left": 45}),
    "success": Scenario(),
    "success after restarts": Scenario([RESTART, {"code": 1}, RESTART, FINISHED], prepare=flaky_aws),
    "crash": Scenario([{"code": 1, "words": "error (rank 0): a bug"}]),
    "failed": Scenario([{"status": "failed", "reason": "too many damaged images", "code": 1}]),
    "taken over": Scenario(
        [{"status": "failed", "reason": "another machine goes on with this run: its mirror was taken over"}]
    ),
    "spot notice": Scenario([RESTART | {"until": "notice"}], meddle=noticed),
    "sigterm": Scenario([RESTART | {"until": "term"}], meddle=told),
    "sigterm while installing": Scenario(prepare=slow_pip, meddle=told_while_installing),
    "agent killed": Scenario([RESTART | {"until": "term"}], meddle=agent_killed),
    "script killed": Scenario([RESTART | {"until": "term"}], meddle=script_killed),
    "no packages": Scenario(prepare=broken_pip),
    "wrong code": Scenario(prepare=spoilt_code),
    "no data": Scenario(has_data=False),
    "check refuses": Scenario(prepare=write("check", "error: model.name: no such model\n")),
    "no gpu": Scenario(job={"ranks_per_node": "gpu"}),
    "unreadable job": Scenario(prepare=spoilt_job),
    "too late": Scenario(options={"seconds_left": -5}),
    "ended before": Scenario(prepare=ended_before),
    "boots for ever": Scenario(prepare=began_too_often),
    "installs for ever": Scenario(prepare=left_too_often),
    "no rights": Scenario(prepare=no_rights),
    "two disks": Scenario(prepare=two_disks),
    "mounted by the image": Scenario(prepare=mounted_by_the_image),
    "wrong wheels": Scenario(prepare=wheels, options={"wheels": "wheels/abc/"}),
    "image": Scenario(prepare=image, options={"image": "registry.example/imagenet-sprint:1"}),
    "fallback": Scenario(options={"group": FALLBACK_GROUP, "market": "on-demand"}),
}


@pytest.fixture(scope="module")
def code() -> tuple[bytes, str]:
    return pack_code()


@pytest.fixture(scope="module")
def few_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that is copied at once."""
    root = tmp_path_factory.mktemp("few")
    source = open_source(write_image_folder(root / "source", num_classes=2, num_train=6, num_val=3))
    prepare(source, PrepareOptions(out=root / "data", format="dali", num_workers=1, progress=False))
    return root / "data"


@pytest.fixture(scope="module")
def ended(
    moto_port: int,
    few_images: Path,
    code: tuple[bytes, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Sandbox]]:
    """All scenarios, run to their ends."""
    patch = pytest.MonkeyPatch()
    for name, value in (("AWS_ACCESS_KEY_ID", "dummy"), ("AWS_SECRET_ACCESS_KEY", SECRET)):
        patch.setenv(name, value)
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = FaultyS3(moto_port)
    archive, sha256 = code

    def play(name: str) -> Sandbox:
        scenario = SCENARIOS[name]
        bucket = Bucket(server, f"boot-{name.replace(' ', '-')}-{os.getpid()}")
        bucket.put(code_key(sha256), archive)
        if scenario.has_data:
            bucket.put_folder("data/small", few_images)
        options = dict(scenario.options)
        if "seconds_left" in options:
            options["deadline"] = int(time.time()) + options.pop("seconds_left")
        root = tmp_path_factory.mktemp(name.replace(" ", "-"))
        sandbox = Sandbox(root / "root", bucket, sha256, scenes=scenario.scenes, **options)
        sandbox.put_job(evaluate=False, **scenario.job)
        scenario.prepare(sandbox)
        try:
            if scenario.meddle is not noticed:
                sandbox.start()
            scenario.meddle(sandbox)
            if scenario.meddle is not noticed:
                sandbox.finish()
        except Exception as error:  # the tests of this scenario say what they miss
            sandbox.trouble = repr(error)
        finally:
            sandbox.kill()
        return sandbox

    with ThreadPoolExecutor(3) as pool:
        sandboxes = dict(zip(SCENARIOS, pool.map(play, SCENARIOS), strict=True))
    yield sandboxes
    server.close()
    patch.undo()


# Scenario → status of end.json, and words of its reason.
ENDINGS = {
    "success": ("finished", "3 of 3 epochs, top-1 75.00%"),
    "success after restarts": ("finished", "3 of 3 epochs"),
    "crash": ("failed", "died 3 times within an hour: exit code 1: error (rank 0): a bug"),
    "failed": ("failed", "too many damaged images"),
    "agent killed": ("failed", "while running the agent"),
    "script killed": ("failed", "main service died"),
    "no packages": ("failed", "while installing the project"),
    "wrong code": ("failed", "while fetching the code"),
    "no data": ("failed", "there is no data set at s3://"),
    "check refuses": ("failed", "the check refused it: model.name: no such model"),
    "no gpu": ("failed", "no GPU is visible"),
    "unreadable job": ("failed", "jobs/mine/job.json cannot be read"),
    "deadline while training": ("deadline", "max hours"),
    "too late": ("deadline", "max hours"),
    "ended before": ("finished", "all epochs"),
    "boots for ever": ("failed", "13 instances have begun within an hour"),
    "installs for ever": ("failed", "more than 11 instances have begun within an hour"),
    "wrong wheels": ("failed", "while installing the project"),
    "image": ("finished", "by the image"),
    "fallback": ("finished", "3 of 3 epochs"),
}


@pytest.mark.parametrize("name", [name for name in ENDINGS if name != "fallback"])
def test_billing_ends_and_the_reason_is_left(ended: dict[str, Sandbox], name: str) -> None:
    sandbox = ended[name]
    assert sandbox.billing_calls() == ENDED, sandbox.logs()
    end = read_record(End, sandbox.bucket.get(Keys(DEPLOYMENT).end))
    status, words = ENDINGS[name]
    assert end.status == status and words in end.reason, (end, sandbox.logs())
    (published,) = sandbox.calls("aws", "sns", "publish")
    assert TOPIC in published and any(word.startswith(f"{status}: ") for word in published), published


@pytest.mark.parametrize("name", ["spot notice", "sigterm", "sigterm while installing", "taken over"])
def test_a_machine_that_goes_leaves_the_capacity_alone(ended: dict[str, Sandbox], name: str) -> None:
    sandbox = ended[name]
    assert sandbox.billing_calls() == ["shutdown -h now"], sandbox.logs()
    assert f"{Keys(DEPLOYMENT).end}" not in sandbox.bucket.files(), "the deployment goes on elsewhere"
    assert sandbox.calls("aws", "sns") == []
    if name == "sigterm while installing":
        assert "told to stop" in sandbox.shipped_log("bootstrap"), "nobody would know why"
    else:
        assert sandbox.node()["phase"] == "interrupted"
        assert sandbox.events()[-1]["kind"] == "interrupted"


def test_a_spot_notice_lets_training_leave_by_itself(ended: dict[str, Sandbox]) -> None:
    kinds = [event["kind"] for event in ended["spot notice"].events()]
    assert kinds == ["started", "training", "notice", "interrupted"]
    assert "EC2 will terminate this machine at 2030-01-02" in ended["spot notice"].node()["detail"]


def test_starts_are_bounded_and_counted(ended: dict[str, Sandbox]) -> None:
    assert len(ended["crash"].calls("torchrun")) == 3
    assert [e["kind"] for e in ended["crash"].events()].count("died") == 3
    assert len(ended["failed"].calls("torchrun")) == 1, "what is wrong with the numbers stays wrong"
    assert len(ended["success after restarts"].calls("torchrun")) == 4
    times = [e["time"] for e in ended["success after restarts"].events() if e["kind"] == "training"]
    assert times[1] - times[0] > 1, "restarts that training asks for are a minute apart (here 1.2 s)"


def test_training_is_started_with_what_the_job_says(ended: dict[str, Sandbox]) -> None:
    sandbox = ended["success"]
    (call,) = sandbox.calls("torchrun")
    assert "--nproc-per-node=2" in call and "--standalone" in call
    data = next(word for word in call if word.startswith("data.path=")).removeprefix("data.path=")
    assert (
        data.startswith(f"{sandbox.root}/mnt/cache/data/small-") and (Path(data) / "manifest.json").exists()
    )
    assert f"checkpoint.mirror=s3://{sandbox.bucket.name}/runs" in call
    assert "run.name=mine" in call and "budget.usd_per_hour=1.5" in call


def test_records_tell_what_happened(ended: dict[str, Sandbox]) -> None:
    sandbox = ended["success"]
    assert [event["kind"] for event in sandbox.events()] == ["started", "training", "ended"]
    node = read_record(Node, sandbox.bucket.get(Keys(DEPLOYMENT).node("i-0001")))
    assert node.phase == "ended" and node.group == SPOT_GROUP and node.price_usd_per_hour == 1.5
    assert sandbox.end()["summary"] == {"final_top1": 0.75}
    assert set(sandbox.bucket.files(Keys(DEPLOYMENT).report)) >= {"summary.json", "status.json"}
    assert "torchrun" in sandbox.shipped_log("train")
    assert "verdict" not in sandbox.shipped_log("agent") and "training: start 1" in sandbox.shipped_log(
        "agent"
    )
    assert ended["failed"].node()["phase"] == "failed"


def test_what_broke_before_the_agent_is_in_the_log(ended: dict[str, Sandbox]) -> None:
    assert "no such index" in ended["no packages"].shipped_log("bootstrap")
    assert "FAILED" in ended["wrong code"].shipped_log("bootstrap")
    assert ended["wrong code"].calls("torchrun") == []


def test_sigterm_reaches_training_and_its_word_is_kept(ended: dict[str, Sandbox]) -> None:
    status = ended["sigterm"].bucket.get(f"{Keys(DEPLOYMENT).report}status.json")
    assert b"restart" in status
    assert ended["deadline while training"].bucket.get(f"{Keys(DEPLOYMENT).report}status.json")


def test_failures_of_aws_are_tried_again(ended: dict[str, Sandbox]) -> None:
    assert ended["success after restarts"].billing_calls() == ENDED


def test_without_any_right_the_machine_still_goes(ended: dict[str, Sandbox]) -> None:
    assert ended["no rights"].billing_calls() == ["shutdown -h now"]
    assert ended["no rights"].end()["status"] == "finished"


def test_the_fallback_sends_the_spot_market_home_at_once(ended: dict[str, Sandbox]) -> None:
    """Before it installs anything: until then, both markets are paid for."""
    sandbox = ended["fallback"]
    assert sandbox.billing_calls() == [f"0 {SPOT_GROUP}", *ENDED], sandbox.logs()
    names = [call[0] if call[0] != "aws" else call[2] for call in sandbox.calls()]
    code = next(i for i, call in enumerate(sandbox.calls()) if any("code/" in word for word in call))
    assert names.index("set-desired-capacity") < code < names.index("torchrun")


def test_the_instance_store_is_striped_and_mounted(ended: dict[str, Sandbox]) -> None:
    sandbox = ended["two disks"]
    root = str(sandbox.root)
    (made,) = sandbox.calls("mdadm")
    assert made[1:3] == ["--create", f"{root}/dev/md/sprint"] and "--raid-devices=2" in made
    assert made[-2:] == [f"{root}/dev/nvme1n1", f"{root}/dev/nvme2n1"], "the instance's disks, each once"
    assert sandbox.calls("mkfs.ext4")[0][-1] == f"{root}/dev/md/sprint"
    cache, data = sandbox.calls("mount")
    assert cache[-2:] == [f"{root}/dev/md/sprint", f"{root}/mnt/cache"]
    assert data == ["mount", "-o", "ro,noatime", f"{root}/dev/disk/by-label/sprint-data", f"{root}/mnt/data"]


def test_disks_that_the_machine_image_has_mounted_are_used_as_they_are(ended: dict[str, Sandbox]) -> None:
    sandbox = ended["mounted by the image"]
    root = str(sandbox.root)
    assert sandbox.calls("mdadm") == [] and sandbox.calls("mkfs.ext4") == []
    assert sandbox.calls("mount") == [
        ["mount", "--bind", f"{root}/opt/dlami/nvme/sprint", f"{root}/mnt/cache"]
    ]


def test_an_image_gets_the_pinned_code_and_the_gpus(ended: dict[str, Sandbox]) -> None:
    sandbox = ended["image"]
    pulled, started = sandbox.calls("docker")
    assert pulled[1] == "pull" and pulled[-1] == "registry.example/imagenet-sprint:1"
    assert started[-4:] == ["registry.example/imagenet-sprint:1", "python", "-m", "infra.node"]
    code = f"{sandbox.root}/opt/sprint/code"
    assert f"{code}:{code}" in started and "--gpus" in started and "--env=SPRINT_BUCKET" in started
    assert (sandbox.root / "opt/sprint/code/infra/node/agent.py").exists()
    assert not any("AWS_SECRET" in word for word in started)
    assert sandbox.calls("pip") == []


def test_nothing_secret_is_written_down(ended: dict[str, Sandbox]) -> None:
    for sandbox in ended.values():
        for prefix in ("jobs/", "logs/", "reports/"):
            for content in sandbox.bucket.files(prefix).values():
                assert SECRET.encode() not in content
        assert SECRET not in sandbox.logs()
