"""What may end the agent's work at any moment: SIGTERM, a spot notice, the deadline; and how it waits.

Example:
    >>> interrupts.patiently(lambda: store.get("jobs/mine/job.json"))   # S3 may be away for ten minutes
    >>> interrupts.pause(60)                                            # raises Ending when there is a reason
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from infra.aws import AwsError
from infra.node.metadata import Metadata, NoticeWatch
from infra.node.process import Ended, supervise
from infra.node.settings import Settings
from infra.node.shipping import Shipper
from infra.node.verdict import Ending, Verdict, leaving

Result = TypeVar("Result")
FINAL = ("AccessDenied", "AccessDeniedException", "NoSuchBucket", "InvalidAccessKeyId")

say = logging.getLogger(__name__)


class Interrupts:
    """Reasons to stop, looked at by whoever waits.

    Attributes:
        deadline: epoch seconds at which everything has ended; the agent stops somewhat earlier.
        notice: what the spot market said, None as long as it says nothing.
    """

    def __init__(self, settings: Settings, metadata: Metadata, shipper: Shipper) -> None:
        self._settings, self._shipper = settings, shipper
        self.deadline = settings.deadline
        self.notice: str | None = None
        self._notice_at = 0.0
        self._signalled = False
        self._watch = NoticeWatch(metadata, settings.waits.notice, self._on_notice)

    def on_signal(self, number: int, frame: object) -> None:
        """The handler of SIGTERM: the machine shuts down, or somebody stops the service."""
        self._signalled = True

    def close(self) -> None:
        self._watch.close()

    def reason(self, may_leave_itself: bool = False) -> str | None:
        """`signal`, `deadline` or `notice`; else None.

        Args:
            may_leave_itself: for training, which sees a notice, saves and leaves; it has some time for that.
        """
        if self._signalled:
            return "signal"
        if time.time() > self.deadline - self._settings.waits.before_deadline:
            return "deadline"
        grace = self._settings.waits.notice_grace if may_leave_itself else 0.0
        if self.notice is not None and time.monotonic() - self._notice_at >= grace:
            return "notice"
        return None

    def raise_for(self) -> None:
        """Raise Ending where there is a reason."""
        if self._signalled:
            raise leaving("stopped by a signal: the machine shuts down")
        if self.notice is not None:
            raise leaving(self.notice)
        if self.reason() == "deadline":
            raise Ending(Verdict("end", "deadline", "the deadline (max hours) is reached"))

    def pause(self, seconds: float) -> None:
        """Sleep; raises Ending as soon as there is a reason."""
        until = time.monotonic() + seconds
        while True:
            self.raise_for()
            left = until - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, self._settings.waits.poll))

    def patiently(self, action: Callable[[], Result]) -> Result:
        """Do what cannot be done without; S3 may be away for some minutes.

        Raises:
            AwsError: it is refused, or S3 has been away for too long. Ending: there is a reason to stop.
        """
        until = time.monotonic() + self._settings.waits.s3
        while True:
            try:
                return action()
            except AwsError as error:
                if error.code in FINAL or time.monotonic() > until:
                    raise
                say.warning("%s; trying again", error)
            self.pause(self._settings.waits.retry)

    def run(
        self,
        command: Sequence[str],
        name: str,
        environment: Mapping[str, str],
        stop_for: Callable[[], str | None] | None = None,
        timeout_seconds: float = float("inf"),
    ) -> Ended:
        """A command with its output in the log `name`, stopped when there is a reason."""
        waits = self._settings.waits
        return supervise(
            command,
            self._settings.logs / f"{name}.log",
            folder=self._settings.code,
            environment=environment,
            stop_for=stop_for or self.reason,
            poll_seconds=waits.poll,
            stop_seconds=waits.stop,
            timeout_seconds=timeout_seconds,
        )

    def _on_notice(self, words: str) -> None:
        self._notice_at = time.monotonic()
        self.notice = words
        say.warning("%s", words)
        self._shipper.event("notice", words)
