"""What MLflow costs a training: steps a second without it, with a healthy server, and with one that hangs.

    python -m benchmarks.tracking_overhead --rounds 5

The worst case on purpose: a tiny model, a row of metrics in every step, and the server on the same cores as
the training. Each training has a process of its own, cases take turns, medians of the rounds are compared.
The first steps do not count (imports, MLflow's among them, allocation).

`hangs` accepts connections and never answers; `dies` is a healthy server that hangs from the middle on.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_prep.pipeline import PrepareOptions, prepare
from data_prep.sources import open_source
from tests.conftest import ROOT, write_image_folder
from tests.integration.mlflow_server import HANG, PASS, mlflow_server, proxy_before
from train.tracking.metrics_file import read_metrics

CASES = ("off", "healthy", "hangs", "dies")
BATCH_SIZE, NUM_IMAGES = 4, 800
RECIPE = """
data: {{path: {data}, loader: reference, num_workers: 0, global_batch_size: {batch}, resolution: 32}}
model: {{library: timm, name: test_resnet}}
optimizer: {{name: sgd, peak_lr: 0.05}}
schedule: {{phases: [{{kind: one_cycle, epochs: {epochs}}}]}}
validation: {{batch_size: 50, every_epochs: {epochs}}}
precision: {{mode: fp32}}
run: {{log_every_steps: {every}, preflight: false}}
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5, help=f"of {NUM_IMAGES // BATCH_SIZE} steps")
    parser.add_argument("--skip", type=int, default=200, help="steps before the clock starts")
    parser.add_argument("--log-every", type=int, default=1)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server and the training are ended, too
    speeds: dict[str, list[float]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write_recipe(folder, options)
        (folder / "server").mkdir()
        store = f"sqlite:///{folder / 'server' / 'mlflow.db'}"
        with mlflow_server(store, folder / "server") as server:
            for number in range(options.rounds):
                for case in CASES:
                    speeds[case].append(steps_per_second(recipe, folder, case, number, server.port, options))
                    print(f"round {number + 1} {case}: {speeds[case][-1]:.1f} steps/s", flush=True)
    print(f"\n| MLflow | steps/s, median of {options.rounds} (all) | of `off` |\n|---|---|---|")
    for case in CASES:
        each = ", ".join(f"{speed:.0f}" for speed in sorted(speeds[case]))
        ratio = statistics.median(speeds[case]) / statistics.median(speeds["off"])
        print(f"| {case} | {statistics.median(speeds[case]):.1f} ({each}) | {ratio:.3f} |")
    return 0


def write_recipe(folder: Path, options: argparse.Namespace) -> Path:
    source = write_image_folder(folder / "source", num_classes=4, num_train=NUM_IMAGES // 4, num_val=12)
    prepare(open_source(source), PrepareOptions(out=folder / "data", num_workers=1, progress=False))
    path = folder / "tiny.yaml"
    path.write_text(
        RECIPE.format(data=folder / "data", batch=BATCH_SIZE, epochs=options.epochs, every=options.log_every)
    )
    return path


def steps_per_second(
    recipe: Path, folder: Path, case: str, number: int, port: int, options: argparse.Namespace
) -> float:
    """Of a training in a process of its own, by the times of its rows."""
    with proxy_before(port) as proxy:
        proxy.always(HANG if case == "hangs" else PASS)
        words = [f"run.folder={folder}", f"run.name={case}-{number}"]
        words += ["tracking.mlflow=false"] if case == "off" else [f"tracking.uri={proxy.uri}"]
        path = folder / f"{case}-{number}" / "metrics.jsonl"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(
            [sys.executable, "-m", "train", str(recipe), *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            while case == "dies" and process.poll() is None:
                time.sleep(0.2)
                if path.is_file() and path.read_bytes().count(b"\n") * options.log_every > options.skip:
                    proxy.always(HANG)
                    break
            output = process.communicate()[0]
        finally:
            process.kill()
        if process.returncode != 0:
            raise SystemExit(output)
    rows = [row for row in read_metrics(path) if row["split"] == "train" and row["step"] >= options.skip]
    return (rows[-1]["step"] - rows[0]["step"]) / (rows[-1]["time"] - rows[0]["time"])


if __name__ == "__main__":
    sys.exit(main())
