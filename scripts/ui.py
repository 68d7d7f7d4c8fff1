"""The MLflow UI, on this machine only unless told: `make ui`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from train.config import TrackingSection
from train.config.credentials import without_credentials
from train.tracking.mlflow_client import tracking_uri


def main() -> int:
    parser = argparse.ArgumentParser(description="serve the MLflow UI on 127.0.0.1")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="0.0.0.0 serves everybody who reaches this machine, without a password",
    )
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--allowed-hosts", help="names by which browsers may call it, where --host is given")
    options = parser.parse_args()
    uri = tracking_uri(TrackingSection(), options.runs)
    if importlib.util.find_spec("mlflow") is None:
        print("error: MLflow is not installed: pip install mlflow", file=sys.stderr)
        return 1
    if uri.startswith(("http://", "https://")):
        print(
            f"error: MLFLOW_TRACKING_URI is a server with a UI of its own: {without_credentials(uri)}",
            file=sys.stderr,
        )
        return 1
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        print("error: there is no run yet: make demo makes one", file=sys.stderr)
        return 1
    artifacts = (options.runs / "mlartifacts").resolve()
    print(f"MLflow UI: http://{options.host}:{options.port} (Ctrl-C ends it)", flush=True)
    command = [sys.executable, "-m", "mlflow", "server", "--artifacts-destination", str(artifacts)]
    command += ["--host", options.host, "--port", str(options.port)]
    if options.allowed_hosts:
        command += ["--allowed-hosts", options.allowed_hosts]
    # The address may hold a password, and everybody on a machine can read its command lines.
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
    os.execve(sys.executable, command, environment)  # one process: Ctrl-C reaches it


if __name__ == "__main__":
    sys.exit(main())
