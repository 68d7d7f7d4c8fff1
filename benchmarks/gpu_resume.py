"""Killed on a GPU and resumed: does the run go on, and how far from an uninterrupted one does it end?

    python benchmarks/gpu_resume.py --data DATA

Bit-equality is promised in fp32 on CPUs only. Here two uninterrupted runs show how far apart the same recipe
ends by itself, beside one killed with SIGKILL in the middle and launched again; as it is, and with torch's
deterministic algorithms (without cuDNN's benchmark, which chooses anew in each process).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
HOW = ("as it is", "deterministic")
NUM_EPOCHS, KILL_AFTER_STEP = 60, 80
COMPARED = ("step", "epoch", "split", "loss", "top1", "top5", "learning_rate", "grad_norm")


def main() -> None:
    if sys.argv[1:2] == ["deterministic"]:
        return train_deterministically(sys.argv[2:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="a prepared data set")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--how", nargs="+", choices=HOW, default=list(HOW))
    options = parser.parse_args()
    rows = [
        "| | steps | killed at | tensors equal to the calm run | largest difference | rows of metrics equal |"
    ]
    rows.append("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        trainings = {
            (precision, how): {
                name: Training(Path(scratch), options.data, precision, how, name)
                for name in ("calm", "calm again", "killed")
            }
            for precision in options.precisions
            for how in options.how
        }
        everything = [training for group in trainings.values() for training in group.values()]
        try:
            are_done = [False]
            while not all(are_done):
                time.sleep(0.02)
                are_done = [training.poll() for training in everything]  # each of them each time
        finally:
            for training in everything:
                training.kill()
        for (precision, how), group in trainings.items():
            for name in ("calm again", "killed"):
                cells = compared(group["calm"], group[name])
                killed = group[name].killed_at or "–"
                rows.append(
                    f"| {precision}, {how}: {name} | {cells[0]} | {killed} | {' | '.join(cells[1:])} |"
                )
    print("\n".join(rows))


class Training:
    """One run: launched, killed where it should be, and launched again."""

    def __init__(self, scratch: Path, data: str, precision: str, how: str, name: str) -> None:
        self.folder = scratch / f"{precision}-{how}-{name}".replace(" ", "-")
        self.folder.mkdir()
        self.killed_at: int | None = None
        self._will_be_killed = name == "killed"
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(_recipe(data, precision, self.folder)))
        program = ["-m", "train"] if how == "as it is" else [str(Path(__file__).resolve()), "deterministic"]
        self._command = [sys.executable, *program, str(recipe)]
        self._launch()

    def _launch(self) -> None:
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with (self.folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": paths, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def poll(self) -> bool:
        """Whether it is done."""
        if (
            self._will_be_killed
            and self.killed_at is None
            and (step := self._newest_step()) >= KILL_AFTER_STEP
        ):
            self.kill()
            self.killed_at = step
            self._launch()
        code = self._process.poll()
        if code not in (None, 0):
            sys.exit(
                f"{self.folder.name} ended with code {code}:\n{(self.folder / 'log').read_text()[-3000:]}"
            )
        return code == 0

    def _newest_step(self) -> int:
        try:
            manifest = json.loads((self._run / "checkpoints" / "manifest.json").read_text())
        except (OSError, json.JSONDecodeError):
            return -1
        return max(entry["step"] for entry in manifest["checkpoints"])

    @property
    def _run(self) -> Path:
        return self.folder / "runs" / "resume"

    def last_state(self) -> dict[str, Any]:
        path = max((self._run / "checkpoints").glob("step-*.pt"), key=lambda path: path.stat().st_mtime)
        return torch.load(path, map_location="cpu", weights_only=True)

    def rows(self) -> list[dict[str, Any]]:
        lines = (self._run / "metrics.jsonl").read_text().splitlines()
        return [
            {name: value for name, value in json.loads(line).items() if name in COMPARED} for line in lines
        ]

    def was_resumed(self) -> bool:
        return "going on from" in (self.folder / "log").read_text()


def compared(calm: Training, other: Training) -> list[str]:
    if other.killed_at is not None and not other.was_resumed():
        sys.exit(f"{other.folder.name} began anew")
    first, second = calm.last_state(), other.last_state()
    ours, theirs = (
        list(_tensors([state["model"], state["ema"], state["optimizer"]])) for state in (first, second)
    )
    equal = sum(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    largest = max(float((a.double() - b.double()).abs().max()) for a, b in zip(ours, theirs, strict=True))
    rows, others = calm.rows(), other.rows()
    same = sum(a == b for a, b in zip(rows, others, strict=False))
    return [
        f"{second['progress']['step']} of {first['progress']['step']}",
        f"{equal} of {len(ours)}",
        f"{largest:.2g}",
        f"{same} of {len(rows)}, {len(others)} written",
    ]


def _tensors(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        if tree.numel():
            yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


def _recipe(data: str, precision: str, folder: Path) -> dict[str, Any]:
    return {
        "run": {"folder": str(folder / "runs"), "name": "resume", "preflight": False, "log_every_steps": 10},
        "data": {"path": data, "global_batch_size": 64, "resolution": 64, "num_workers": 1},
        "model": {"library": "timm", "name": "resnet18"},
        "optimizer": {"name": "sgd", "peak_lr": 0.05, "momentum": 0.9},
        "ema": {},
        "schedule": {"phases": [{"kind": "one_cycle", "epochs": NUM_EPOCHS}]},
        "validation": {"batch_size": 64, "resolution": 64, "every_epochs": 20},
        "precision": {"mode": precision},
        "checkpoint": {"every_steps": 7},
        "tracking": {"mlflow": False},
    }


def train_deterministically(words: list[str]) -> None:
    import train.loop as loop
    from train.__main__ import main as train_main

    torch.use_deterministic_algorithms(True, warn_only=True)
    build_run = loop.build_run

    def build(*arguments: Any) -> Any:
        run = build_run(*arguments)
        torch.backends.cudnn.benchmark = False
        return run

    loop.build_run = build
    sys.exit(train_main(words))


if __name__ == "__main__":
    main()
