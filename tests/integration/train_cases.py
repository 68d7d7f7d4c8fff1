"""Trains several small recipes in one process a rank, which starts only once:

    torchrun --nproc-per-node=2 -m tests.integration.train_cases CASES.json

CASES.json: {"folder": …, "recipe": …, "cases": {name: {"overrides": […], "nan": {"rank": 1, "steps": [3]}}}}.
Each rank writes `<folder>/<name>/rank<n>.pt` (its weights, statistics and average), and `error.txt` where the
training failed.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from train import ending, loop
from train.config import load_recipe
from train.distributed import Ranks, distributed, exit_rank
from train.loss import TrainingLoss
from train.run_folder import open_run_folder


@contextlib.contextmanager
def nan_losses(ranks: Ranks, where: dict[str, Any] | None) -> Iterator[None]:
    """In some forward passes, counted from 0, the loss of one rank is not a number."""
    plain, count = TrainingLoss.forward, [0]

    def forward(self, *arguments):  # type: ignore[no-untyped-def]
        loss, logits = plain(self, *arguments)
        count[0] += 1
        if where is not None and ranks.rank == where["rank"] and count[0] - 1 in where["steps"]:
            loss = loss * float("nan")
        return loss, logits

    TrainingLoss.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        TrainingLoss.forward = plain  # type: ignore[method-assign]


def train_case(folder: Path, recipe_path: Path, name: str, case: dict[str, Any], ranks: Ranks) -> None:
    words = [f"run.folder={folder}", f"run.name={name}", *case["overrides"]]
    recipe = load_recipe(recipe_path, words)
    run_folder = ranks.on_primary(lambda: open_run_folder(recipe, name))
    seen: list[Any] = []
    plain = loop.finish_run

    def finish(run, reason):  # type: ignore[no-untyped-def]
        seen.append(run)
        return plain(run, reason)

    loop.finish_run = ending.finish_run = finish  # type: ignore[assignment]
    try:
        with nan_losses(ranks, case.get("nan")):
            loop.train(recipe, run_folder, ranks)
    except RuntimeError as error:
        (run_folder / f"error-{ranks.rank}.txt").write_text(str(error))
    finally:
        loop.finish_run = ending.finish_run = plain  # type: ignore[assignment]
    for run in seen:
        ema = None if run.ema is None else run.ema.model.state_dict()
        state = {"model": run.model.state_dict(), "ema": ema, "skipped": run.progress.skipped_steps}
        torch.save(state, run_folder / f"rank{ranks.rank}.pt")
    ranks.barrier()


def main() -> int:
    content = json.loads(Path(sys.argv[1]).read_text())
    with distributed() as ranks:
        for name, case in content["cases"].items():
            train_case(Path(content["folder"]), Path(content["recipe"]), name, case, ranks)
    return 0


if __name__ == "__main__":
    exit_rank(main())
