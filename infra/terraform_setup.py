"""Around Terraform: which binary, in which environment, which files, and its errors as one line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from infra.errors import UserError

SOURCE = Path(__file__).parent
PARTS = ("terraform", "bootstrap")  # of infra/: what the modules read
OLDEST = (1, 9)
INSTALL = "https://developer.hashicorp.com/terraform/install"


def binary() -> str:
    """Terraform: on the path, or beside this Python, where scripts/setup.sh puts it.

    Raises:
        UserError: there is none.
    """
    beside = str(Path(sys.executable).parent)
    found = shutil.which("terraform") or shutil.which("terraform", path=beside)
    if found is None:
        raise UserError(
            f"Terraform is not installed: get it from {INSTALL} (1.9 or newer), and run this again"
        )
    return found


def check_version() -> None:
    """Raises UserError: Terraform is missing or too old."""
    done = subprocess.run(
        [binary(), "version", "-json"],
        env=os.environ | {"CHECKPOINT_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        version = str(json.loads(done.stdout)["terraform_version"])
        numbers = tuple(int(part) for part in version.split(".")[:2])
    except (ValueError, KeyError):
        raise UserError(f"terraform version says nothing of use ({plain_error(done.stderr)})") from None
    if numbers < OLDEST:
        raise UserError(f"Terraform {version} is too old: 1.9 or newer is needed, from {INSTALL}")


def environment_of(folder: Path) -> dict[str, str]:
    """The user's own, without what would send Terraform elsewhere; providers are downloaded once for all."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("TF_CLI_ARGS", "TF_VAR_"))
    }
    config = environment.get("TF_CLI_CONFIG_FILE")
    if config and not Path(config).is_file():
        del environment["TF_CLI_CONFIG_FILE"]
    if "TF_PLUGIN_MIRROR" not in environment:
        cache = Path(
            environment.setdefault("TF_PLUGIN_CACHE_DIR", str(Path.home() / ".terraform.d/plugin-cache"))
        )
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
        # The lock file lies with the state, and is made anew with it: the provider's version is exact.
        environment["TF_PLUGIN_CACHE_MAY_BREAK_DEPENDENCY_LOCK_FILE"] = "true"
    return environment | {
        "TF_IN_AUTOMATION": "1",
        "TF_DATA_DIR": str(folder / ".terraform"),
        "CHECKPOINT_DISABLE": "1",
    }


def module_files(module: str) -> list[Path]:
    """What is applied: the module, and what lies in infra/bootstrap; without states and tests."""
    found = []
    for part in PARTS:
        root = SOURCE / part
        if part == "terraform":
            root = root / module
        found += [path for path in sorted(root.rglob("*")) if path.is_file() and _belongs(path, root)]
    return found


def _belongs(path: Path, root: Path) -> bool:
    inside = path.relative_to(root)
    if any(part.startswith(".") or part in ("tests", "__pycache__") for part in inside.parts):
        return False
    return not re.search(r"\.(tfstate|tfstate\..*|tfvars|tfvars\.json|tftest\.hcl|pyc)$", path.name)


def failure(command: str, module: str, faults: list[str], log: Path) -> str:
    first = re.sub(r"\s+", " ", faults[0])[:500].rstrip(".") if faults else "it gave no reason"
    return f"terraform {command} of {module} failed: {first}; run the same command again to go on; log: {log}"


def plain_error(text: str) -> str:
    """The first error of a plain text."""
    lines = [re.sub(r"[│╷╵]", "", re.sub(r"\x1b\[[0-9;]*m", "", line)).strip() for line in text.splitlines()]
    errors = [line.removeprefix("Error:").strip() for line in lines if line.startswith("Error:")]
    return (errors or [line for line in lines if line] or ["it said nothing"])[0][:200]


class Interrupts:
    """Ctrl-C while Terraform works.

    Cut off in the middle of a request, its provider forgets what AWS has made, and the next apply meets that
    as a stranger. So the first Ctrl-C only ends what comes after Terraform; the second lets it give up what
    it waits for; more are not passed on, since they would lose its state.
    """

    WORDS = (
        b"\nstopping when Terraform has ended (a minute or two), so that nothing is left half made; "
        b"Ctrl-C again stops it where it stands\n",
        b"\nTerraform gives up what it waits for, and saves its state\n",
    )

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process, self.count = process, 0
        self._former: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(self, *error: object) -> None:
        if self._former is not None:
            signal.signal(signal.SIGINT, self._former)

    def _on_interrupt(self, number: int, frame: object) -> None:
        self.count += 1
        if self.count <= len(self.WORDS):
            os.write(2, self.WORDS[self.count - 1])  # a print might be interrupted in a print
        if self.count == 2:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGINT)
