"""Terraform, run for one module in a folder of its own, without a shell.

The module is copied beside its state, so that what was applied can be destroyed as it was, whatever became of
the checkout; the state is one file, and whoever calls keeps a copy of it in S3. All that Terraform says goes
into `terraform.log`; `say` gets a line when a resource is made or gone.

    .infra/mine/cluster/
      module/infra/terraform/cluster/, module/infra/bootstrap/   what is applied
      terraform.tfstate                                          what there is
      variables.tfvars.json                                      what it was made with
      terraform.log

Example:
    >>> terraform = Terraform("cluster", Path(".infra/mine/cluster"), say=print)
    >>> terraform.apply({"deployment": "mine", "region": "us-east-1"})
    >>> terraform.outputs()["group_names"]
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.storage import write_atomically
from infra.errors import UserError
from infra.terraform_setup import (
    SOURCE,
    Interrupts,
    binary,
    check_version,
    environment_of,
    failure,
    module_files,
    plain_error,
)

STATE_NAME = "terraform.tfstate"
VARIABLES_NAME = "variables.tfvars.json"
PARALLELISM = "10"


class TerraformFailed(UserError):
    """It ended with `faults`; what exists is in the state."""

    def __init__(self, sentence: str, faults: tuple[str, ...] = ()) -> None:
        super().__init__(sentence)
        self.faults = faults


class Terraform:
    """One module and its state.

    Args:
        module: `base` or `cluster`, a folder of infra/terraform.
        folder: where state, log and the module's copy are.
        say: takes a line of progress.
        environment: added to the process's own.
    """

    def __init__(
        self,
        module: str,
        folder: Path,
        say: Callable[[str], Any] = lambda line: None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.module, self.folder = module, folder.absolute()
        self._say = say
        self._environment = environment_of(self.folder) | (environment or {})
        self.log = self.folder / "terraform.log"

    @property
    def state_path(self) -> Path:
        return self.folder / STATE_NAME

    def fingerprint(self, variables: dict[str, Any]) -> str:
        """Of module and variables: another one asks for an apply."""
        digest = hashlib.sha256(json.dumps(variables, sort_keys=True).encode())
        for path in module_files(self.module):
            digest.update(path.relative_to(SOURCE).as_posix().encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def apply(self, variables: dict[str, Any]) -> None:
        """Make what is missing, change what differs.

        Raises:
            TerraformFailed: with Terraform's first error. KeyboardInterrupt: its state is saved.
        """
        self._copy_module()
        self.take_variables(variables)
        self._init()
        self._keep_buckets()
        self._run("apply", "-auto-approve", f"-parallelism={PARALLELISM}", *self._files())

    def destroy(self) -> None:
        """Remove all that the state names; nothing where there is none. Raises as `apply`."""
        if not self.resources():
            return
        if not self._module_folder.is_dir():  # the state came from S3
            self._copy_module()
        self._init()
        self._run("destroy", "-auto-approve", f"-parallelism={PARALLELISM}", *self._files())

    def outputs(self) -> dict[str, Any]:
        """From the state, without asking Terraform; empty where nothing was applied."""
        return {name: output.get("value") for name, output in self._state().get("outputs", {}).items()}

    def resources(self) -> list[str]:
        """Addresses of what there is, data sources left out."""
        found = []
        for resource in self._state().get("resources", ()):
            if resource.get("mode") == "managed" and resource.get("instances"):
                prefix = f"{resource['module']}." if resource.get("module") else ""
                found.append(f"{prefix}{resource['type']}.{resource['name']}")
        return found

    def variables(self) -> dict[str, Any]:
        """Those of the last apply; empty where there was none."""
        try:
            known: dict[str, Any] = json.loads((self.folder / VARIABLES_NAME).read_text(encoding="utf-8"))
            return known
        except (OSError, ValueError):
            return {}

    def take_variables(self, variables: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps(variables, indent=1, sort_keys=True) + "\n"
        write_atomically(self.folder / VARIABLES_NAME, content.encode())

    def serial(self) -> int:
        """Grows with each change of the state; -1 for none."""
        return int(self._state().get("serial", -1))

    def take_state(self, content: bytes) -> bool:
        """Put a copy of the state in place of an older one, or of none; whether that was done."""
        try:
            other = json.loads(content)
            serial, lineage = int(other["serial"]), other["lineage"]
        except (ValueError, KeyError, TypeError):
            return False
        mine = self._state()
        if mine and (mine.get("lineage") != lineage or int(mine.get("serial", -1)) >= serial):
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.state_path, content)
        return True

    def _state(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads(self.state_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            raise UserError(
                f"{self.state_path} is damaged: put {self.state_path}.backup in its place, or remove it and "
                "the copy in S3 is taken"
            ) from None
        return state if isinstance(state, dict) else {}

    @property
    def _module_folder(self) -> Path:
        return self.folder / "module" / "infra" / "terraform" / self.module

    def _copy_module(self) -> None:
        target = self.folder / "module" / "infra"
        for path in module_files(self.module):
            copy = target / path.relative_to(SOURCE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.is_file() or copy.read_bytes() != path.read_bytes():
                shutil.copyfile(path, copy)
        wanted = {target / path.relative_to(SOURCE) for path in module_files(self.module)}
        for stale in target.rglob("*.tf"):
            if stale not in wanted:
                stale.unlink()

    def _files(self) -> list[str]:
        return [
            f"-state={self.state_path}",
            f"-var-file={self.folder / VARIABLES_NAME}",
            "-input=false",
            "-json",
        ]

    def _keep_buckets(self) -> None:
        """A bucket whose making was interrupted is marked for replacement; it is whole, and may be full."""
        for resource in self._state().get("resources", ()):
            marked = any(instance.get("status") == "tainted" for instance in resource.get("instances", ()))
            if resource.get("type") == "aws_s3_bucket" and marked:
                address = f"aws_s3_bucket.{resource['name']}"
                self._plain("untaint", f"-state={self.state_path}", address)

    def _init(self) -> None:
        words = ["init", "-input=false", "-no-color"]
        if mirror := os.environ.get("TF_PLUGIN_MIRROR"):
            words.append(f"-plugin-dir={mirror}")
        check_version()
        done = self._plain(*words)
        if done.returncode:
            reason = plain_error(done.stderr)
            raise TerraformFailed(
                f"terraform init failed ({reason}): check the network, or set TF_PLUGIN_MIRROR to a folder "
                f"of providers; all of it is in {self.log}"
            )

    def _plain(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A short command; what it says goes into the log."""
        done = subprocess.run(
            [binary(), f"-chdir={self._module_folder}", *words],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(done.stdout + done.stderr)
        return done

    def _run(self, command: str, *words: str) -> None:
        """Stream its JSON lines into the log; a Ctrl-C is acted on when it has ended (see `Interrupts`)."""
        began = time.monotonic()
        process = subprocess.Popen(
            [binary(), f"-chdir={self._module_folder}", command, *words],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # the terminal's Ctrl-C does not reach it
        )
        assert process.stdout is not None
        faults: list[str] = []
        with Interrupts(process) as interrupts, self.log.open("a", encoding="utf-8") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                self._understand(line, faults)
            code = process.wait()
        if interrupts.count:
            raise KeyboardInterrupt
        if code:
            raise TerraformFailed(failure(command, self.module, faults, self.log), tuple(faults))
        self._say(f"{command} of {self.module}: done in {time.monotonic() - began:.0f} s")

    def _understand(self, line: str, faults: list[str]) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            if "rror" in line:
                faults.append(line.strip())
            return
        kind = event.get("type")
        if kind == "diagnostic" and event.get("@level") == "error":
            said = event.get("diagnostic", {})
            detail = " ".join(str(said.get("detail", "")).split())
            faults.append(f"{said.get('summary', '')}{': ' + detail if detail else ''}")
        elif kind == "apply_complete":
            hook = event.get("hook", {})
            done = {"create": "made", "delete": "removed", "update": "changed"}.get(
                hook.get("action", ""), ""
            )
            if done:
                address = hook.get("resource", {}).get("addr", "")
                self._say(f"  {done} {address} ({hook.get('elapsed_seconds', 0):.0f} s)")
