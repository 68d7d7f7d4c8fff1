"""Where everything is in the one bucket, and what stands there: keys, names, and the records as models.

    data/<data set>/                               shards and manifest.json
    runs/<deployment>/                             the run's mirror (checkpoint.mirror=s3://BUCKET/runs)
    code/<sha256>.tar.gz                           the pinned project
    wheels/<digest>/                               optional: wheels, so that nobody needs a package index
    jobs/<deployment>/job.json, recipe.yaml        what is to be done
    jobs/<deployment>/nodes/<instance>.json        how each instance is
    jobs/<deployment>/rendezvous/<generation>/…    who takes part
    jobs/<deployment>/history/<time>-<instance>.json   what happened
    jobs/<deployment>/end.json                     how it ended; written once
    reports/<deployment>/                          report, summary.json, metrics.jsonl
    logs/<deployment>/<instance>/<name>-<seq>.log  pieces of the logs
    infra/<base|cluster-NAME>.tfstate              copies of Terraform's state

Records may come from an older version of the project or from a stranger's hand: they are read with a bound on
their size, and unknown keys are left aside.

Example:
    >>> Keys("mine").node("i-0123")
    'jobs/mine/nodes/i-0123.json'
    >>> read_record(Job, content).num_nodes
    1
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

DEPLOYMENT_PATTERN = r"^[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?$"
INSTANCE_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9-]{0,63}$"
SHA256_PATTERN = r"^[0-9a-f]{64}$"
MAX_RECORD_BYTES = 256 << 10  # of any JSON object below jobs/
MAX_CODE_BYTES = 256 << 20  # of the code's tarball

SPOT, ON_DEMAND = "spot", "on-demand"

Phase = Literal[
    "booting",
    "installing",
    "staging",
    "waiting",  # for the other nodes
    "preparing",
    "training",
    "evaluating",
    "ended",
    "interrupted",
    "failed",
]
EndStatus = Literal["finished", "stopped", "failed", "deadline"]
EventKind = Literal["started", "training", "notice", "restarted", "died", "interrupted", "ended"]


class Record(BaseModel):
    """Base of all that is written as JSON: frozen; keys of a later version are left aside."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    def to_json(self) -> bytes:
        return (self.model_dump_json(indent=1) + "\n").encode()


class PrepareJob(Record):
    """Arguments of `python -m data_prep prepare`, `--source` and `--out` among them."""

    arguments: tuple[str, ...]


class Job(Record):
    """`job.json`: what the instances of a deployment do.

    Attributes:
        recipe: key of the resolved recipe in the bucket; "" where images are only prepared.
        overrides: `section.key=value`, after the recipe's own.
        data: `s3://…`, the prepared data set.
        data_manifest_sha256: of its manifest.json; "": whatever is there.
        ranks_per_node: `gpu` or a number.
        deadline: epoch seconds at which everything ends, whatever it does.
        usd_per_hour: of the whole deployment (all nodes), for the budget and the bill; `market_usd_per_hour`:
            of each market, where they differ.
        max_attempts: starts within an hour that may die without a word, before it is given up.
    """

    format: Literal[1] = 1
    deployment: str = Field(pattern=DEPLOYMENT_PATTERN)
    kind: Literal["train", "prepare"] = "train"
    bucket: str = Field(min_length=3, max_length=63)
    region: str = ""
    recipe: str = ""
    overrides: tuple[str, ...] = ()
    data: str = ""
    data_manifest_sha256: str = Field(default="", pattern=r"^(?:[0-9a-f]{64})?$")
    num_nodes: int = Field(default=1, ge=1, le=64)
    ranks_per_node: Literal["gpu"] | Annotated[int, Field(ge=1, le=1024)] = "gpu"
    deadline: int = Field(ge=0)
    max_usd: float | None = Field(default=None, gt=0)
    usd_per_hour: float | None = Field(default=None, ge=0)
    market_usd_per_hour: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    max_attempts: int = Field(default=3, ge=1, le=100)
    prepare: PrepareJob | None = None
    mlflow_uri: str = ""
    evaluate: bool = True

    def usd_per_hour_of(self, market: str) -> float | None:
        """Of all nodes on this market; None where no price is known."""
        return self.market_usd_per_hour.get(market, self.usd_per_hour)


class Node(Record):
    """`nodes/<instance>.json`: one instance as it was when it last wrote.

    `since`: when this phase began; `updated`: when this was written; both epoch seconds.
    """

    instance: str = Field(pattern=INSTANCE_PATTERN)
    group: str = ""
    market: str = ""
    instance_type: str = ""
    availability_zone: str = ""
    phase: Phase = "booting"
    detail: str = ""
    since: float = 0.0
    updated: float = 0.0
    attempt: int = 0
    price_usd_per_hour: float | None = None


class Event(Record):
    """`history/<time>-<instance>.json`: one thing that happened, at `time` (epoch seconds)."""

    kind: EventKind
    time: float
    instance: str
    detail: str = ""
    attempt: int = 0
    generation: int = 0


class End(Record):
    """`end.json`: how the deployment ended; the first to write it wins. `summary`: the run's summary.json."""

    status: EndStatus
    reason: str
    time: float
    instance: str = ""
    summary: dict[str, Any] | None = None


RecordType = TypeVar("RecordType", bound=Record)


def read_record(model: type[RecordType], content: bytes | str) -> RecordType:
    """A record from JSON.

    Raises:
        ValueError: too large, no JSON, or not such a record; one sentence.
    """
    if len(content) > MAX_RECORD_BYTES:
        raise ValueError(f"{model.__name__}: larger than {MAX_RECORD_BYTES >> 10} KiB")
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(
            f"{model.__name__}: {where}: {first['msg']} (written by another version of the project?)"
        ) from None


@dataclass(frozen=True)
class Keys:
    """Keys of one deployment; none begins with a slash.

    Raises:
        ValueError: no name of a deployment.
    """

    deployment: str

    def __post_init__(self) -> None:
        check_deployment(self.deployment)

    @property
    def job_folder(self) -> str:
        return f"jobs/{self.deployment}/"

    @property
    def job(self) -> str:
        return f"{self.job_folder}job.json"

    @property
    def recipe(self) -> str:
        return f"{self.job_folder}recipe.yaml"

    @property
    def nodes(self) -> str:
        return f"{self.job_folder}nodes/"

    def node(self, instance: str) -> str:
        return f"{self.nodes}{_checked_instance(instance)}.json"

    @property
    def generation(self) -> str:
        """The counter of starts of the group; moved on the condition that nobody moved it since."""
        return f"{self.job_folder}rendezvous/generation.json"

    def rendezvous(self, generation: int) -> str:
        return f"{self.job_folder}rendezvous/{generation:06d}/"

    def participant(self, generation: int, instance: str) -> str:
        return f"{self.rendezvous(generation)}{_checked_instance(instance)}.json"

    @property
    def history(self) -> str:
        return f"{self.job_folder}history/"

    def event(self, time: float, instance: str, kind: str) -> str:
        """Sorts by time."""
        return f"{self.history}{time:014.3f}-{_checked_instance(instance)}-{kind}.json"

    @property
    def end(self) -> str:
        return f"{self.job_folder}end.json"

    @property
    def run(self) -> str:
        """The mirror of the run: `checkpoint.mirror` is `mirror(bucket)`, `run.name` the deployment."""
        return f"runs/{self.deployment}/"

    @property
    def report(self) -> str:
        return f"reports/{self.deployment}/"

    @property
    def logs(self) -> str:
        return f"logs/{self.deployment}/"

    def log(self, instance: str, name: str, number: int) -> str:
        """Sorts by number: pieces of one log, one after the other, are the log."""
        return f"{self.logs}{_checked_instance(instance)}/{name}-{number:06d}.log"


def check_deployment(name: str) -> str:
    """The name itself.

    Raises:
        ValueError: it is no name of a deployment.
    """
    if re.fullmatch(DEPLOYMENT_PATTERN, name) is None:
        raise ValueError(
            f"{name!r} is no name of a deployment: 1 to 32 small letters, digits and hyphens, no hyphen at "
            "its ends"
        )
    return name


def _checked_instance(instance: str) -> str:
    if re.fullmatch(INSTANCE_PATTERN, instance) is None:
        raise ValueError(f"{instance!r} is no name of an instance")
    return instance


def code_key(sha256: str) -> str:
    if re.fullmatch(SHA256_PATTERN, sha256) is None:
        raise ValueError("a SHA-256 has 64 hexadecimal digits")
    return f"code/{sha256}.tar.gz"


def data_prefix(name: str) -> str:
    return f"data/{name}/"


def state_key(name: str) -> str:
    """`name`: `base`, or `cluster-<deployment>`."""
    return f"infra/{name}.tfstate"


def at(bucket: str, key: str) -> str:
    return f"s3://{bucket}/{key}"


def mirror(bucket: str) -> str:
    """`checkpoint.mirror` of every run; training adds the run's name."""
    return at(bucket, "runs")


def resource_prefix(deployment: str) -> str:
    return f"sprint-{check_deployment(deployment)}"


def group_name(deployment: str, market: str) -> str:
    """The Auto Scaling group; `market`: `spot` or `on-demand`."""
    if market not in (SPOT, ON_DEMAND):
        raise ValueError(f"{market!r} is no market: spot or on-demand")
    return f"{resource_prefix(deployment)}-{market}"
