"""Stopping in good order, whoever asks for it: signals, the spot market, a budget, a rank that hangs."""

from train.preemption.stop_flag import (
    BUDGET,
    READ_AFTER_STEPS,
    REBALANCE,
    SPOILT,
    SPOT,
    TAKEN_OVER,
    StopFlag,
)

__all__ = ["BUDGET", "READ_AFTER_STEPS", "REBALANCE", "SPOILT", "SPOT", "TAKEN_OVER", "StopFlag"]
