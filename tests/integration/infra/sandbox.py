"""An instance without a cloud: the rendered user data below a temporary root, and its main service run.

The scripts, the units and the agent are the real ones. What would touch the machine (`shutdown`, `mount`,
`mdadm`, …) is replaced by stubs that write down their calls, `aws` by one that asks moto, `torchrun` by one
that plays scenes, where a test wants that.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import itertools
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from infra.layout import Job, Keys
from tests.conftest import ROOT
from tests.integration.s3_server import SECRET, Bucket

BOOTSTRAP = ROOT / "infra" / "bootstrap"
HERE = Path(__file__).parent
STUBS = ("mount", "mdadm", "mkfs.ext4", "shutdown", "poweroff", "apt-get", "sudo", "docker", "pip")
TOPIC = "arn:aws:sns:us-east-1:123456789012:sprint-mine"
DEPLOYMENT = "mine"
SPOT_GROUP, FALLBACK_GROUP = "sprint-mine-spot", "sprint-mine-on-demand"


def bootstrap_files() -> dict[str, str]:
    """Path on the instance → gzipped and encoded content, as the cluster module passes them on."""
    files = {}
    for path in sorted(BOOTSTRAP.iterdir()):
        if path.suffix != ".tftpl":
            folder = "/etc/systemd/system" if path.suffix else "/usr/local/sbin"
            files[f"{folder}/{path.name}"] = base64.b64encode(
                gzip.compress(path.read_bytes(), mtime=0)
            ).decode()
    return files


def user_data_variables(bucket: str = "a-bucket", **changes: Any) -> dict[str, Any]:
    return {
        "deployment": DEPLOYMENT,
        "bucket": bucket,
        "region": "us-east-1",
        "groups": [SPOT_GROUP, FALLBACK_GROUP],
        "group": SPOT_GROUP,
        "market": "spot",
        "topic_arn": TOPIC,
        "code_key": f"code/{'0' * 64}.tar.gz",
        "code_sha256": "0" * 64,
        "deadline": int(time.time()) + 7200,
        "image": "",
        "wheels": "",
        "num_nodes": 1,
        "files": bootstrap_files(),
    } | changes


def render(variables: dict[str, Any]) -> str:
    """The user data, with as much of Terraform's template language as it uses."""
    text = (BOOTSTRAP / "user_data.yaml.tftpl").read_text()
    loop = re.search(r"%\{ for path, content in files ~\}\n(.*?)%\{ endfor ~\}\n", text, re.DOTALL)
    assert loop is not None
    bodies = ""
    for path, content in sorted(variables["files"].items()):
        mode = "0755" if path.startswith("/usr/local/sbin/") else "0644"
        body = re.sub(r"\$\{startswith.*?\}", mode, loop[1])
        bodies += body.replace("${path}", path).replace("${content}", content)
    text = text.replace(loop[0], bodies).replace('${join(" ", groups)}', " ".join(variables["groups"]))
    return re.sub(r"\$\{(\w+)\}", lambda found: str(variables[found[1]]), text)


class Sandbox:
    """One instance.

    Args:
        root: its whole file system.
        scenes: what torchrun plays; None: the real torchrun.
    """

    def __init__(
        self,
        root: Path,
        bucket: Bucket,
        code_sha256: str,
        *,
        instance: str = "i-0001",
        scenes: list[dict[str, Any]] | None = None,
        wait_scale: float = 0.02,
        environment: dict[str, str] | None = None,
        **variables: Any,
    ) -> None:
        self.root, self.bucket, self.instance = root, bucket, instance
        self._variables = user_data_variables(
            bucket.name, code_key=f"code/{code_sha256}.tar.gz", code_sha256=code_sha256, **variables
        )
        self.calls_file = root / "calls.jsonl"
        self.notice_file = root / "noticed"
        root.mkdir(parents=True, exist_ok=True)
        self._write_user_data()
        self._write_stubs(scenes)
        (root / "var/lib/cloud/data").mkdir(parents=True)
        (root / "var/lib/cloud/data/instance-id").write_text(instance + "\n")
        self.environment = {
            "PATH": f"{root}/stubs:/usr/bin:/bin",
            "HOME": str(root),
            "LANG": "C.UTF-8",
            "SPRINT_ROOT": str(root),
            "SPRINT_PYTHON": sys.executable,
            "SPRINT_WAIT_SCALE": str(wait_scale),
            "SKIP_FFCV": "1",
            "SPRINT_PAUSE": "0",
            "SPRINT_END_PAUSE": "0",
            "SPRINT_ADDRESS": "127.0.0.1",
            "STUB_CALLS": str(self.calls_file),
            "STUB_FAULTS": str(root / "faults.json"),
            "STUB_SCENES": str(root / "scenes.json"),
            "STUB_NOTICE": str(self.notice_file),
            "AWS_ENDPOINT_URL": bucket.server.url,
            "AWS_ACCESS_KEY_ID": "dummy",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_MAX_ATTEMPTS": "2",
            "AWS_EC2_METADATA_DISABLED": "true",
            "S3_MAX_WAIT_SECONDS": "0.05",
            "S3_MAX_ATTEMPTS": "3",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "TMPDIR": str(root / "tmp"),
        } | (environment or {})
        (root / "tmp").mkdir()
        self.process: subprocess.Popen[bytes] | None = None
        self.trouble = ""  # of whoever ran it

    # What a test does

    def put_job(self, recipe: str = "data: {path: there}\n", **changes: Any) -> Job:
        job = Job(
            **{
                "deployment": DEPLOYMENT,
                "bucket": self.bucket.name,
                "region": "us-east-1",
                "recipe": Keys(DEPLOYMENT).recipe,
                "data": self.bucket.at("data/small"),
                "ranks_per_node": 2,
                "deadline": self._variables["deadline"],
                "usd_per_hour": 1.5,
                "max_attempts": 3,
            }
            | changes
        )
        self.bucket.put(Keys(DEPLOYMENT).job, job.to_json())
        self.bucket.put(Keys(DEPLOYMENT).recipe, recipe.encode())
        return job

    def fail(self, **faults: int) -> None:
        """`s3_cp=2`: so many calls of `aws s3 cp` fail."""
        named = {name.replace("_", " ", 1).replace("_", "-"): count for name, count in faults.items()}
        (self.root / "faults.json").write_text(json.dumps(named))

    def start(self) -> None:
        """As systemd starts the main service."""
        self.process = subprocess.Popen(
            shlex.split(self.unit("sprint.service")["ExecStart"]),
            env=self.environment,
            start_new_session=True,
        )

    def finish(self, seconds: float = 90) -> int:
        """As systemd waits for it; where it fails, OnFailure's service is run. Returns its exit code."""
        assert self.process is not None
        try:
            code = self.process.wait(seconds)
        finally:
            self.kill()
        unit = self.unit("sprint.service")
        if code != 0:
            self.run_unit(unit["OnFailure"])
        return code

    def run(self, seconds: float = 90) -> int:
        self.start()
        return self.finish(seconds)

    def run_unit(self, name: str) -> int:
        words = shlex.split(self.unit(name)["ExecStart"])
        return subprocess.run(words, env=self.environment, timeout=60).returncode

    def kill(self) -> None:
        """What KillMode leaves: everything of the service's group is gone."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def power_cut(self) -> None:
        """All processes of this instance at once, as when the machine is taken; no more is run."""
        for _ in range(3):  # whoever was just starting somebody
            for pid in self._pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        if self.process is not None:
            self.process.wait(20)

    def wait_for(self, what: Any, seconds: float = 60) -> Any:
        """Until `what()` is true; its value."""
        until = time.monotonic() + seconds
        while not (value := what()):
            assert time.monotonic() < until, self.logs()
            assert self.process is None or self.process.poll() is None, self.logs()
            time.sleep(0.05)
        return value

    # What it looks at

    def unit(self, name: str) -> dict[str, str]:
        """Settings of a unit; paths below the root."""
        lines = (self.root / "etc/systemd/system" / name).read_text().splitlines()
        settings = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
        if "ExecStart" in settings:
            settings["ExecStart"] = str(self.root) + settings["ExecStart"]
        return settings

    def calls(self, *words: str) -> list[list[str]]:
        """Calls of stubs that begin with these words, in their order."""
        if not self.calls_file.exists():
            return []
        calls = [json.loads(line) for line in self.calls_file.read_text().splitlines()]
        made = [[call["command"], *call["words"]] for call in calls if call.get("code", 0) == 0]
        return [call for call in made if tuple(call[: len(words)]) == words]

    def billing_calls(self) -> list[str]:
        """What ended billing, in its order: `0 GROUP`, `suspend GROUP`, `shutdown`."""
        said = []
        for call in self.calls():
            options = dict(itertools.pairwise(call))
            group = options.get("--auto-scaling-group-name", "")
            if call[:3] == ["aws", "autoscaling", "set-desired-capacity"]:
                said.append(f"{options['--desired-capacity']} {group}")
            elif call[:3] == ["aws", "autoscaling", "suspend-processes"]:
                said.append(f"suspend {group}")
            elif call[0] == "shutdown":
                said.append(" ".join(call))
        return said

    def record(self, key: str) -> dict[str, Any]:
        return dict(json.loads(self.bucket.get(key)))

    def node(self) -> dict[str, Any]:
        try:
            return self.record(Keys(DEPLOYMENT).node(self.instance))
        except self.bucket.s3.exceptions.NoSuchKey:
            return {}

    def end(self) -> dict[str, Any]:
        return self.record(Keys(DEPLOYMENT).end)

    def events(self) -> list[dict[str, Any]]:
        files = self.bucket.files(Keys(DEPLOYMENT).history)
        return [json.loads(files[name]) for name in sorted(files)]

    def shipped_log(self, name: str) -> str:
        pieces = self.bucket.files(f"{Keys(DEPLOYMENT).logs}{self.instance}/")
        ours = sorted(key for key in pieces if re.fullmatch(rf"{name}-\d{{6}}\.log", key))
        return b"".join(pieces[key] for key in ours).decode()

    def logs(self) -> str:
        """All logs on the instance, for the message of a failed test."""
        files = sorted((self.root / "var/log/sprint").glob("*.log"))
        ends = [f"==> {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in files]
        return "\n".join([self.trouble, *ends])

    # How it is made

    def _write_user_data(self) -> None:
        content = yaml.safe_load(render(self._variables))
        self.commands = content["runcmd"]
        for file in content["write_files"]:
            path = self.root / file["path"].lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            data = file["content"].encode()
            if file.get("encoding") == "gz+b64":
                data = gzip.decompress(base64.b64decode(data))
            path.write_bytes(data)
            path.chmod(int(file["permissions"], 8))

    def _write_stubs(self, scenes: list[dict[str, Any]] | None) -> None:
        stubs, venv = self.root / "stubs", self.root / "opt/sprint/venv/bin"
        stubs.mkdir()
        venv.mkdir(parents=True)
        record = (
            'words=""; for word in "$@"; do words="$words${words:+, }\\"${word//[\\"\\\\]/}\\""; done\n'
            'printf \'{"command": "%s", "words": [%s]}\\n\' "${0##*/}" "$words" >>"$STUB_CALLS"\n'
        )
        for name in STUBS:
            _script(stubs / name, record)
        _script(stubs / "apt-get", record + "exit 100\n")
        _script(stubs / "systemctl", record + 'cat "$SPRINT_ROOT/service-state" 2>/dev/null || echo active\n')
        _script(stubs / "mountpoint", record + 'grep -qxF "${*: -1}" "$SPRINT_ROOT/mounted" 2>/dev/null\n')
        _script(stubs / "nvidia-smi", record + 'cat "$SPRINT_ROOT/gpus" 2>/dev/null || exit 9\n')
        _script(stubs / "aws", f'exec {sys.executable} -S -E {HERE / "stub_aws.py"} "$@"\n')
        # The environment that is there already, found where an instance's would be.
        _script(venv / "python", f'exec {sys.executable} "$@"\n')
        _script(venv / "pip", record)
        if scenes is None:
            (venv / "torchrun").symlink_to(Path(sys.executable).with_name("torchrun"))
        else:
            _script(venv / "torchrun", f'exec {sys.executable} -S {HERE / "stub_torchrun.py"} "$@"\n')
            (self.root / "scenes.json").write_text(json.dumps(scenes))
            check = (
                'if [ "$1 $2 $3" = "-m train check" ]; then\n'
                '  cat "$SPRINT_ROOT/check" 2>/dev/null; [ ! -e "$SPRINT_ROOT/check" ]; exit\nfi\n'
            )
            _script(venv / "python", f'{check}exec {sys.executable} "$@"\n')

    def _pids(self) -> list[int]:
        marker, found = f"SPRINT_ROOT={self.root}\0".encode(), []
        for path in Path("/proc").iterdir():
            if path.name.isdigit() and int(path.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if marker in (path / "environ").read_bytes():
                        found.append(int(path.name))
        return found


def _script(path: Path, body: str) -> None:
    path.write_text("#!/usr/bin/env bash\n" + body)
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
