"""What an instance does: data onto its disk, a check, training until it ends, a report, and a verdict.

Whatever happens ends in a `Verdict`, which sprint-bootstrap carries out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from infra.errors import UserError
from infra.layout import End, Event, Job, Keys, read_record
from infra.node import commands, finish
from infra.node.group import Group
from infra.node.interrupts import Interrupts
from infra.node.metadata import Metadata
from infra.node.policy import HOUR, Decision, RestartPolicy, too_many_instances
from infra.node.settings import Settings
from infra.node.shipping import Shipper
from infra.node.staging import slow_loader, stage_data, write_recipe
from infra.node.starts import Starts
from infra.node.store import Store
from infra.node.verdict import Ending, Verdict, failed

Command = Callable[[Group | None], list[str]]

say = logging.getLogger(__name__)


class Agent:
    """One instance's work, from its start to its verdict."""

    def __init__(self, settings: Settings, store: Store, metadata: Metadata) -> None:
        self._settings, self._store = settings, store
        self._keys = Keys(settings.deployment)
        self._shipper = Shipper(settings, store)
        self.interrupts = Interrupts(settings, metadata, self._shipper)

    def run(self) -> Verdict:
        """Do all of it; never raises."""
        try:
            verdict = self._work()
        except Ending as ending:
            verdict = ending.verdict
        except (UserError, ValueError) as error:
            verdict = Verdict("end", "failed", str(error))
        except Exception as error:
            say.exception("a fault of the agent itself")
            verdict = Verdict("end", "failed", f"the agent failed: {type(error).__name__}: {error}")
        try:
            self._conclude(verdict)
        except Exception:
            say.exception("the last records could not be written")
        return verdict

    def _work(self) -> Verdict:
        self._shipper.phase("booting")
        self.interrupts.patiently(self._refuse_ended)
        job = self.interrupts.patiently(self._read_job)
        self.interrupts.deadline = min(self._settings.deadline, job.deadline)
        if (usd_per_hour := job.usd_per_hour_of(self._settings.market)) is not None:
            self._shipper.usd_per_hour = usd_per_hour / job.num_nodes
        deaths = self.interrupts.patiently(lambda: self._look_back(job))
        self._shipper.event("started", f"{self._settings.market} {self._settings.instance_type}".strip())
        self.interrupts.raise_for()
        waits = self._settings.waits
        policy = RestartPolicy(job.max_attempts, waits.between_starts, waits.retry, deaths)
        if job.kind == "prepare":
            return self._prepare(job, policy)
        return self._train(job, policy)

    def _train(self, job: Job, policy: RestartPolicy) -> Verdict:
        settings = self._settings
        recipe = self.interrupts.patiently(lambda: write_recipe(self._store, job, settings))
        self._shipper.phase("staging", f"{job.data} to the local disk")
        environment = commands.environment(job, settings)
        data = stage_data(
            job,
            settings,
            lambda words: self.interrupts.run(words, "stage", environment),
            self.interrupts.pause,
        )
        words = commands.overrides(job, settings, data)
        self._check(job, commands.check_command(job, recipe, words, commands.ranks_of(job)))

        def command(group: Group | None) -> list[str]:
            return commands.train_command(job, settings, recipe, words, group)

        starts = self._starts(job, policy, command)
        starts.note = slow_loader(data)
        decision = starts.run()
        if not starts.is_primary and decision.status in ("finished", "stopped"):
            self._wait_for_the_report()
        summary = finish.summary_of(settings.run)
        if summary is not None and decision.status in ("finished", "stopped"):
            fault = finish.evaluate(job, settings, self.interrupts, self._shipper, data)
            if fault is not None:
                say.warning("there is no report: %s", fault)
        if starts.is_primary:
            finish.upload_report(settings, self._store)
        return self._end(decision, finish.words_of(decision.reason, summary), summary)

    def _prepare(self, job: Job, policy: RestartPolicy) -> Verdict:
        def command(group: Group | None) -> list[str]:
            return commands.prepare_command(job, self._settings, group)

        if job.prepare is None:
            raise failed(f"{self._keys.job} does not say what is to be prepared")
        decision = self._starts(job, policy, command).run()
        return self._end(decision, decision.reason, None)

    def _starts(self, job: Job, policy: RestartPolicy, command: Command) -> Starts:
        return Starts(
            job,
            self._settings,
            self._store,
            self._shipper,
            self.interrupts,
            policy,
            command,
            self._refuse_ended,
        )

    def _end(self, decision: Decision, reason: str, summary: dict[str, object] | None) -> Verdict:
        finish.write_end(self._settings, self._store, decision.status, reason, summary)
        return Verdict("end", decision.status, reason)

    def _refuse_ended(self) -> None:
        """An instance that came too late ends at once."""
        content = self._store.get(self._keys.end)
        if content is not None:
            end = read_record(End, content)
            raise Ending(Verdict("end", end.status, f"the deployment has ended: {end.reason}"))

    def _read_job(self) -> Job:
        content = self._store.get(self._keys.job)
        if content is None:
            raise failed(f"there is no {self._keys.job} in the bucket: run `up` again")
        try:
            job = read_record(Job, content)
        except ValueError as error:
            raise failed(f"{self._keys.job} cannot be read: {error}") from None
        if job.deployment != self._settings.deployment or job.bucket != self._settings.bucket:
            raise failed(f"{self._keys.job} is of another deployment ({job.deployment} in {job.bucket})")
        return job

    def _look_back(self, job: Job) -> list[float]:
        """Deaths within the last hour, on any instance; ends what only ever begins."""
        deaths: dict[object, float] = {}
        num_started, now = 1, time.time()
        for item in self._store.list(self._keys.history):
            if item.age_seconds >= HOUR:
                continue
            num_started += item.key.endswith("-started.json")
            if item.key.endswith("-died.json") and (content := self._store.get(item.key)):
                event = read_record(Event, content)
                # Nodes that die together die once.
                deaths[event.generation if job.num_nodes > 1 else item.key] = now - item.age_seconds
        fault = too_many_instances(num_started, job.num_nodes)
        if fault is not None:
            raise failed(fault)
        return sorted(deaths.values())

    def _check(self, job: Job, command: list[str]) -> None:
        if commands.ranks_of(job) < 1:
            raise failed("no GPU is visible (nvidia-smi -L): choose another image or instance type")
        ended = self.interrupts.run(command, "check", commands.environment(job, self._settings))
        self.interrupts.raise_for()
        if ended.code != 0:
            raise failed(f"the check refused it: {ended.last_words.removeprefix('error: ')}")

    def _wait_for_the_report(self) -> None:
        """The node that has the run's folder writes it; when that has ended, so does this one."""
        self._shipper.phase("waiting", "for the report of another node")
        until = time.monotonic() + 2 * self._settings.waits.evaluation
        while time.monotonic() < until:
            self.interrupts.patiently(self._refuse_ended)
            self.interrupts.pause(self._settings.waits.group)

    def _conclude(self, verdict: Verdict) -> None:
        """The last records, whatever the verdict: why it ended, and the logs."""
        if verdict.action == "end":
            # Also where the deadline or a fault came; the first end.json counts.
            status = "failed" if verdict.status == "interrupted" else verdict.status
            finish.write_end(self._settings, self._store, status, verdict.reason, None)
            self._shipper.event("ended", f"{verdict.status}: {verdict.reason}")
            self._shipper.phase("failed" if verdict.status == "failed" else "ended", verdict.reason)
        else:
            self._shipper.event("interrupted", verdict.reason)
            self._shipper.phase("interrupted", verdict.reason)
        self._shipper.close(timeout_seconds=min(60.0, max(5.0, self._settings.waits.ship * 2)))
        if self.interrupts.notice is not None and verdict.action == "leave":
            finish.stay_for_the_end(self._settings, self.interrupts)
        self.interrupts.close()
