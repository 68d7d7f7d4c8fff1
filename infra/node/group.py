"""Which nodes train together, agreed on through S3 alone: no machine needs a right to look at the others.

    rendezvous/generation.json          {"generation": 3}: moved on by whoever finds the group broken, on the
                                        condition that nobody did so before (If-Match)
    rendezvous/000003/<instance>.json   a node that waits; written again every few seconds, so that its age,
                                        by the clock of S3, tells whether it is still there
    rendezvous/000003/group.json        the group: written once (If-None-Match) by the first who saw enough
    rendezvous/000003/outcome.json      how training ended: written once by the node that has status.json

Example:
    >>> group = Rendezvous(settings, store, num_nodes=2).join(lambda: None)
    >>> group.leader, group.generation
    ('10.0.3.7', 0)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import Field

from infra.errors import UserError
from infra.layout import INSTANCE_PATTERN, Keys, Node, Record, read_record
from infra.node.settings import Settings
from infra.node.store import Store

PORT = 29400
GROUP_NAME, OUTCOME_NAME = "group.json", "outcome.json"


class Generation(Record):
    generation: int = Field(ge=0, lt=1_000_000)


class Participant(Record):
    instance: str = Field(pattern=INSTANCE_PATTERN)
    address: str = Field(pattern=r"^[0-9a-fA-F.:]{2,45}$")


class GroupRecord(Record):
    participants: tuple[Participant, ...]


class Outcome(Record):
    """`status` and `reason` as in status.json."""

    status: str
    reason: str
    instance: str


@dataclass(frozen=True)
class Group:
    """The nodes of one generation, sorted by instance; the first one is the leader."""

    generation: int
    participants: tuple[Participant, ...]

    @property
    def leader(self) -> str:
        """The address at which all meet."""
        return self.participants[0].address


class Stopped(Exception):
    """Waiting ended for a reason of one's own."""


class Spare(Exception):
    """A node more than there should be, as when a group is moved between zones."""


class Rendezvous:
    """What one node does to find the others.

    Args:
        port: of torchrun's rendezvous on the leader.
    """

    def __init__(self, settings: Settings, store: Store, num_nodes: int) -> None:
        self._settings, self._store = settings, store
        self._num_nodes = num_nodes
        self._keys = Keys(settings.deployment)
        self._self = Participant(instance=settings.instance, address=settings.address)

    def generation(self) -> int:
        return self._read_generation()[0]

    def move_on(self, generation: int) -> None:
        """That generation is over; no more happens where somebody has said so already."""
        current, etag = self._read_generation()
        if current == generation:
            content = Generation(generation=generation + 1).to_json()
            if etag is None:
                self._store.create(self._keys.generation, content)
            else:
                self._store.replace(self._keys.generation, content, etag)

    def join(self, stop_for: Callable[[], str | None]) -> Group:
        """Wait until enough nodes are there, and agree on who they are.

        Args:
            stop_for: a reason to stop waiting.

        Raises:
            Stopped: there was one.
            Spare: the others have long been complete without this node.
            UserError: the others did not come in time, or S3 fails for good.
        """
        waits = self._settings.waits
        give_up = time.monotonic() + waits.alone
        written, own = (-1, 0.0), self._settings.instance
        while True:
            reason = stop_for()
            if reason is not None:
                raise Stopped(reason)
            generation = self.generation()
            group = self.group(generation)
            if group is None:
                # Again and again, since its age says whether this node is still there.
                if written[0] != generation or time.monotonic() - written[1] > waits.stale / 3:
                    self._store.put(self._keys.participant(generation, own), self._self.to_json())
                    written = (generation, time.monotonic())
                present = self._present(generation)
                if len(present) >= self._num_nodes:
                    chosen = GroupRecord(participants=tuple(present[: self._num_nodes]))
                    self._store.create(self._place(generation, GROUP_NAME), chosen.to_json())
                    continue
            elif any(participant.instance == own for participant in group.participants):
                if written[0] == generation:
                    return group
                # From before this agent was started again: what is left of that group cannot go on.
                self.move_on(generation)
            elif not self._is_alive(group):
                # This node was started for want of one of them.
                self.move_on(generation)
            if time.monotonic() > give_up:
                if group is not None:
                    raise Spare("the group has been complete without this node for too long")
                there = len(self._present(generation))
                raise UserError(
                    f"only {there} of {self._num_nodes} nodes came within {waits.alone / 60:.0f} minutes: "
                    "look at the groups' activity (capacity?), or take fewer nodes"
                )
            time.sleep(waits.group)

    def group(self, generation: int) -> Group | None:
        content = self._store.get(self._place(generation, GROUP_NAME))
        if content is None:
            return None
        record = read_record(GroupRecord, content)
        return Group(generation, tuple(sorted(record.participants, key=lambda one: one.instance)))

    def publish(self, generation: int, status: str, reason: str) -> None:
        """How training ended; only the first word counts, as the first to fail knows why."""
        outcome = Outcome(status=status, reason=reason[:1000], instance=self._settings.instance)
        self._store.create(self._place(generation, OUTCOME_NAME), outcome.to_json())

    def outcome(self, generation: int) -> Outcome | None:
        content = self._store.get(self._place(generation, OUTCOME_NAME))
        return None if content is None else read_record(Outcome, content)

    def _present(self, generation: int) -> list[Participant]:
        """Those who wait, sorted by instance."""
        present = []
        for item in self._store.list(self._keys.rendezvous(generation)):
            if (
                not item.key.endswith((GROUP_NAME, OUTCOME_NAME))
                and item.age_seconds < self._settings.waits.stale
            ):
                content = self._store.get(item.key)
                if content is not None:
                    present.append(read_record(Participant, content))
        return sorted(present, key=lambda one: one.instance)

    def _is_alive(self, group: Group) -> bool:
        """Whether all of a group were heard of lately, and none of them said that it is leaving."""
        heard = {item.key: item.age_seconds for item in self._store.list(self._keys.nodes)}
        for participant in group.participants:
            key = self._keys.node(participant.instance)
            if heard.get(key, float("inf")) > self._settings.waits.silent:
                return False
            content = self._store.get(key)
            if content is None or read_record(Node, content).phase in ("interrupted", "ended", "failed"):
                return False
        return True

    def _place(self, generation: int, name: str) -> str:
        return f"{self._keys.rendezvous(generation)}{name}"

    def _read_generation(self) -> tuple[int, str | None]:
        found = self._store.get_with_etag(self._keys.generation)
        if found is None:
            return 0, None
        return read_record(Generation, found[0]).generation, found[1]
