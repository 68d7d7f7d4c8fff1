"""Who this instance is and where its files are, from the environment that sprint-bootstrap sets.

SPRINT_ROOT puts every path below another folder, SPRINT_WAIT_SCALE makes every wait shorter; both for tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from infra.layout import check_deployment
from infra.node.metadata import Metadata


@dataclass(frozen=True)
class Waits:
    """All waits, in seconds."""

    poll: float = 1.0  # of a process that runs
    notice: float = 5.0  # between two looks at the metadata service; EC2 advises 5
    notice_grace: float = 60.0  # for training to leave by itself after a notice, of the 120 s there are
    after_notice: float = 600.0  # then the machine is still here: it leaves by itself
    ship: float = 30.0  # between two uploads of logs, figures and the node's record
    stop: float = 75.0  # after SIGTERM, until everything is killed; the service has 110
    retry: float = 15.0  # after the first failure of a step that may pass, growing
    between_starts: float = 60.0  # of training, at least
    group: float = 3.0  # between two looks at who is there
    stale: float = 45.0  # a node that has not been heard of for so long while waiting is not there
    silent: float = 120.0  # a node that trains and has not been heard of for so long is lost
    alone: float = 3600.0  # waiting for the other nodes, before it is given up
    outcome: float = 20.0  # for another node to say how training ended
    join: float = 180.0  # for torchrun's processes to find each other
    evaluation: float = 900.0
    before_deadline: float = 300.0  # training is stopped so long before the deadline
    s3: float = 600.0  # without any answer from S3 where nothing can go on without

    def scaled(self, factor: float) -> Waits:
        values = {field.name: getattr(self, field.name) * factor for field in dataclasses.fields(self)}
        return Waits(**values)


@dataclass(frozen=True)
class Settings:
    """One instance of one deployment."""

    deployment: str
    bucket: str
    region: str
    instance: str
    address: str  # of this machine, for the other nodes
    instance_type: str
    availability_zone: str
    group: str
    market: str
    deadline: float  # epoch seconds
    root: Path
    cache: Path  # on the fastest disk
    code: Path  # the project; commands run there
    waits: Waits

    @property
    def logs(self) -> Path:
        return self.root / "var/log/sprint"

    @property
    def verdict(self) -> Path:
        """What sprint-bootstrap does when the agent has ended."""
        return self.root / "run/sprint/verdict"

    @property
    def data_volume(self) -> Path:
        """Where sprint-bootstrap mounts the data volume, if there is one."""
        return self.root / "mnt/data"

    @property
    def runs(self) -> Path:
        return self.cache / "runs"

    @property
    def run(self) -> Path:
        return self.runs / self.deployment


def read_settings(environment: Mapping[str, str], metadata: Metadata) -> Settings:
    """Settings from the environment, and from the metadata service where that does not say it.

    Raises:
        ValueError: something is missing or is no such thing.
    """
    missing = [name for name in ("SPRINT_DEPLOYMENT", "SPRINT_BUCKET") if not environment.get(name)]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be set (see /etc/sprint/environment)")
    root = Path(environment.get("SPRINT_ROOT") or "/")
    instance = environment.get("SPRINT_INSTANCE") or metadata.text("instance-id")
    if not instance:
        raise ValueError("the metadata service does not say which instance this is: set SPRINT_INSTANCE")
    return Settings(
        deployment=check_deployment(environment["SPRINT_DEPLOYMENT"]),
        bucket=environment["SPRINT_BUCKET"],
        region=environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or "",
        instance=instance,
        address=environment.get("SPRINT_ADDRESS") or metadata.text("local-ipv4") or "127.0.0.1",
        instance_type=metadata.text("instance-type") or "",
        availability_zone=metadata.text("placement/availability-zone") or "",
        group=environment.get("SPRINT_GROUP", ""),
        market=environment.get("SPRINT_MARKET", ""),
        deadline=float(environment.get("SPRINT_DEADLINE") or "inf"),
        root=root,
        cache=root / environment.get("SPRINT_CACHE", "/mnt/cache").lstrip("/"),
        code=Path.cwd(),
        waits=Waits().scaled(float(environment.get("SPRINT_WAIT_SCALE", "1"))),
    )
