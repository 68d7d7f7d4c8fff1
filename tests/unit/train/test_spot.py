"""Notices of the spot market, from a metadata service on this machine."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.fake_imds import (
    INTERRUPTION_PATH,
    REBALANCE_PATH,
    TOKEN_PATH,
    FakeMetadata,
)
from train.preemption import spot
from train.preemption.spot import Notice, NoticeWatcher, is_ec2, metadata_endpoint

POLL_SECONDS = 0.02


@pytest.fixture
def imds(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMetadata]:
    with FakeMetadata() as fake:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", fake.url)
        monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
        # Whoever obeyed these would find nobody.
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        yield fake


@pytest.fixture
def notices() -> list[Notice]:
    return []


@pytest.fixture
def watch(notices: list[Notice]) -> Iterator[Callable[..., NoticeWatcher]]:
    watchers = []

    def start(**more: object) -> NoticeWatcher:
        watchers.append(NoticeWatcher(POLL_SECONDS, notices.append, **more))  # type: ignore[arg-type]
        return watchers[-1]

    yield start
    for watcher in watchers:
        watcher.close()


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_notice_is_reported_once(
    imds: FakeMetadata, watch: Callable[..., NoticeWatcher], notices: list[Notice]
) -> None:
    watch()
    imds.wait_for(3)
    assert notices == []
    imds.interrupt("terminate", "2030-01-02T03:04:05Z")
    imds.wait_for(4)
    moment = datetime.datetime(2030, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    words = "EC2 will terminate this machine at 2030-01-02T03:04:05Z"
    assert notices == [Notice("interruption", words, moment)]
    imds.recommend()
    imds.wait_for(4)
    assert [(notice.kind, notice.is_old) for notice in notices[1:]] == [("rebalance", False)]
    # One token was enough for all of them.
    assert [asked for asked in imds.asked if asked[1] == TOKEN_PATH] == [("PUT", TOKEN_PATH, 200)]


def test_what_stood_there_before(
    imds: FakeMetadata, watch: Callable[..., NoticeWatcher], notices: list[Notice]
) -> None:
    imds.recommend("2020-01-02T03:00:00Z")
    imds.interrupt("stop", "2020-01-02T03:00:00Z")
    watch()
    imds.wait_for(3)
    # An interruption is acted on whatever its time; to leave for the recommendation again would not end.
    assert [(notice.kind, notice.is_old) for notice in notices] == [
        ("interruption", False),
        ("rebalance", True),
    ]
    imds.recommend("2020-01-02T04:00:00Z")  # and then another one
    imds.wait_for(3)
    assert [(notice.kind, notice.is_old) for notice in notices[2:]] == [("rebalance", False)]


def test_a_recommendation_of_the_first_seconds_is_new(
    imds: FakeMetadata, watch: Callable[..., NoticeWatcher], notices: list[Notice]
) -> None:
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30)
    imds.recommend(later.strftime("%Y-%m-%dT%H:%M:%SZ"))
    watch()
    imds.wait_for(2)
    assert [(notice.kind, notice.is_old) for notice in notices] == [("rebalance", False)]


def test_a_token_that_ended_is_renewed(
    imds: FakeMetadata, watch: Callable[..., NoticeWatcher], notices: list[Notice]
) -> None:
    watch()
    imds.wait_for(2)
    imds.forget_tokens()
    imds.interrupt()
    wait_until(lambda: len(notices) == 1)
    assert any(status == 401 for _, _, status in imds.asked)


def test_a_token_is_renewed_before_it_ends(
    imds: FakeMetadata,
    watch: Callable[..., NoticeWatcher],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spot, "TOKEN_SECONDS", 1)
    watch()
    imds.wait_for(3, TOKEN_PATH)
    assert all(status != 401 for _, _, status in imds.asked)


@pytest.mark.parametrize("fault", [500, 503, 302, "hang", "garbage", "huge", "drop"])
def test_faults_are_waited_through(
    imds: FakeMetadata,
    watch: Callable[..., NoticeWatcher],
    notices: list[Notice],
    monkeypatch: pytest.MonkeyPatch,
    fault: int | str,
) -> None:
    monkeypatch.setattr(spot, "ANSWER_SECONDS", 0.1)
    watcher = watch()
    imds.wait_for(1)
    imds.fault = fault
    time.sleep(0.5)
    imds.interrupt()
    time.sleep(0.2)
    assert notices == []
    imds.fault = None
    wait_until(lambda: len(notices) == 1)
    assert watcher.is_watching


def test_a_fault_of_one_question_does_not_hide_the_other(
    imds: FakeMetadata, watch: Callable[..., NoticeWatcher], notices: list[Notice]
) -> None:
    imds.notices[INTERRUPTION_PATH] = {"action": "dance"}
    imds.notices[REBALANCE_PATH] = {"noticeTime": "2030-01-02T03:00:00Z"}
    watch()
    imds.wait_for(2)
    assert [notice.kind for notice in notices] == ["rebalance"]


def test_an_error_of_whoever_is_told_does_no_harm(imds: FakeMetadata) -> None:
    told = []

    def fail(notice: Notice) -> None:
        told.append(notice)
        raise ZeroDivisionError

    watcher = NoticeWatcher(POLL_SECONDS, fail)
    imds.interrupt()
    wait_until(lambda: len(told) == 1)
    imds.recommend()
    wait_until(lambda: len(told) == 2)
    assert watcher.is_watching
    watcher.close()
    wait_until(lambda: not watcher.is_watching)


@pytest.mark.parametrize(("fault", "words"), [("drop", "does not answer"), (403, "switched off")])
def test_nobody_there_is_not_asked_for_ever(
    imds: FakeMetadata, watch: Callable[..., NoticeWatcher], fault: int | str, words: str
) -> None:
    said: list[str] = []
    imds.fault = fault
    watcher = watch(on_fault=said.append)
    wait_until(lambda: not watcher.is_watching)
    assert len(said) == 1 and words in said[0]


def test_a_service_that_begins_with_errors_is_asked_on(
    imds: FakeMetadata, watch: Callable[..., NoticeWatcher], notices: list[Notice]
) -> None:
    imds.fault = 500
    watch()
    imds.wait_for(3 * spot.FIRST_TRIES, TOKEN_PATH)
    imds.fault = None
    imds.interrupt()
    wait_until(lambda: len(notices) == 1)


def machine(root: Path, name: str, content: str) -> Path:
    path = root / "sys" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    return root


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("class/dmi/id/sys_vendor", "Amazon EC2\n", True),
        ("class/dmi/id/bios_vendor", "Amazon EC2\n", True),
        ("hypervisor/uuid", "ec2e1916-9099-7caf-fd21-012345abcdef\n", True),
        ("class/dmi/id/product_uuid", "EC2E1916-9099-7CAF-FD21-012345ABCDEF\n", True),
        ("class/dmi/id/sys_vendor", "Google\n", False),
        ("hypervisor/uuid", "4c4c4544-0037-ec20\n", False),
    ],
)
def test_only_ec2_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, expected: bool
) -> None:
    for variable in ("", "_MODE"):
        monkeypatch.delenv(f"AWS_EC2_METADATA_SERVICE_ENDPOINT{variable}", raising=False)
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    root = machine(tmp_path, name, content)
    assert is_ec2(root) == expected
    assert metadata_endpoint(root) == ("http://169.254.169.254" if expected else None)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "True")
    assert metadata_endpoint(root) is None
    assert not NoticeWatcher(POLL_SECONDS, lambda notice: None, root=root).is_watching
