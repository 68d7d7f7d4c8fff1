"""The main job from images to report, as a user would do it by hand; each command is shown.

    python scripts/demo.py                                  # the embedded data set
    python scripts/demo.py --source ../shared/data/intel    # photographs of one's own

Safe to interrupt: the same command goes on with what is finished.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DATA = Path("data")
RUNS = Path("runs")
NUM_RANKS = 2


def main() -> int:
    parser = argparse.ArgumentParser(description="the whole pipeline on a small data set")
    parser.add_argument("--source", type=Path, help="folder with images (default: generate a data set)")
    parser.add_argument("--recipe", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    options = parser.parse_args()
    began = time.monotonic()
    try:
        run_folder = run_pipeline(options.source, options.recipe, options.overrides)
    except subprocess.CalledProcessError as error:
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from there", file=sys.stderr)
        return 130
    if run_folder is None:
        return 1
    print_summary(run_folder, time.monotonic() - began)
    return 0


def run_pipeline(source: Path | None, recipe: Path, overrides: list[str]) -> Path | None:
    """All steps; the run's folder, or None where training did not finish (it has said why)."""
    name = data_set_name(source) if source else "synthetic"
    num_ranks = ranks_of_this_machine()
    if source is None:
        source = DATA / "synthetic-source"
        step("Generating the embedded data set")
        call(["-m", "data_prep", "generate", "--out", str(source)])
    folder = DATA / name
    step("Preparing FFCV shards")
    call(["-m", "data_prep", "prepare", "--source", str(source), "--out", str(folder), "--format", "ffcv"])

    run_name = next_run_name(f"{recipe.stem}-{name}")
    arguments = [str(recipe), f"data.path={folder}", f"run.name={run_name}", *fit(folder, recipe), *overrides]
    step("Checking the recipe")
    call(["-m", "train", "check", "--nproc-per-node", str(num_ranks), *arguments])
    step(f"Training on {num_ranks} rank(s)")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    call([*launcher, "-m", "train", *arguments], threads=max(1, (os.cpu_count() or 1) // num_ranks))
    run_folder = RUNS / run_name
    status = read_json(run_folder / "status.json")
    if status.get("status") != "finished":
        reason = status.get("reason", "it was killed")
        print(f"training stopped ({reason}): make demo again goes on from there", file=sys.stderr)
        return None
    step("Evaluating the best checkpoint")
    call(["-m", "evaluation", str(run_folder), "--data", str(folder)])
    return run_folder


def data_set_name(source: Path) -> str:
    """The folder's name in plain letters; where nothing is left of it, a digest."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", source.resolve().name).strip("-.")
    return plain or hashlib.sha256(os.fsencode(source.resolve())).hexdigest()[:8]


def ranks_of_this_machine() -> int:
    """Two, on CPUs or GPUs; one where there is one GPU."""
    import torch

    return min(NUM_RANKS, torch.cuda.device_count()) if torch.cuda.is_available() else NUM_RANKS


def step(title: str) -> None:
    print(f"\n── {title}", flush=True)


def call(arguments: list[str], threads: int | None = None) -> None:
    """Run a command of this project and show it; Ctrl-C and errors are the command's own to report."""
    shown = shlex.join(["python", *arguments]).replace(
        "python -m torch.distributed.run --standalone", "torchrun --standalone"
    )
    print(f"$ {shown}", flush=True)
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)  # torchrun warns without it; each rank sets its own
    with subprocess.Popen([sys.executable, *arguments], env=environment) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # The terminal has sent it the same signal; give it the time to save.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            process.wait()
            raise
    if code:
        raise subprocess.CalledProcessError(code, arguments)


def fit(folder: Path, recipe: Path) -> list[str]:
    """Overrides for a data set too small for the recipe's batch (the rocks have 360 images)."""
    from train.config import load_recipe

    wanted = load_recipe(recipe, [f"data.path={folder}"]).data.global_batch_size
    count = read_json(folder / "manifest.json")["splits"]["train"]["num_samples"]
    size = wanted
    while size > NUM_RANKS and count // size < 10:
        size //= 2
    if size == wanted:
        return []
    print(f"{count} training images: steps of {size} instead of {wanted}")
    return [f"data.global_batch_size={size}"]


def next_run_name(base: str) -> str:
    """`base`, or `base-2` and so on past finished runs; an unfinished one is taken up."""
    name, number = base, 2
    while read_json(RUNS / name / "status.json").get("status") == "finished":
        name, number = f"{base}-{number}", number + 1
    return name


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def print_summary(run_folder: Path, seconds: float) -> None:
    summary = read_json(run_folder / "summary.json")
    resolution = summary["validation_resolution"]
    lines = [
        (
            "top-1 / top-5",
            f"{summary['final_top1']:.2%} / {summary['final_top5']:.2%} (last epoch, {resolution} px)",
        ),
        (
            "best epoch",
            f"{summary['best_epoch']} with {summary['best_top1']:.2%} (chosen on the same images)",
        ),
        ("speed", f"{summary['images_per_second']:,.0f} images/s in training"),
        ("time", f"{seconds / 60:.1f} min in all, {summary['wall_seconds'] / 60:.1f} min of training"),
        ("checkpoint", str(run_folder / "checkpoints" / "best.pt")),
        ("report", str((run_folder / "report" / "report.html").resolve())),
        ("MLflow UI", "make ui, then http://127.0.0.1:5000"),
    ]
    if summary["cost_usd"] is not None:
        from train.config import load_recipe
        from train.cost import find_price

        price = find_price(load_recipe(run_folder / "recipe.yaml").budget)
        cost = f"${summary['cost_usd']:.2f}, had this time been spent on {price.source}" if price else ""
        lines.insert(4, ("cost", f"{cost}; a GPU is far faster"))
    step("Summary")
    for label, text in lines:
        print(f"  {label:<14}{text}")


if __name__ == "__main__":
    sys.exit(main())
