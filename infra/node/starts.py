"""Start after start, until training (or preparing) has ended for good; on one node, or with others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from infra.aws import AwsError
from infra.layout import Job, Phase
from infra.node import commands
from infra.node.group import Group, Rendezvous, Spare, Stopped
from infra.node.interrupts import Interrupts
from infra.node.policy import Decision, RestartPolicy
from infra.node.process import Ended
from infra.node.settings import Settings
from infra.node.shipping import Shipper
from infra.node.staging import read_status
from infra.node.store import Store
from infra.node.verdict import leaving

LOST_RANK = "another rank is gone"  # as training says it

say = logging.getLogger(__name__)


class Starts:
    """What is started, how often, and with whom.

    Args:
        command: for a group of nodes; None where there is only one.
        refuse_ended: raises Ending where the deployment has ended; looked at while waiting for others.

    Attributes:
        is_primary: whether the run's folder with status.json is on this node.
        note: what `status` is to show beside the count of starts; "" for nothing.
    """

    def __init__(
        self,
        job: Job,
        settings: Settings,
        store: Store,
        shipper: Shipper,
        interrupts: Interrupts,
        policy: RestartPolicy,
        command: Callable[[Group | None], list[str]],
        refuse_ended: Callable[[], None],
    ) -> None:
        self._job, self._settings, self._shipper = job, settings, shipper
        self._interrupts, self._policy = interrupts, policy
        self._command, self._refuse_ended = command, refuse_ended
        self._is_training = job.kind == "train"
        self._phase: Phase = "training" if self._is_training else "preparing"
        self._rendezvous = Rendezvous(settings, store, job.num_nodes) if job.num_nodes > 1 else None
        self.is_primary = True
        self.note = ""

    def run(self) -> Decision:
        """Again and again, until there is no more to do; the decision is to `end`.

        Raises:
            Ending: this node leaves, or is out of time.
        """
        attempt = 0
        while True:
            attempt += 1
            group = self._meet(attempt)
            generation = 0 if group is None else group.generation
            self._shipper.phase(self._phase, f"start {attempt}{self.note and f'; {self.note}'}", attempt)
            self._shipper.event("training", f"start {attempt}", attempt, generation)
            began = time.time()
            status, reason = self._start(group)
            decision = self._policy.decide(status, reason, began, time.time())
            say.info("start %d: %s (%s); so: %s", attempt, status or "died", reason, decision.action)
            if status is None:
                self._shipper.event("died", reason, attempt, generation)
            if decision.action == "leave":
                raise leaving(decision.reason)
            if decision.action == "end":
                return decision
            self._shipper.event("restarted", reason, attempt, generation)
            if self._rendezvous is not None:
                self._interrupts.patiently(partial(self._rendezvous.move_on, generation))
            self._interrupts.pause(decision.wait_seconds)

    def _meet(self, attempt: int) -> Group | None:
        if self._rendezvous is None:
            return None
        self._shipper.phase("waiting", "for the other nodes", attempt)
        rendezvous = self._rendezvous

        def stop_for() -> str | None:
            self._refuse_ended()
            return self._interrupts.reason()

        try:
            return self._interrupts.patiently(lambda: rendezvous.join(stop_for))
        except Spare as spare:
            raise leaving(str(spare)) from None
        except Stopped:
            self._interrupts.raise_for()
            raise

    def _start(self, group: Group | None) -> tuple[str | None, str]:
        """One start, and how it ended: status and reason as in status.json, None where it died."""
        status_file = self._settings.run / "status.json"
        status_file.unlink(missing_ok=True)
        name = "train" if self._is_training else "prepare"
        environment = commands.environment(self._job, self._settings)
        ended = self._interrupts.run(self._command(group), name, environment, self._stop_for(group))
        self.is_primary = self._shipper.ships_figures = status_file.is_file() or group is None
        self._shipper.ship()  # its last figures, whatever comes
        status, reason = read_status(status_file)
        if status != "finished":
            self._interrupts.raise_for()
        if not self._is_training and ended.code == 0 and ended.stopped_for is None:
            status, reason = "finished", "the data set is prepared"
        if status is None and LOST_RANK in ended.last_words:
            status = "restart"  # the node with the run's folder is the one that is gone
        return self._agreed(group, status, reason or _words(ended), ended)

    def _stop_for(self, group: Group | None) -> Callable[[], str | None]:
        """For while it runs: reasons of this machine, and a group that has broken up."""
        looked = time.monotonic()

        def stop_for() -> str | None:
            nonlocal looked
            reason = self._interrupts.reason(may_leave_itself=self._is_training)
            is_time = time.monotonic() - looked > self._settings.waits.group
            if reason is None and group is not None and self._rendezvous is not None and is_time:
                looked = time.monotonic()
                try:
                    if self._rendezvous.generation() > group.generation:
                        reason = "the group broke up"
                except AwsError as error:
                    say.warning("the group cannot be looked at: %s", error)
            return reason

        return stop_for

    def _agreed(
        self, group: Group | None, status: str | None, reason: str, ended: Ended
    ) -> tuple[str | None, str]:
        """The one outcome on which all nodes act: the first to fail knows why, the others see it leave."""
        if group is None or self._rendezvous is None:
            return status, reason
        rendezvous, generation = self._rendezvous, group.generation
        if status is not None:
            self._interrupts.patiently(lambda: rendezvous.publish(generation, status, reason))
        # Where it ended well, another node may still be uploading its last checkpoint.
        waits = self._settings.waits
        until = time.monotonic() + (waits.evaluation if ended.code == 0 else waits.outcome)
        while True:
            outcome = self._interrupts.patiently(lambda: rendezvous.outcome(generation))
            if outcome is not None:
                return outcome.status, outcome.reason
            is_over = self._interrupts.patiently(rendezvous.generation) > generation
            if is_over or time.monotonic() > until:
                # Where somebody has moved on already, it was the group that broke, and nobody died here.
                return ("restart" if is_over else None), reason
            self._interrupts.pause(self._settings.waits.group)


def _words(ended: Ended) -> str:
    why = f"stopped, since {ended.stopped_for}" if ended.stopped_for else f"exit code {ended.code}"
    return f"{why}: {ended.last_words}" if ended.last_words else why
