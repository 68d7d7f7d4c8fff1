"""What this machine knows of the cloud: `.infra/`, a folder a deployment, and one a region for what lasts.

    .infra/
      base/us-east-1/                      Terraform's folder of the lasting part; base.json: whose it is
      deployments/mine/deployment.json     what `up` was asked for, how far it came, what was fetched
      deployments/mine/cluster/            Terraform's folder of the deployment
      deployments/mine/.lock               held while a command changes it

`deployment.json` and the states are copied to S3 after each change, so another machine can go on.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_prep.storage import FolderInUse, exclusive_lock, write_atomically
from infra.errors import UserError
from infra.layout import DEPLOYMENT_PATTERN, check_deployment

DEPLOYMENT_NAME = "deployment.json"
BASE_NAME = "base.json"

Capacity = Literal["on-demand", "spot", "spot-then-on-demand"]
Stage = Literal["new", "uploading", "applying", "up", "destroying", "down"]


class Fetched(BaseModel):
    """The best checkpoint that `pull` brought and checked."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    step: int
    sha256: str
    path: str
    time: float


class Deployment(BaseModel):
    """`deployment.json`. `deadline` and `created` are epoch seconds; prices are of all nodes together.

    Attributes:
        usd_per_hour: the most that an hour can cost, disks and addresses included.
        compute_usd_per_hour: of the instances, at the price that is expected; `market_usd_per_hour`: of each
            market.
        stage: how far `up` or `down` came; `applying` and `destroying` may have left part of it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal[1] = 1
    name: str = Field(pattern=DEPLOYMENT_PATTERN)
    kind: Literal["train", "prepare"] = "train"
    region: str
    account_id: str
    bucket: str
    created: float = Field(default_factory=time.time)
    recipe_path: str = ""
    overrides: tuple[str, ...] = ()
    data: str = ""
    data_manifest_sha256: str = ""
    instance_types: tuple[str, ...] = ()
    capacity: Capacity = "spot"
    num_nodes: int = 1
    max_usd: float
    max_hours: float
    deadline: int = 0
    usd_per_hour: float = 0.0
    compute_usd_per_hour: float = 0.0
    market_usd_per_hour: dict[str, float] = Field(default_factory=dict)
    price_source: str = ""
    code_sha256: str = ""
    stage: Stage = "new"
    num_epochs: int | None = None
    fetched: Fetched | None = None

    def node_usd_per_hour(self, market: str) -> float:
        """What an hour of one node usually costs on this market."""
        usual = self.market_usd_per_hour.get(market, self.compute_usd_per_hour)
        return usual / max(1, self.num_nodes)

    @property
    def may_exist(self) -> bool:
        """Whether something of the cluster may be there."""
        return self.stage in ("applying", "up", "destroying")


class Base(BaseModel):
    """`base.json`: the lasting part of a region.

    Attributes:
        fingerprint: of module and variables of the last whole apply; "" while one is at work.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    account_id: str
    region: str
    bucket: str
    fingerprint: str = ""
    outputs: dict[str, Any] = Field(default_factory=dict)


class StateFolder:
    """`.infra/`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        """Of the deployments that this machine knows."""
        return sorted(
            path.parent.name
            for path in self.root.glob(f"deployments/*/{DEPLOYMENT_NAME}")
            if re.fullmatch(DEPLOYMENT_PATTERN, path.parent.name)
        )

    def folder(self, name: str) -> Path:
        return self.root / "deployments" / check_deployment(name)

    def cluster_folder(self, name: str) -> Path:
        return self.folder(name) / "cluster"

    def base_folder(self, region: str) -> Path:
        return self.root / "base" / region

    def load(self, name: str) -> Deployment | None:
        """None where this machine knows no such deployment. UserError: its file is damaged."""
        path = self.folder(name) / DEPLOYMENT_NAME
        try:
            return Deployment.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError:
            raise UserError(
                f"{path} is damaged, or of another version: remove it, and the copy in S3 is taken"
            ) from None

    def save(self, deployment: Deployment) -> None:
        folder = self.folder(deployment.name)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / DEPLOYMENT_NAME, encoded(deployment))

    def load_base(self, region: str) -> Base | None:
        path = self.base_folder(region) / BASE_NAME
        try:
            return Base.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None  # made anew from AWS and the state in S3

    def save_base(self, base: Base) -> None:
        folder = self.base_folder(base.region)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / BASE_NAME, encoded(base))

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold a deployment for one command of this machine. UserError at once where another has it."""
        folder = self.folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(exclusive_lock(folder))
            except FolderInUse:
                raise UserError(
                    f"another up, down or prepare of {name} is at work: wait for it to end, or stop it"
                ) from None
            yield

    @contextlib.contextmanager
    def base_lock(self, region: str, wait_seconds: float = 900.0) -> Iterator[None]:
        """Hold the lasting part; another command that changes it is waited for."""
        folder = self.base_folder(region)
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(exclusive_lock(folder, wait_seconds))
            except FolderInUse:
                raise UserError(
                    f"another command has been changing the lasting part in {region} for "
                    f"{wait_seconds / 60:.0f} minutes: look at it, and run this again"
                ) from None
            yield


def encoded(model: BaseModel) -> bytes:
    return (model.model_dump_json(indent=1) + "\n").encode()
