"""The agent's parts that live in S3, against moto: who trains together, what is shipped, what is left."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from infra.aws import Aws, AwsError
from infra.errors import UserError
from infra.layout import End, Job, Keys, Node
from infra.node import finish
from infra.node.group import Group, Rendezvous, Spare, Stopped
from infra.node.interrupts import Interrupts
from infra.node.metadata import Metadata
from infra.node.settings import Settings, Waits, read_settings
from infra.node.shipping import Shipper
from infra.node.staging import stage_data
from infra.node.store import Store
from infra.node.verdict import Ending, Verdict
from tests.integration.s3_server import Bucket

KEYS = Keys("mine")


@pytest.fixture
def store(bucket: Bucket) -> Store:
    return Store(Aws("us-east-1"), bucket.name)


def settings_of(tmp_path: Path, instance: str = "i-1", waits: Waits | None = None) -> Settings:
    environment = {
        "SPRINT_DEPLOYMENT": "mine",
        "SPRINT_BUCKET": "a-bucket",
        "SPRINT_ROOT": str(tmp_path / instance),
        "SPRINT_INSTANCE": instance,
        "SPRINT_ADDRESS": f"10.0.0.{instance[-1]}",
        "SPRINT_WAIT_SCALE": "0.01",
    }
    settings = read_settings(environment, Metadata({"AWS_EC2_METADATA_DISABLED": "true"}))
    # Seconds are what S3 counts ages in.
    waits = waits or Waits(group=0.05, stale=4, silent=4, alone=20, poll=0.02, s3=1, retry=0.05, ship=0.1)
    return Settings(**{**vars(settings), "waits": waits})


class Meeting:
    """Nodes that look for each other, a thread each."""

    def __init__(self, tmp_path: Path, store: Store, num_nodes: int = 2) -> None:
        self.tmp_path, self.store, self.num_nodes = tmp_path, store, num_nodes
        self.groups: dict[str, Group | Exception] = {}
        self.stop: str | None = None
        self.threads: list[threading.Thread] = []

    def rendezvous(self, instance: str, waits: Waits | None = None) -> Rendezvous:
        return Rendezvous(settings_of(self.tmp_path, instance, waits), self.store, self.num_nodes)

    def come(self, *instances: str) -> None:
        for instance in instances:
            thread = threading.Thread(target=self._join, args=(instance,))
            thread.start()
            self.threads.append(thread)

    def met(self) -> dict[str, Group | Exception]:
        for thread in self.threads:
            thread.join(60)
        return self.groups

    def alive(self, *instances: str, phase: Any = "training") -> None:
        for instance in instances:
            self.store.put(KEYS.node(instance), Node(instance=instance, phase=phase).to_json())

    def _join(self, instance: str) -> None:
        try:
            self.groups[instance] = self.rendezvous(instance).join(lambda: self.stop)
        except Exception as error:
            self.groups[instance] = error


@pytest.fixture
def meeting(tmp_path: Path, store: Store) -> Meeting:
    return Meeting(tmp_path, store)


def test_nodes_agree_on_who_they_are(tmp_path: Path, store: Store) -> None:
    meeting = Meeting(tmp_path, store, num_nodes=3)
    meeting.come("i-3", "i-1", "i-2")
    groups = list(meeting.met().values())
    assert groups[0] == groups[1] == groups[2] and isinstance(groups[0], Group)
    assert [one.instance for one in groups[0].participants] == ["i-1", "i-2", "i-3"]
    assert groups[0].leader == "10.0.0.1" and groups[0].generation == 0


def test_a_replacement_takes_the_place_of_a_node_that_left(meeting: Meeting) -> None:
    meeting.come("i-1", "i-2")
    meeting.met()
    meeting.alive("i-2")
    meeting.alive("i-1", phase="interrupted")
    meeting.come("i-3")  # finds the group broken, and moves it on
    deadline = time.monotonic() + 30
    while meeting.rendezvous("i-2").generation() == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    meeting.come("i-2")
    groups = meeting.met()
    assert groups["i-2"] == groups["i-3"] and groups["i-3"].generation == 1  # type: ignore[union-attr]


def test_a_node_too_many_does_not_break_a_group_that_works(meeting: Meeting) -> None:
    meeting.come("i-1", "i-2")
    meeting.met()
    meeting.alive("i-1", "i-2")
    waits = Waits(group=0.05, stale=4, silent=30, alone=1)
    with pytest.raises(Spare):
        meeting.rendezvous("i-3", waits).join(lambda: None)
    assert meeting.rendezvous("i-3").generation() == 0


def test_a_node_that_is_silent_is_lost(meeting: Meeting) -> None:
    meeting.come("i-1", "i-2")
    meeting.met()
    meeting.alive("i-1", "i-2")
    time.sleep(5.1)  # longer than `silent`, in the whole seconds of S3
    meeting.alive("i-2")
    meeting.come("i-3")
    time.sleep(0.5)
    assert meeting.rendezvous("i-3").generation() == 1
    meeting.come("i-2")
    assert meeting.met()["i-3"] == meeting.met()["i-2"]


def test_whoever_waited_and_died_is_not_counted(meeting: Meeting, store: Store) -> None:
    store.put(KEYS.participant(0, "i-0"), b'{"instance": "i-0", "address": "10.0.0.9"}')
    time.sleep(5.1)
    meeting.come("i-1", "i-2")
    groups = meeting.met()
    assert [one.instance for one in groups["i-1"].participants] == ["i-1", "i-2"]  # type: ignore[union-attr]


def test_an_agent_that_starts_again_does_not_join_the_group_it_was_in(meeting: Meeting) -> None:
    meeting.come("i-1", "i-2")
    meeting.met()
    meeting.come("i-1")
    time.sleep(0.5)
    assert meeting.rendezvous("i-1").generation() == 1
    meeting.come("i-2")
    assert meeting.met()["i-1"].generation == 1  # type: ignore[union-attr]


def test_nobody_waits_for_ever_and_everybody_can_be_stopped(meeting: Meeting) -> None:
    with pytest.raises(UserError, match="only 1 of 2 nodes came"):
        meeting.rendezvous("i-1", Waits(group=0.05, alone=0.5)).join(lambda: None)
    meeting.come("i-1")
    meeting.stop = "notice"
    assert isinstance(meeting.met()["i-1"], Stopped)


def test_the_generation_moves_once_however_many_say_so(meeting: Meeting) -> None:
    for generation in (0, 1):
        threads = [
            threading.Thread(target=meeting.rendezvous(f"i-{n}").move_on, args=(generation,))
            for n in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert meeting.rendezvous("i-1").generation() == generation + 1


def test_the_first_word_about_an_outcome_counts(meeting: Meeting) -> None:
    first, second = meeting.rendezvous("i-1"), meeting.rendezvous("i-2")
    assert first.outcome(0) is None
    first.publish(0, "failed", "the loss is not finite")
    second.publish(0, "restart", "another rank is gone")
    assert second.outcome(0) == first.outcome(0)
    assert first.outcome(0).reason == "the loss is not finite"  # type: ignore[union-attr]


def shipped(bucket: Bucket, instance: str = "i-1") -> str:
    pieces = bucket.files(f"{KEYS.logs}{instance}/")
    return b"".join(pieces[name] for name in sorted(pieces)).decode()


def test_logs_are_shipped_whole_in_pieces_and_after_a_new_start(
    tmp_path: Path, bucket: Bucket, store: Store
) -> None:
    settings = settings_of(tmp_path)
    settings.logs.mkdir(parents=True)
    log = settings.logs / "train.log"
    log.write_text("one\ntwo\nhalf a li")
    shipper = Shipper(settings, store)
    shipper.ship()
    assert shipped(bucket) == "one\ntwo\n", "lines come whole"
    log.write_text("one\ntwo\nhalf a line\nthree\nand the end")
    shipper.close()
    assert shipped(bucket) == log.read_text()
    again = Shipper(settings, store)
    log.write_text(log.read_text() + "\nfour\n")
    again.close()
    assert shipped(bucket) == log.read_text()


def test_faults_of_s3_lose_no_line_and_end_nothing(tmp_path: Path, bucket: Bucket, store: Store) -> None:
    settings = settings_of(tmp_path)
    settings.logs.mkdir(parents=True)
    bucket.server.clear(lambda asked: "403 AccessDenied" if asked.operation == "PutObject" else None)
    shipper = Shipper(settings, store)
    (settings.logs / "train.log").write_text("one\n")
    shipper.phase("training")
    shipper.event("training")
    shipper.ship()
    assert shipped(bucket) == ""
    bucket.server.clear()
    shipper.close()
    assert shipped(bucket) == "one\n"
    assert json.loads(bucket.get(KEYS.node("i-1")))["phase"] == "training"


def test_figures_are_live(tmp_path: Path, bucket: Bucket, store: Store) -> None:
    settings = settings_of(tmp_path)
    settings.run.mkdir(parents=True)
    (settings.run / "metrics.jsonl").write_text('{"step": 1}\n')
    shipper = Shipper(settings, store)
    shipper.ship()
    assert bucket.get(f"{KEYS.report}metrics.jsonl") == b'{"step": 1}\n'
    bucket.server.clear()
    shipper.ship()
    assert not bucket.server.uploaded("metrics.jsonl"), "not again where nothing has changed"
    shipper.ships_figures = False
    (settings.run / "metrics.jsonl").write_text("of a node without the run\n")
    shipper.close()
    assert bucket.get(f"{KEYS.report}metrics.jsonl") == b'{"step": 1}\n'


@pytest.fixture
def interrupts(tmp_path: Path, store: Store) -> Any:
    settings = settings_of(tmp_path)
    settings.logs.mkdir(parents=True)
    shipper = Shipper(settings, store)
    made = Interrupts(settings, Metadata({"AWS_EC2_METADATA_DISABLED": "true"}), shipper)
    yield made
    made.close()
    shipper.close()


def test_s3_may_be_away_for_a_while_but_not_for_ever(
    interrupts: Interrupts, bucket: Bucket, store: Store
) -> None:
    store.put("key", b"content")
    count = [0]

    def rule(asked: Any) -> str | None:
        count[0] += 1
        return "drop" if count[0] < 8 else None

    bucket.server.clear(rule)
    assert interrupts.patiently(lambda: store.get("key")) == b"content"
    bucket.server.clear(lambda asked: "503 SlowDown")
    with pytest.raises(AwsError):
        interrupts.patiently(lambda: store.get("key"))
    bucket.server.clear(lambda asked: "403 AccessDenied")
    began = len(bucket.server.asked)
    with pytest.raises(AwsError, match="may not do"):
        interrupts.patiently(lambda: store.get("key"))
    assert len(bucket.server.asked) - began <= 2, "what is denied stays denied"


def test_waits_end_for_a_reason(interrupts: Interrupts) -> None:
    interrupts.pause(0.05)
    interrupts.deadline = time.time() + 1  # less than what the agent keeps before it
    with pytest.raises(Ending) as ending:
        interrupts.pause(60)
    assert ending.value.verdict.action == "end" and ending.value.verdict.status == "deadline"
    interrupts.on_signal(15, None)
    with pytest.raises(Ending) as ending:
        interrupts.pause(60)
    assert ending.value.verdict.action == "leave"


def test_end_json_is_written_once(tmp_path: Path, bucket: Bucket, store: Store) -> None:
    settings = settings_of(tmp_path)
    finish.write_end(settings, store, "finished", "all epochs", {"final_top1": 0.5})
    finish.write_end(settings, store, "failed", "a second word", None)
    end = End.model_validate_json(bucket.get(KEYS.end))
    assert end.status == "finished" and end.summary == {"final_top1": 0.5}
    bucket.server.clear(lambda asked: "403 AccessDenied")
    finish.write_end(settings, store, "failed", "S3 refuses", None)  # says so, and billing ends all the same


def test_a_report_that_fails_or_hangs_hurts_nobody(
    tmp_path: Path, store: Store, interrupts: Interrupts, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path, waits=Waits(evaluation=0.3, stop=0.3, poll=0.02, ship=0.1))
    shipper = Shipper(settings, store)
    job = Job(deployment="mine", bucket="a-bucket", deadline=0)
    for script, expected in (("sleep 60", "timeout"), ("echo error: no disk; exit 1", "error: no disk")):
        monkeypatch.setattr("infra.node.commands.report_command", lambda *_, s=script: ["bash", "-c", s])
        assert finish.evaluate(job, settings, interrupts, shipper, tmp_path) == expected
    monkeypatch.setattr("infra.node.commands.report_command", lambda *_: ["true"])
    assert finish.evaluate(job, settings, interrupts, shipper, tmp_path) is None
    shipper.close()


def test_only_plain_files_of_the_report_are_uploaded(tmp_path: Path, bucket: Bucket, store: Store) -> None:
    settings = settings_of(tmp_path)
    report = settings.run / "report"
    (report / "images").mkdir(parents=True)
    (report / "index.html").write_text("<html>")
    (report / "images/one.png").write_bytes(b"png")
    (report / "link").symlink_to("/etc/passwd")
    (settings.run / "summary.json").write_text("{}")
    finish.upload_report(settings, store)
    assert set(bucket.files(KEYS.report)) == {"index.html", "images/one.png", "summary.json"}


def test_another_version_of_the_data_is_refused(tmp_path: Path, bucket: Bucket) -> None:
    bucket.put("data/x/manifest.json", b"{}")
    job = Job(deployment="mine", bucket=bucket.name, deadline=0, data=bucket.at("data/x"))
    other = job.model_copy(update={"data_manifest_sha256": "0" * 64})
    with pytest.raises(ValueError, match="is not the version that was planned with"):
        stage_data(other, settings_of(tmp_path), lambda words: pytest.fail("copied"), lambda seconds: None)
    gone = job.model_copy(update={"data": bucket.at("data/none")})
    with pytest.raises(ValueError, match="there is no data set at"):
        stage_data(gone, settings_of(tmp_path), lambda words: pytest.fail("copied"), lambda seconds: None)


def test_a_verdict_is_three_lines_whatever_the_reason(tmp_path: Path) -> None:
    Verdict("end", "failed", "two\nlines\x00 " + "x" * 5000).write(tmp_path / "run/verdict")
    lines = (tmp_path / "run/verdict").read_text().split("\n")
    assert lines[:2] == ["end", "failed"] and len(lines) == 4 and len(lines[2]) <= 500
    Verdict("leave", "interrupted", "").write(tmp_path / "run/verdict")
    assert (tmp_path / "run/verdict").read_text() == "leave\ninterrupted\nno reason\n"
