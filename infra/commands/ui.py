"""`python -m infra ui [NAME]`: MLflow in the browser of this machine.

Filled live from the run's records in S3, into SQLite below STATE_DIR/ui; or, where the lasting part has an
MLflow server (`up --mlflow`), a port-forward to that one through SSM: nothing is open to the network.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from infra.cloud import Cloud
from infra.console import Console
from infra.deployment import Deployment
from infra.errors import UserError
from infra.layout import End, Keys, read_record

POLL_SECONDS = 5.0
SERVER_PORT = 5000
PLUGIN = "https://docs.aws.amazon.com/systems-manager/latest/userguide/session-manager-working-with-install-plugin.html"
ENDS = {"finished": "finished", "failed": "failed"}  # of a deployment → of its run; the others were stopped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a deployment (default: the only one)")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--local", action="store_true", help="from S3, even if there is an MLflow server")
    parser.add_argument("--once", action="store_true", help="fill MLflow's database, and end")


def run(options: argparse.Namespace, console: Console) -> int:
    cloud = Cloud.open(options, console)
    base = cloud.find_base()
    server = str((base.outputs if base else {}).get("mlflow_instance_id") or "")
    if server and not options.local and not options.once:
        return _forward(cloud, server, options.port, console)
    deployment = cloud.choose(options.name)
    if deployment.kind == "prepare":
        raise UserError(
            f"{deployment.name} prepares data: python -m infra logs {deployment.name} shows how far"
        )
    root = options.state_dir / "ui"
    folder = root / deployment.name
    follow = _follow_words(cloud, deployment, folder)
    if options.once:
        code = subprocess.run([*follow, "--once", *_ending(cloud, deployment)], check=False, stdout=2)
        console.result({"deployment": deployment.name, "database": str(root / "mlflow.db")})
        return code.returncode
    _refuse_taken(options.port)
    return _serve(cloud, deployment, follow, root, options.port, console)


def _follow_words(cloud: Cloud, deployment: Deployment, folder: Path) -> list[str]:
    keys = Keys(deployment.name)
    words = [sys.executable, "-m", "train", "follow", cloud.location(keys.run), str(folder)]
    words += ["--live", cloud.location(keys.report)]
    # The laptop's own server would get the rows otherwise; this one is filled from scratch at any time.
    return [*words, "--uri", f"sqlite:///{(folder.parent / 'mlflow.db').absolute()}"]


def _ending(cloud: Cloud, deployment: Deployment) -> list[str]:
    """What `follow` is to say of the run: words for its command line, none while it runs."""
    try:
        end = read_record(End, cloud.folder.read(Keys(deployment.name).end))
    except (FileNotFoundError, ValueError):
        return []
    return ["--end", ENDS.get(end.status, "stopped")]


def _serve(
    cloud: Cloud, deployment: Deployment, follow: list[str], root: Path, port: int, console: Console
) -> int:
    """Fill and serve until Ctrl-C."""
    root.mkdir(parents=True, exist_ok=True)
    follower = subprocess.Popen([*follow, *_ending_once(cloud, deployment)], stdout=2)
    server: subprocess.Popen[bytes] | None = None
    has_ended = bool(_ending(cloud, deployment))
    try:
        while not (root / "mlflow.db").is_file():
            if follower.poll() not in (None, 0):
                raise UserError("MLflow was not filled: see above")
            time.sleep(0.5)
        server = subprocess.Popen(server_words(root, port), env=server_environment(root))
        console.say(f"MLflow UI of {deployment.name}: http://127.0.0.1:{port} (Ctrl-C ends it)")
        while server.poll() is None:
            if not has_ended and (ending := _ending(cloud, deployment)):
                has_ended = True
                follower.terminate()
                follower.wait()
                follower = subprocess.Popen([*follow, "--once", *ending], stdout=2)
            if not has_ended and follower.poll() is not None:
                console.warn("the page is no longer filled: see above, and start ui again")
                has_ended = True
            time.sleep(POLL_SECONDS if not has_ended else 1.0)
        return server.returncode
    finally:
        for process in (follower, server):
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait()


def _ending_once(cloud: Cloud, deployment: Deployment) -> list[str]:
    ending = _ending(cloud, deployment)
    return ["--once", *ending] if ending else []


def server_words(root: Path, port: int) -> list[str]:
    artifacts = (root / "mlartifacts").absolute()
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    return [*words, "--artifacts-destination", str(artifacts)]


def server_environment(root: Path) -> dict[str, str]:
    return os.environ | {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{(root / 'mlflow.db').absolute()}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }


def _forward(cloud: Cloud, instance: str, port: int, console: Console) -> int:
    """A tunnel to the server, until Ctrl-C."""
    if shutil.which("aws") is None or shutil.which("session-manager-plugin") is None:
        raise UserError(
            f"the way to the MLflow server needs the AWS CLI and its Session Manager plugin ({PLUGIN}): "
            "install them, or use --local, which shows the same run from S3"
        )
    _refuse_taken(port)
    console.say(
        f"MLflow server {instance}: http://127.0.0.1:{port} (Ctrl-C ends the tunnel; the server stays)"
    )
    return subprocess.run(forward_words(cloud.region, instance, port), check=False).returncode


def forward_words(region: str, instance: str, port: int) -> list[str]:
    words = ["aws", "ssm", "start-session", "--region", region, "--target", instance]
    words += ["--document-name", "AWS-StartPortForwardingSession"]
    return [*words, "--parameters", f"portNumber={SERVER_PORT},localPortNumber={port}"]


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UserError(f"port {port} is taken on this machine: choose another with --port") from None
