"""Stopping in good order, whoever asks for it: signals, the spot market, a budget, a rank that hangs."""

from train.preemption.heartbeat import Heartbeat, end_hung_job
from train.preemption.parent import stop_with_parent
from train.preemption.spot import Notice, NoticeWatcher
from train.preemption.stop_flag import (
    BUDGET,
    READ_AFTER_STEPS,
    REASONS,
    REBALANCE,
    SPOILT,
    SPOT,
    TAKEN_OVER,
    StopFlag,
)
from train.preemption.watching import watched

__all__ = [
    "BUDGET",
    "READ_AFTER_STEPS",
    "REASONS",
    "REBALANCE",
    "SPOILT",
    "SPOT",
    "TAKEN_OVER",
    "Heartbeat",
    "Notice",
    "NoticeWatcher",
    "StopFlag",
    "end_hung_job",
    "stop_with_parent",
    "watched",
]
