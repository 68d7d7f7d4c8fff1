"""Command line of the training: arguments only.

python -m train check configs/demo.yaml data.path=data/intel
torchrun --nproc-per-node=2 -m train configs/demo.yaml data.path=data/intel optimizer.peak_lr=0.1
torchrun --nproc-per-node=2 --max-restarts=3 -m train RECIPE … # goes on by itself when a rank dies
python -m train sync runs/mine            # send MLflow what it missed
python -m train logs                      # refresh the table of logs.md from MLflow
python -m train fetch s3://bucket/runs/mine runs/mine      # its newest and best checkpoint, from its mirror
python -m train follow s3://bucket/runs/mine followed/mine # MLflow here, of a run that is elsewhere
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from train.config import Recipe, RecipeError, load_recipe


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["logs"]:
        from train.tracking.training_log import main as refresh_log

        return refresh_log(words[1:])
    if words[:1] == ["sync"]:
        from train.tracking.sync import main as sync

        return sync(words[1:])
    if words[:1] == ["fetch"]:
        from train.checkpoint.fetch import main as fetch

        return fetch(words[1:])
    if words[:1] == ["follow"]:
        from train.tracking.follow import main as follow

        return follow(words[1:])
    parser = argparse.ArgumentParser(
        prog="torchrun … -m train",
        description="train a recipe; `check` before the recipe only says what is wrong with it",
        epilog="python -m train check RECIPE …; python -m train logs",
    )
    parser.add_argument("recipe", type=Path, help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--fork",
        action="store_true",
        help="with a changed recipe: go on from the run's newest checkpoint under the name NAME-fork",
    )
    only_check = words[:1] == ["check"]
    if only_check:
        parser.add_argument("--nproc-per-node", type=int, help="ranks that torchrun will start")
    options = parser.parse_intermixed_args(words[1:] if only_check else words)
    if only_check and options.nproc_per_node is not None and options.nproc_per_node < 1:
        parser.error("--nproc-per-node must be at least 1")
    try:
        recipe = load_recipe(options.recipe, options.overrides)
    except RecipeError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 1
    if only_check:
        return _check(recipe, options.recipe.stem, options.nproc_per_node, options.fork)
    return _train(recipe, options.recipe.stem, options.fork)


def _check(recipe: Recipe, default_name: str, world_size: int | None, fork: bool) -> int:
    from train.check import find_faults

    faults = find_faults(recipe, default_name, world_size, fork)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if not faults:
        print("the recipe and its data are fine")
    return 1 if faults else 0


def _train(recipe: Recipe, default_name: str, fork: bool) -> int:
    import contextlib
    import traceback

    from train.distributed import PrimaryError, distributed, lost_rank
    from train.loop import train
    from train.preemption import stop_with_parent
    from train.run_folder import (
        begin_run_folder,
        choose_run_folder,
        locked,
        read_status,
        restored_mirror,
        write_status,
    )
    from train.startup import Startup

    startup = Startup()
    stop_with_parent()
    rank = os.environ.get("RANK", "0")
    folder: Path | None = None
    mirror = None  # of the primary rank
    with contextlib.ExitStack() as stack:
        try:
            ranks = stack.enter_context(distributed())

            def open_and_lock() -> Path:
                nonlocal mirror
                opened = choose_run_folder(recipe, default_name, fork)
                stack.enter_context(locked(opened))
                mirror = restored_mirror(opened, recipe.checkpoint)
                begin_run_folder(opened, recipe)
                return opened

            folder = ranks.on_primary(open_and_lock)
            startup.mark("ranks")
            summary = train(recipe, folder, ranks, startup, mirror)
        except Exception as error:
            lost = lost_rank(error)
            sentence = lost or str(error) or type(error).__name__
            if not isinstance(error, ValueError | RuntimeError | OSError):
                traceback.print_exc()  # none of the faults that we know: somebody will want to see where
                sentence = f"{type(error).__name__}: {sentence}"
            if rank == "0" or not isinstance(error, PrimaryError):
                # In one piece: the ranks share a terminal.
                sys.stderr.write(f"error (rank {rank}): {sentence}\n")
            # The first to fail knows why; the others only see it leave.
            if folder is not None and "status" not in read_status(folder):
                write_status(folder, "restart" if lost else "failed", sentence)
            return 1
        except KeyboardInterrupt:
            print("interrupted before the checkpoint was written: the one before it stands", file=sys.stderr)
            return 130
        if summary is not None and ranks.is_primary:
            print(f"finished: final top-1 {summary['final_top1']:.2%}, summary in {folder / 'summary.json'}")
    return 0


def _entry() -> None:
    code = main()
    if "WORLD_SIZE" not in os.environ:
        sys.exit(code)
    from train.distributed import exit_rank

    exit_rank(code)


if __name__ == "__main__":
    _entry()
