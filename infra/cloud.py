"""One user's cloud in one region: account, bucket, the lasting part, and copies of all state in S3.

Example:
    >>> cloud = Cloud.open(options, console)
    >>> cloud.ensure_base()
    >>> cloud.bucket_exists()
    True
"""

from __future__ import annotations

import contextlib
import json
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.storage import Folder, open_folder
from infra.aws import Aws, AwsError
from infra.console import Console
from infra.deployment import Base, Deployment, StateFolder, encoded
from infra.errors import UserError
from infra.layout import ON_DEMAND, SPOT, Keys, at, group_name, state_key
from infra.terraform_cli import Terraform

DEPLOYMENT_KEY = "deployment.json"
# Variables that the commands compute, and promise things by → where they come from.
COMPUTED = {
    "base": {"region": "--region", "bucket_name": "--bucket"},
    "cluster": {
        "deployment": "--name",
        "region": "--region",
        "bucket": "--bucket",
        "instance_types": "--instance-type",
        "num_nodes": "--num-nodes",
        "capacity": "--capacity",
        "max_spot_price": "--max-usd and --max-hours",
        "max_usd": "--max-usd",
        "max_hours": "--max-hours",
        "end_time": "--max-hours",
        "deadline": "--max-hours",
        "start": "up itself",
        "code_key": "the checkout",
        "code_sha256": "the checkout",
        "allow_data_write": "prepare",
    },
}


class Cloud:
    """See the module.

    Attributes:
        bucket: the name of the one bucket, whether it exists yet or not.
        base: what this machine knows of the lasting part; None before its first apply.
    """

    def __init__(self, aws: Aws, account_id: str, states: StateFolder, console: Console, bucket: str) -> None:
        self.aws, self.account_id, self.states, self.console = aws, account_id, states, console
        self.region = aws.region
        self.base = states.load_base(self.region)
        if self.base is not None and self.base.account_id != account_id:
            raise UserError(
                f"{states.root} belongs to the AWS account {self.base.account_id}, and these credentials are "
                f"of {account_id}: use that account's profile, or another --state-dir"
            )
        self.bucket = bucket or (self.base.bucket if self.base else f"sprint-{account_id}-{self.region}")
        if self.base is not None and self.bucket != self.base.bucket:
            raise UserError(
                f"the lasting part in {self.region} has the bucket {self.base.bucket}: leave --bucket out"
            )
        self._locked: set[str] = set()

    @classmethod
    def open(cls, options: Namespace, console: Console) -> Cloud:
        """Raises UserError: no credentials, no region, or another account's state folder."""
        aws = Aws(options.region)
        aws.use_for_commands()
        account_id = str(aws.call("sts", "get_caller_identity")["Account"])
        cloud = cls(
            aws, account_id, StateFolder(options.state_dir), console, getattr(options, "bucket", None) or ""
        )
        return cloud

    @property
    def folder(self) -> Folder:
        """The bucket's root."""
        return open_folder(f"s3://{self.bucket}")

    def location(self, key: str) -> str:
        return at(self.bucket, key.rstrip("/"))

    def bucket_exists(self) -> bool:
        """Raises AwsError: it is somebody else's."""
        try:
            self.aws.call("s3", "head_bucket", Bucket=self.bucket)
        except AwsError as error:
            if error.is_missing:
                return False
            if error.is_denied:
                raise AwsError(
                    f"the bucket {self.bucket} may not be used: it is another account's (choose one with "
                    "--bucket), or these credentials lack rights on it",
                    error.code,
                ) from None
            raise
        return True

    def terraform_base(self) -> Terraform:
        return Terraform("base", self.states.base_folder(self.region), self.console.say)

    def terraform_cluster(self, name: str) -> Terraform:
        return Terraform("cluster", self.states.cluster_folder(name), self.console.say)

    def base_variables(self, **changes: Any) -> dict[str, Any]:
        """What the lasting part is made with: what was asked for before stays."""
        known = self.terraform_base().variables()
        fixed = {"region": self.region, "bucket_name": self.bucket}
        return (
            known
            | {key: value for key, value in changes.items() if value is not None}
            | fixed
            | self.own("base")
        )

    def own(self, module: str) -> dict[str, Any]:
        """Variables that the user wrote into STATE_DIR/<module>.tfvars.json, for which there is no option.

        Raises:
            UserError: one of them would break what the commands promise; or the file is no such thing.
        """
        path = self.states.root / f"{module}.tfvars.json"
        try:
            own = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as JSON ({error}): mend or remove it") from None
        if not isinstance(own, dict):
            raise UserError(f"{path} is no JSON object of Terraform variables: mend or remove it")
        for name in sorted(COMPUTED[module].keys() & own.keys()):
            raise UserError(f"{path} sets {name}, which comes from {COMPUTED[module][name]}: remove it there")
        return own

    def ensure_base(self, **changes: Any) -> Base:
        """Apply the lasting part where it is missing or another one is wanted; its outputs are in `.base`."""
        with self.states.base_lock(self.region):
            self.base = self.states.load_base(self.region)
            terraform = self.terraform_base()
            exists = self.bucket_exists()
            if exists:
                self._restore(terraform, "base")
            variables = self.base_variables(**changes)
            fingerprint = terraform.fingerprint(variables)
            if self.base and exists and self.base.fingerprint == fingerprint and terraform.resources():
                return self.base
            if exists and not terraform.resources():
                raise UserError(
                    f"the bucket {self.bucket} exists, but no Terraform state of it, neither in "
                    f"{terraform.folder} nor in the bucket: choose another with --bucket, or delete that one"
                )
            first = self.base is None or not exists
            self.console.say(
                f"making the lasting part in {self.region}: bucket {self.bucket}, network, role …"
                if first
                else f"changing the lasting part in {self.region} …"
            )
            self.states.save_base(Base(account_id=self.account_id, region=self.region, bucket=self.bucket))
            try:
                terraform.apply(variables)
            finally:
                self.keep(terraform, "base")
            base = Base(
                account_id=self.account_id,
                region=self.region,
                bucket=self.bucket,
                fingerprint=fingerprint,
                outputs=terraform.outputs(),
            )
            self.states.save_base(base)
            self.base = base
            return base

    def keep(self, terraform: Terraform, name: str) -> None:
        """Copy a state to S3; without a bucket it stays here."""
        if not terraform.state_path.is_file():
            return
        try:
            if self.bucket_exists():
                self.folder.write(state_key(name), terraform.state_path.read_bytes())
                variables = json.dumps(terraform.variables()).encode()
                self.folder.write(variables_key(name), variables)
        except (UserError, RuntimeError, OSError) as error:
            self.console.warn(
                f"Terraform's state was not copied to S3 ({error}); it is in {terraform.state_path}"
            )

    def _restore(self, terraform: Terraform, name: str) -> None:
        """Take the state in S3, where it is newer than the one here, or there is none here."""
        with contextlib.suppress(FileNotFoundError):
            if terraform.take_state(self.folder.read(state_key(name))):
                with contextlib.suppress(ValueError):
                    terraform.take_variables(json.loads(self.folder.read(variables_key(name))))
                self.console.say(f"Terraform's state of {name} was taken from s3://{self.bucket}")

    def restored_cluster(self, name: str) -> Terraform:
        """Terraform of a deployment, with the newest state that there is."""
        terraform = self.terraform_cluster(name)
        if self.bucket_exists():
            self._restore(terraform, f"cluster-{name}")
        return terraform

    def find_base(self) -> Base | None:
        """The lasting part, also where another machine made it; nothing is changed in AWS."""
        if self.base is not None and self.base.outputs:
            return self.base
        if not self.bucket_exists():
            return None
        terraform = self.terraform_base()
        self._restore(terraform, "base")
        if not terraform.outputs():
            return self.base
        self.base = Base(
            account_id=self.account_id, region=self.region, bucket=self.bucket, outputs=terraform.outputs()
        )
        self.states.save_base(self.base)
        return self.base

    def save(self, deployment: Deployment) -> None:
        """Here, and in S3 where there is a bucket."""
        self.states.save(deployment)
        with contextlib.suppress(UserError, RuntimeError, OSError):
            if self.bucket_exists():
                self.folder.write(Keys(deployment.name).job_folder + DEPLOYMENT_KEY, encoded(deployment))

    def load(self, name: str) -> Deployment | None:
        """What is known of a deployment, here or in S3.

        Raises:
            UserError: it is in another region, where none of these commands would see what it has running.
        """
        known = self.states.load(name)
        if known is not None and known.region != self.region:
            raise UserError(
                f"{name} is in {known.region}, and this is {self.region}: pass --region {known.region}, or "
                "choose another --name for a new one"
            )
        if known is not None or not self.bucket_exists():
            return known
        with contextlib.suppress(FileNotFoundError, ValueError):
            content = self.folder.read(Keys(name).job_folder + DEPLOYMENT_KEY)
            known = Deployment.model_validate_json(content)
            # Instances may write here: only what is said of this account, region and name is believed.
            if (known.account_id, known.region, known.name) != (self.account_id, self.region, name):
                return None
            self.states.save(known)
        return known

    def names(self) -> list[str]:
        """Of all deployments of this region that are known here or in S3."""
        found = set(self.states.names()) - {deployment.name for deployment in self.elsewhere()}
        if self.bucket_exists():
            for file in self.folder.files("jobs"):
                parts = file.name.split("/")
                if len(parts) == 3 and parts[2] == DEPLOYMENT_KEY:
                    found.add(parts[1])
        return sorted(found)

    def elsewhere(self) -> list[Deployment]:
        """Those that this machine knows in other regions."""
        known = (self.states.load(name) for name in self.states.names())
        return [one for one in known if one is not None and one.region != self.region]

    def choose(self, name: str | None) -> Deployment:
        """The named deployment, or the only one that there is. UserError: none, or several."""
        names = self.names() if name is None else [name]
        if name is None:
            if len(names) > 1:
                alive = [known for known in names if (d := self.load(known)) is not None and d.may_exist]
                names = alive if len(alive) == 1 else names
            if not names:
                others = ", ".join(f"{one.name} is in {one.region} (--region)" for one in self.elsewhere())
                raise UserError(
                    f"there is no deployment in {self.region}: "
                    f"{others or 'python -m infra up RECIPE makes one'}"
                )
            if len(names) > 1:
                raise UserError(f"there are several deployments: name one of {', '.join(names)}")
        deployment = self.load(names[0])
        if deployment is None:
            known = ", ".join(self.names()) or "none"
            raise UserError(f"there is no deployment {names[0]} in {self.region}; known: {known}")
        return deployment

    @contextlib.contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Hold a deployment against other commands, here and (once there is a bucket) on other machines."""
        with self.states.lock(name), contextlib.ExitStack() as stack:
            if self.bucket_exists():
                stack.enter_context(self.shared_lock(name))
            yield

    @contextlib.contextmanager
    def shared_lock(self, name: str) -> Iterator[None]:
        """The lock in the bucket; nothing where this process holds it already."""
        if name in self._locked:
            yield
            return
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(open_folder(self.location(Keys(name).job_folder)).lock())
            except RuntimeError as error:
                raise UserError(f"another machine changes {name} at this moment: {error}") from None
            self._locked.add(name)
            stack.callback(self._locked.discard, name)
            yield

    def groups(self, name: str) -> list[dict[str, Any]]:
        """The Auto Scaling groups of a deployment, as AWS describes them."""
        names = [group_name(name, market) for market in (SPOT, ON_DEMAND)]
        return list(
            self.aws.pages(
                "autoscaling",
                "describe_auto_scaling_groups",
                "AutoScalingGroups",
                AutoScalingGroupNames=names,
            )
        )

    @staticmethod
    def now() -> float:
        return time.time()


def variables_key(name: str) -> str:
    """Beside the state: what it was made with, since a destroy asks for it."""
    return state_key(name).removesuffix(".tfstate") + ".tfvars.json"


def runs_folder(options: Namespace) -> Path:
    return Path(getattr(options, "runs", None) or "runs")
