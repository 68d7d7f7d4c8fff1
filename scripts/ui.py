"""The MLflow UI on this machine only: `make ui`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from train.config import TrackingSection
from train.tracking.mlflow_run import tracking_uri


def main() -> int:
    parser = argparse.ArgumentParser(description="serve the MLflow UI on 127.0.0.1")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--port", type=int, default=5000)
    options = parser.parse_args()
    uri = tracking_uri(TrackingSection(), options.runs)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        print("error: there is no run yet: make demo makes one", file=sys.stderr)
        return 1
    artifacts = (options.runs / "mlartifacts").resolve()
    print(f"MLflow UI: http://127.0.0.1:{options.port} (Ctrl-C ends it)", flush=True)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--artifacts-destination", str(artifacts), "--host", "127.0.0.1", "--port", str(options.port)]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    os.execve(sys.executable, command, environment)  # one process: Ctrl-C reaches it


if __name__ == "__main__":
    sys.exit(main())
