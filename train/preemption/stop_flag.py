"""Stopping in good order: a signal raises a flag, ranks agree on it, the loop acts at the same step.

The agreement is a reduction launched in every step and read a fixed number of steps later, so that no step
waits for it; where steps are slow, at once.

Example:
    >>> stop = StopFlag(ranks)
    >>> stop.install()
    >>> for step in range(num_steps):
    ...     if stop.agree(gave_up).reason is not None: break
"""

from __future__ import annotations

import signal
import time
from collections import deque
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist

from train.distributed import Ranks

READ_AFTER_STEPS = 2
SLOW_STEP_SECONDS = (
    1.0  # waiting for the reduction costs such a step nothing, and two steps more a stop too much
)

# A number travels; all ranks know its meaning, and the largest wins.
REBALANCE, USER_SIGNAL, HANG_UP, INTERRUPT, TERMINATE, SPOT, BUDGET, TAKEN_OVER, SPOILT, NON_FINITE = range(
    1, 11
)
REASONS = {
    REBALANCE: "rebalance recommendation",
    USER_SIGNAL: "SIGUSR1",
    HANG_UP: "SIGHUP",
    INTERRUPT: "SIGINT",
    TERMINATE: "SIGTERM",
    SPOT: "spot interruption notice",
    BUDGET: "budget",
    TAKEN_OVER: "taken over",
    SPOILT: "spoilt weights",
    NON_FINITE: "non-finite loss",
}
CODES = {words: number for number, words in REASONS.items()}
SIGNALS = {
    signal.SIGUSR1: USER_SIGNAL,
    signal.SIGHUP: HANG_UP,  # torchrun passes it on when its terminal closes
    signal.SIGINT: INTERRUPT,
    signal.SIGTERM: TERMINATE,
}

Pending = tuple[torch.Tensor, "dist.Work | torch.cuda.Event | None"]


class Agreed(NamedTuple):
    """What all ranks do after a step: stop for a reason, save, or neither."""

    reason: str | None
    save: bool
    is_slow: bool = False  # some rank's step took long


class StopFlag:
    """The flag of this rank and its agreed value."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        # A place a reason: a signal may come while a thread raises another one, and neither may get lost.
        self._is_asked = [False] * (NON_FINITE + 1)
        self._wants_save = False
        self._is_slow = False  # the same on all ranks
        self._last_call = time.monotonic()
        self._pending: deque[Pending] = deque()

    @property
    def _raised(self) -> int:
        return max(code for code, is_asked in enumerate(self._is_asked) if is_asked or code == 0)

    @property
    def is_raised(self) -> bool:
        """Whether this rank was asked to stop; others may not know yet."""
        return self._raised > 0

    @property
    def reason(self) -> str | None:
        """Why this rank was asked to stop."""
        return REASONS.get(self._raised)

    def install(self) -> None:
        """Raise the flag on SIGTERM, SIGUSR1, SIGHUP and SIGINT; a second SIGINT ends the process at once."""
        for number in SIGNALS:
            # Under `nohup` a closed terminal is meant to change nothing.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._is_asked[INTERRUPT]:
            raise KeyboardInterrupt
        self.raise_for(SIGNALS[signal.Signals(number)])

    def raise_for(self, reason: int) -> None:
        """Ask all ranks to stop, for one of REASONS; one rank is enough.

        From any thread, and from signal handlers.
        """
        self._is_asked[reason] = True

    def ask_for_save(self) -> None:
        """Ask all ranks for a checkpoint between two steps; one rank is enough. From any thread."""
        self._wants_save = True

    def agree(self, gave_up: torch.Tensor) -> Agreed:
        """Call once a step on every rank; what to do now, the same on all ranks at the same step.

        Args:
            gave_up: whether too many steps were skipped: bool, 0-dimensional on the device.
        """
        self._pending.append(self._launch(gave_up))
        agreed = Agreed(None, False)
        while len(self._pending) > (0 if self._is_slow else READ_AFTER_STEPS):
            read = _read(self._pending.popleft())
            self._is_slow = read.is_slow
            agreed = Agreed(_graver(agreed.reason, read.reason), agreed.save or read.save)
        return agreed

    def _launch(self, gave_up: torch.Tensor) -> Pending:
        wants_save = self._wants_save
        if wants_save:  # else a thread may be asking at this very moment
            self._wants_save = False
        now = time.monotonic()
        is_slow, self._last_call = now - self._last_call > SLOW_STEP_SECONDS, now
        asked = torch.tensor([self._raised, int(wants_save), int(is_slow)], dtype=torch.int32)
        if self._ranks.device.type != "cuda":
            if gave_up:
                asked[0] = NON_FINITE
            several = self._ranks.world_size > 1
            return asked, dist.all_reduce(asked, dist.ReduceOp.MAX, async_op=True) if several else None
        # Decided on the device: asking the host about the loss would stall the step.
        flags = asked.pin_memory().to(self._ranks.device, non_blocking=True)
        flags[0] = torch.where(gave_up, NON_FINITE, flags[0])
        if self._ranks.world_size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        on_host = torch.empty(3, dtype=torch.int32, pin_memory=True)
        on_host.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return on_host, event

    def settle(self) -> str | None:
        """Agree here and now, which waits for all ranks: between two batches of a validation, say."""
        self._pending.append(self._launch(torch.zeros((), dtype=torch.bool, device=self._ranks.device)))
        return self.drain()

    def drain(self) -> str | None:
        """Read all that is under way; the gravest reason among it, or None."""
        reason: str | None = None
        while self._pending:
            reason = _graver(reason, _read(self._pending.popleft()).reason)
        return reason


def _read(pending: Pending) -> Agreed:
    flags, done = pending
    if isinstance(done, torch.cuda.Event):
        done.synchronize()
    elif done is not None:
        done.wait()
    reason, wants_save, is_slow = flags.tolist()
    return Agreed(REASONS.get(reason), wants_save > 0, is_slow > 0)


def _graver(first: str | None, second: str | None) -> str | None:
    return max(first, second, key=lambda reason: CODES.get(reason or "", 0))
