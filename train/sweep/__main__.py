"""Command line of the sweep: arguments only.

python -m train.sweep configs/demo.yaml --trials 20 data.path=data/intel \
    optimizer.peak_lr=log:0.01..1 data.crop_scale.0=0.1..0.5 model.dropout=0..0.5:0.1 optimizer.name=sgd|adamw

The same command goes on with an interrupted sweep; a larger --trials adds to a finished one.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import subprocess
import sys
from pathlib import Path

from data_prep.storage import exclusive_lock, write_atomically
from train.config import Recipe, RecipeError, dump_recipe, load_recipe
from train.run_folder import RECIPE_NAME, recipe_differences
from train.sweep.space import FORMS, Space, Words, parse_words
from train.sweep.trial import StopRequest, training_command

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(arguments)
    words = parse_words(options.words)
    recipe, faults = find_faults(options, words)
    if recipe is None or faults:
        for fault in faults:
            print(f"error: {fault}", file=sys.stderr)
        return 1
    name = options.name or f"{options.recipe.stem}-sweep"
    stop = StopRequest()
    stop.install()
    try:
        return _sweep(options, recipe, words, recipe.run.folder / name, stop)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.sweep", description="search for the best values of recipe keys", epilog=FORMS
    )
    parser.add_argument("recipe", type=Path, help="a YAML file of configs/")
    parser.add_argument("words", nargs="*", metavar="section.key=value|space")
    parser.add_argument(
        "--trials", type=int, required=True, help="how many in all, interrupted ones included"
    )
    parser.add_argument("--nproc-per-node", type=int, default=1, help="ranks of each training")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of values")
    parser.add_argument("--metric", choices=("top1", "top5", "loss"), default="top1")
    parser.add_argument("--no-pruning", action="store_true", help="let every trial train to its end")
    parser.add_argument("--name", help="folder in run.folder; otherwise the recipe's name with -sweep")
    return parser


def find_faults(options: argparse.Namespace, words: Words) -> tuple[Recipe | None, list[str]]:
    """The recipe with its fixed overrides, and a sentence for all that is wrong with the command."""
    faults = [
        f"{flag} must be at least {least}"
        for flag, value, least in (
            ("--trials", options.trials, 1),
            ("--nproc-per-node", options.nproc_per_node, 1),
            ("--seed", options.seed, 0),
        )
        if value < least
    ]
    if options.name is not None and not NAME.fullmatch(options.name):
        faults.append(f"--name {options.name!r} must be letters, digits, dots, dashes and underscores")
    faults += words.faults
    if not words.spaces and not words.faults:
        faults.append(f"nothing to search: give at least one key a space ({FORMS})")
    recipe, recipe_faults = _load(options.recipe, words)
    return recipe, faults + recipe_faults


def _load(path: Path, words: Words) -> tuple[Recipe | None, list[str]]:
    """The recipe, and what is wrong with it at any end of any space."""
    try:
        recipe = load_recipe(path, words.fixed)
    except RecipeError:
        try:  # what is missing may be what is searched: data.path=data/a|data/b
            recipe = load_recipe(path, words.fixed + [f"{s.key}={s.ends[0]}" for s in words.spaces])
        except RecipeError as error:
            return None, [f"{path}: {fault}" for fault in error.faults]
    faults: list[str] = []
    for space in words.spaces:
        faults += [fault for fault in _faults_of(recipe, space) if fault not in faults]
    return recipe, faults


def _faults_of(recipe: Recipe, space: Space) -> list[str]:
    """Of the whole recipe with each end of one space; trials start from the same whole recipe."""
    import tempfile

    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / RECIPE_NAME
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        for end in space.ends:
            try:
                load_recipe(path, [f"{space.key}={end}"])
            except RecipeError as error:
                faults += [fault for fault in error.faults if fault not in faults]
    return faults


def _sweep(options: argparse.Namespace, recipe: Recipe, words: Words, folder: Path, stop: StopRequest) -> int:
    from train.sweep.study import Definition, open_study

    definition = Definition(tuple(words.spaces), options.metric, options.seed)
    differences = recipe_differences(folder, recipe)
    if differences:
        raise ValueError(
            f"sweep {folder.name} was started with another recipe ({'; '.join(differences[:5])}): choose "
            "another --name, or go back to that recipe"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder), contextlib.ExitStack() as stack:
        write_atomically(folder / RECIPE_NAME, dump_recipe(recipe).encode())
        study = open_study(folder, definition, recipe.num_epochs, not options.no_pruning)
        stack.callback(study._storage.remove_session)
        return _run(options, recipe, definition, study, folder, stop)


def _run(options, recipe: Recipe, definition, study, folder: Path, stop: StopRequest) -> int:
    from train.sweep.page import PAGE_NAME
    from train.sweep.parent import ParentRun
    from train.sweep.runner import Sweep, finish, run_sweep
    from train.sweep.study import best_trial, ended_trials

    num_ended = len(ended_trials(study))
    if num_ended >= options.trials:
        print(f"all {num_ended} trials are there: {folder / PAGE_NAME}; a larger --trials adds to them")
        return 0
    if not _check(folder, options.nproc_per_node):
        return 1
    parent = ParentRun(recipe.tracking, folder, study.user_attrs.get("mlflow_run_id"), _say)
    if parent.run_id is not None:
        study.set_user_attr("mlflow_run_id", parent.run_id)
    parent.describe(
        {f"space.{space.key}": space.text for space in definition.spaces},
        {"sweep.metric": definition.metric, "sweep.seed": str(definition.seed)},
    )
    sweep = Sweep(
        folder, recipe, definition, study, parent, options.trials, options.nproc_per_node, stop, _say
    )
    if num_ended:
        _say(f"going on with {folder}: {num_ended} of {options.trials} trials are there")
    reason = run_sweep(sweep)
    finish(sweep, reason)
    _say(f"page: {folder / PAGE_NAME}")
    if stop.signal is not None:
        ended = sweep.num_ended
        ended_of = f"{ended} of {options.trials} trials"
        _say(f"stopped by {stop.signal.name} after {ended_of}; the same command goes on from there")
        return 130 if stop.signal == signal.SIGINT else 143
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    return 0 if best_trial(study) is not None else 1


def _check(folder: Path, num_ranks: int) -> bool:
    """What every launcher does before it starts a training."""
    words = ["check", str(folder / RECIPE_NAME), "--nproc-per-node", str(num_ranks), "run.name=check"]
    result = subprocess.run(training_command(words, 1), capture_output=True, text=True)
    sys.stderr.write(result.stderr if result.returncode else "")
    return result.returncode == 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
