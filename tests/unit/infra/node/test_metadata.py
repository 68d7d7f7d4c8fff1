"""The metadata service, real HTTP against a fake that insists on tokens and fails as told."""

from __future__ import annotations

import threading

import pytest

from infra.node.metadata import Metadata, NoticeWatch
from tests.integration.fake_imds import INTERRUPTION_PATH, FakeMetadata


def metadata_of(fake: FakeMetadata) -> Metadata:
    return Metadata({"AWS_EC2_METADATA_SERVICE_ENDPOINT": fake.url})


def test_a_notice_is_seen_once_and_only_when_it_is_there() -> None:
    seen: list[str] = []
    came = threading.Event()

    def note(words: str) -> None:
        seen.append(words)
        came.set()

    with FakeMetadata() as fake:
        assert metadata_of(fake).interruption() is None
        watch = NoticeWatch(metadata_of(fake), 0.01, note)
        fake.wait_for(3, INTERRUPTION_PATH)
        assert seen == []
        fake.interrupt("stop")
        assert came.wait(20)
        watch.close()
        assert seen == ["EC2 will stop this machine at 2030-01-02T03:04:05Z"] and watch.notice == seen[0]


def test_tokens_are_renewed() -> None:
    with FakeMetadata() as fake:
        metadata = metadata_of(fake)
        fake.interrupt()
        assert metadata.interruption()
        fake.forget_tokens()
        assert metadata.interruption()


@pytest.mark.parametrize("fault", [500, 403, "garbage", "huge", "drop"])
def test_no_fault_of_the_service_is_a_notice_or_an_error(fault: int | str) -> None:
    with FakeMetadata() as fake:
        metadata = metadata_of(fake)
        fake.interrupt()
        assert metadata.interruption()
        fake.fault = fault
        assert metadata.interruption() is None
        fake.fault = None
        assert metadata.interruption()


def test_words_that_are_not_ec2s_are_no_notice() -> None:
    with FakeMetadata() as fake:
        for answer in ({"action": "dance"}, {"time": "now"}, {"action": ["terminate"]}):
            fake.notices[INTERRUPTION_PATH] = answer
            assert metadata_of(fake).interruption() is None


def test_away_from_ec2_and_switched_off_nothing_is_asked() -> None:
    with FakeMetadata() as fake:
        environment = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": fake.url, "AWS_EC2_METADATA_DISABLED": "TRUE"}
        assert Metadata(environment).text("instance-id") is None and fake.asked == []
