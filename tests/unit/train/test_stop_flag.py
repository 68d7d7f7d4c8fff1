"""The flag of one rank; what ranks agree on is tested with real ones."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest
import torch

from train.distributed import Ranks
from train.preemption import BUDGET, READ_AFTER_STEPS, REBALANCE, SPOT, StopFlag, stop_flag
from train.preemption.stop_flag import SIGNALS, TERMINATE

NO = torch.tensor(False)


@pytest.fixture
def stop() -> StopFlag:
    return StopFlag(Ranks(0, 1, 0, 1, torch.device("cpu"), 1))


def agreed(stop: StopFlag) -> str | None:
    for _ in range(READ_AFTER_STEPS):
        stop.agree(NO)
    return stop.agree(NO).reason


def test_the_gravest_reason_wins(stop: StopFlag) -> None:
    assert agreed(stop) is None and stop.reason is None
    stop.raise_for(SPOT)
    stop.raise_for(REBALANCE)
    assert stop.reason == "spot interruption notice" == agreed(stop)
    stop.raise_for(BUDGET)
    assert agreed(stop) == "budget"


def test_saving_is_no_stop_and_happens_once(stop: StopFlag) -> None:
    stop.ask_for_save()
    assert not stop.is_raised and stop.reason is None
    answers = [stop.agree(NO) for _ in range(6)]
    assert [answer.save for answer in answers] == [False, False, True, False, False, False]
    assert all(answer.reason is None for answer in answers)
    stop.ask_for_save()
    stop.raise_for(TERMINATE)
    assert agreed(stop) == "SIGTERM" == stop.settle()


def test_where_steps_are_slow_the_answer_comes_at_once(
    stop: StopFlag, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_flag, "SLOW_STEP_SECONDS", 0.0)
    stop.agree(NO)
    stop.raise_for(TERMINATE)
    answers = [stop.agree(NO).reason for _ in range(4)]
    # The first two steps have told all ranks that steps are slow; until then it takes them.
    assert answers == [None, "SIGTERM", "SIGTERM", "SIGTERM"]


def test_no_reason_gets_lost_between_threads(stop: StopFlag) -> None:
    threads = [
        threading.Thread(target=lambda code=code: [stop.raise_for(code) for _ in range(1000)])
        for code in range(REBALANCE, SPOT + 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(stop._is_asked[REBALANCE : SPOT + 1])


@pytest.fixture
def handlers() -> Iterator[None]:
    """What the test installs goes with it."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("signals", "words"),
    [
        ([signal.SIGUSR1], "SIGUSR1"),
        ([signal.SIGUSR1, signal.SIGHUP], "SIGHUP"),
        ([signal.SIGTERM, signal.SIGINT], "SIGTERM"),
    ],
)
def test_signals(handlers: None, stop: StopFlag, signals: list[signal.Signals], words: str) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stop.install()
    for number in signals:
        signal.raise_signal(number)
    assert stop.reason == words == agreed(stop)


def test_a_second_ctrl_c_ends_at_once_whatever_came_before(handlers: None, stop: StopFlag) -> None:
    stop.install()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_nohup_is_respected(handlers: None, stop: StopFlag) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop.install()
    signal.raise_signal(signal.SIGHUP)
    assert not stop.is_raised
