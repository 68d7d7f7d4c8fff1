"""A cloud that lies in a folder, for what only reads records and groups."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from data_prep.storage import LocalFolder
from infra.aws import AwsError
from infra.deployment import Base, Deployment, StateFolder
from infra.terraform_cli import Terraform


class FakeAws:
    """Answers that a test names: `service:operation` → value, exception, or function of the arguments."""

    region = "us-east-1"

    def __init__(self, **answers: Any) -> None:
        self.answers = {name.replace("__", ":"): answer for name, answer in answers.items()}
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def call(self, service: str, operation: str, **arguments: Any) -> Any:
        self.asked.append((f"{service}:{operation}", arguments))
        answer = self.answers.get(f"{service}:{operation}", AwsError("it is not there", "NotImplemented"))
        if callable(answer):
            answer = answer(**arguments)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def pages(self, service: str, operation: str, field: str, **arguments: Any) -> Any:
        return iter(self.call(service, operation, **arguments)[field])


class FakeCloud:
    """As `infra.cloud.Cloud`, as far as it is looked at."""

    def __init__(self, root: Path, groups: list[dict[str, Any]] | None = None, **answers: Any) -> None:
        self.folder = LocalFolder(root / "bucket")
        self.aws, self.region, self.account_id, self.bucket = FakeAws(**answers), "us-east-1", "1", "b"
        self.states = StateFolder(root / ".infra")
        self.base: Base | None = None
        self._groups = groups or []

    def groups(self, name: str) -> list[dict[str, Any]]:
        return [group for group in self._groups if f"sprint-{name}-" in group["AutoScalingGroupName"]]

    def bucket_exists(self) -> bool:
        return True

    def find_base(self) -> Base | None:
        return self.base

    def terraform_base(self) -> Terraform:
        return Terraform("base", self.states.base_folder(self.region))

    def now(self) -> float:
        return time.time()


def group(name: str, wanted: int = 1, *instances: str) -> dict[str, Any]:
    return {
        "AutoScalingGroupName": name,
        "DesiredCapacity": wanted,
        "MinSize": 0,
        "MaxSize": 1,
        "Instances": [
            {"InstanceId": i, "LifecycleState": "InService", "AvailabilityZone": "us-east-1a"}
            for i in instances
        ],
    }


def deployment(**changes: Any) -> Deployment:
    known: dict[str, Any] = {
        "name": "mine",
        "region": "us-east-1",
        "account_id": "1",
        "bucket": "b",
        "max_usd": 50,
        "max_hours": 20,
        "usd_per_hour": 4.64,
        "compute_usd_per_hour": 2.0,
        "deadline": int(time.time()) + 3600,
        "stage": "up",
        "num_epochs": 16,
    }
    return Deployment(**known | changes)
