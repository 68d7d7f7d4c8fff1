"""Stopping in good order: a signal raises a flag, ranks agree on it, the loop acts at the same step.

The agreement is a reduction launched in every step and read a fixed number of steps later, so that no step
waits for it.

Example:
    >>> stop = StopFlag(ranks)
    >>> stop.install()
    >>> for step in range(num_steps):
    ...     reason = stop.agree(gave_up)
    ...     if reason is not None: break
"""

from __future__ import annotations

import signal
from collections import deque
from types import FrameType

import torch
import torch.distributed as dist

from train.distributed import Ranks

READ_AFTER_STEPS = 2

# A number travels; all ranks know its meaning, and the largest wins.
SAVE, REBALANCE, USER_SIGNAL, HANG_UP, INTERRUPT, TERMINATE, SPOT, BUDGET, TAKEN_OVER, NON_FINITE = range(
    1, 11
)
REASONS = {
    SAVE: "save and go on",
    REBALANCE: "rebalance recommendation",
    USER_SIGNAL: "SIGUSR1",
    HANG_UP: "SIGHUP",
    INTERRUPT: "SIGINT",
    TERMINATE: "SIGTERM",
    SPOT: "spot interruption notice",
    BUDGET: "budget",
    TAKEN_OVER: "taken over",
    NON_FINITE: "non-finite loss",
}
SIGNALS = {
    signal.SIGUSR1: USER_SIGNAL,
    signal.SIGHUP: HANG_UP,  # torchrun passes it on when its terminal closes
    signal.SIGINT: INTERRUPT,
    signal.SIGTERM: TERMINATE,
}

Pending = tuple[torch.Tensor, "dist.Work | torch.cuda.Event | None"]


class StopFlag:
    """The flag of this rank and its agreed value."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        # A place a reason: a signal may come while a thread raises another one, and neither may get lost.
        self._is_asked = [False] * (NON_FINITE + 1)
        self._pending: deque[Pending] = deque()

    @property
    def _raised(self) -> int:
        return max(code for code, is_asked in enumerate(self._is_asked) if is_asked or code == 0)

    @property
    def is_raised(self) -> bool:
        """Whether this rank was asked to stop; others may not know yet."""
        return self._raised > SAVE

    @property
    def reason(self) -> str | None:
        """Why this rank was asked to stop."""
        return REASONS[self._raised] if self.is_raised else None

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
        """Ask all ranks to stop (to save, with SAVE), for one of REASONS; one rank is enough.

        From any thread, and from signal handlers.
        """
        self._is_asked[reason] = True

    def take_back(self, reason: int) -> None:
        """It was acted on, and training goes on; call it on every rank at the same step, after `drain`."""
        self._is_asked[reason] = False

    def agree(self, gave_up: torch.Tensor) -> str | None:
        """Call once a step on every rank; the reason to stop, on all ranks at the same step, or None.

        Args:
            gave_up: whether too many steps were skipped: bool, 0-dimensional on the device.
        """
        self._pending.append(self._launch(gave_up))
        if len(self._pending) <= READ_AFTER_STEPS:
            return None
        return REASONS.get(_read(self._pending.popleft()))

    def _launch(self, gave_up: torch.Tensor) -> Pending:
        # Decided on the device: asking the host about the loss would stall the step.
        raised = torch.full_like(gave_up, self._raised, dtype=torch.int32)
        flag = torch.where(gave_up, NON_FINITE, raised).reshape(1)
        if self._ranks.device.type != "cuda":
            several = self._ranks.world_size > 1
            return flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True) if several else None
        if self._ranks.world_size > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        on_host = torch.empty(1, dtype=torch.int32, pin_memory=True)
        on_host.copy_(flag, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return on_host, event

    def drain(self) -> str | None:
        """Read all that is under way; the gravest reason among it, or None."""
        codes = [_read(pending) for pending in self._pending]
        self._pending.clear()
        return REASONS.get(max(codes, default=0))


def _read(pending: Pending) -> int:
    flag, done = pending
    if isinstance(done, torch.cuda.Event):
        done.synchronize()
    elif done is not None:
        done.wait()
    return int(flag.item())
