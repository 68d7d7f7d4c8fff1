"""The command `kfold`: train a model a fold, and judge each training image by the one that never saw it.

python -m evaluation kfold configs/demo.yaml --folds 5 data.path=data/intel
python -m evaluation kfold configs/demo.yaml --folds 5 --nproc 4 --out runs/intel-kfold data.path=data/intel

Each fold is an ordinary training in a process of its own, with `data.fold` set: `OUT/NAME-fold0` is its run
folder. The same command goes on with an interrupted one; folds that are finished are left as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_prep.manifest import Manifest, load_manifest
from data_prep.storage import exclusive_lock, is_s3, write_atomically
from evaluation.files import utf8_bytes
from evaluation.kfold.folds import check_data, different_weights, predict_fold, steered_by_folds
from evaluation.kfold.page import kfold_json, kfold_page, spread_text
from evaluation.kfold.results import KfoldResults, out_of_fold, save_out_of_fold, summarize
from evaluation.text import count_text, percent_text
from train.config import Recipe, dump_recipe, load_recipe
from train.data.staging import stage
from train.run_folder import RECIPE_NAME, is_finished, recipe_differences
from train.sweep.parent import ParentRun
from train.sweep.trial import StopRequest, TrialStart, run_trial, training_command, wait_for_orphan
from train.tracking.console import duration
from train.tracking.mlflow_client import tracking_uri

DESCRIPTION = "k-fold cross-validation: a training a fold, figures over folds, out-of-fold predictions"
PAGE_NAME, TABLE_NAME, PREDICTIONS_NAME = "kfold.html", "kfold.json", "oof.npz"
OWN_KEYS = {
    "data.folds": "--folds says it",
    "data.fold": "each fold has its own",
    "tracking.parent_run_id": "the cross-validation is the parent of its folds",
}


@dataclass(frozen=True)
class Kfold:
    """A cross-validation under way.

    Attributes:
        folder: of all of it. recipe: of fold 0. name: what the folds' names begin with.
    """

    folder: Path
    recipe: Recipe
    name: str
    num_folds: int
    num_ranks: int

    def run_folder(self, fold: int) -> Path:
        return self.folder / f"{self.name}-fold{fold}"

    @property
    def run_folders(self) -> list[Path]:
        return [self.run_folder(fold) for fold in range(self.num_folds)]

    @property
    def title(self) -> str:
        return f"{self.name}: {self.num_folds} folds of {self.recipe.data.name}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="a YAML file of configs/")
    parser.add_argument("words", nargs="*", metavar="section.key=value", help="changes to the recipe")
    parser.add_argument("--folds", type=int, default=5, help="how many (default: 5)")
    parser.add_argument("--nproc", type=int, default=1, help="ranks of each training (default: 1)")
    parser.add_argument("--out", type=Path, help="default: NAME-kfold in run.folder")


def run(options: argparse.Namespace) -> int:
    """Train what is missing, then predict and write; the exit code."""
    kfold = _kfold_of(options)
    folder = kfold.folder
    if differences := recipe_differences(folder, kfold.recipe):
        raise ValueError(
            f"{folder} was started with another recipe ({'; '.join(differences[:5])}): choose another --out, "
            "or go back to that recipe"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder):
        check_data(kfold.run_folders, _index_sha256(kfold.recipe), str(kfold.recipe.data.path))
        write_atomically(folder / RECIPE_NAME, dump_recipe(kfold.recipe).encode())
        if not _check(folder, kfold.num_ranks):
            return 1
        parent = ParentRun(kfold.recipe.tracking, folder, None, _say)
        parent.describe(
            {"data.folds": str(kfold.num_folds), "model.name": kfold.recipe.model.name}, {"kind": "kfold"}
        )
        try:
            stopped_by = _train_all(kfold, parent)
            if stopped_by is None:
                _evaluate(kfold, parent)
        except BaseException as error:
            parent.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", {}, [])
            raise
    if stopped_by is not None:
        parent.finish("KILLED", {}, [])
        _say(f"stopped by {stopped_by.name}; the same command goes on from there")
        return 130 if stopped_by == signal.SIGINT else 143
    return 0


def _kfold_of(options: argparse.Namespace) -> Kfold:
    for flag, value, least in (("--folds", options.folds, 2), ("--nproc", options.nproc, 1)):
        if value < least:
            raise ValueError(f"{flag} is {value}: it must be at least {least}")
    for word in options.words:
        key = word.partition("=")[0]
        if key in OWN_KEYS:
            raise ValueError(f"{key} cannot be set: {OWN_KEYS[key]}")
    words = [*options.words, f"data.folds={options.folds}", "data.fold=0"]
    recipe = load_recipe(options.recipe, words)
    name = recipe.run.name or options.recipe.stem
    folder = options.out or recipe.run.folder / f"{name}-kfold"
    return Kfold(folder, recipe, name, options.folds, options.nproc)


def _index_sha256(recipe: Recipe) -> str:
    """Of the train split; empty where there is none, of which the check will speak."""
    train = load_manifest(str(recipe.data.path)).splits.get("train")
    return "" if train is None else train.index.sha256


def _check(folder: Path, num_ranks: int) -> bool:
    """What every launcher does before it starts a training; its sentences go to the terminal."""
    # A name that no run has: a finished one would be refused.
    names = [f"run.folder={folder}", "run.name=check"]
    words = ["check", str(folder / RECIPE_NAME), "--nproc-per-node", str(num_ranks), *names]
    result = subprocess.run(training_command(words, 1), capture_output=True, text=True)
    sys.stderr.write(result.stderr if result.returncode else "")
    return result.returncode == 0


def _train_all(kfold: Kfold, parent: ParentRun) -> signal.Signals | None:
    """Train fold after fold; the signal that stopped it, or None.

    Raises:
        RuntimeError: a fold failed; names its log.
    """
    seconds: list[float] = []
    with _stop_request() as stop:
        for fold in range(kfold.num_folds):
            began = time.monotonic()
            was_there = is_finished(kfold.run_folder(fold))
            wait_for_orphan(kfold.run_folder(fold), stop, _say)
            if stop.signal is not None:
                return stop.signal
            start = _start_of(kfold, fold, parent)

            def say_epoch(epoch: int, top1: float, fold: int = fold) -> bool:
                _say(f"fold {fold} of {kfold.num_folds}  epoch {epoch}  top1 {top1:.2%}")
                return False  # nothing is pruned

            outcome = run_trial(start, "top1", say_epoch, stop)
            if stop.signal is not None and outcome.state != "complete":
                return stop.signal
            if outcome.state != "complete" or outcome.value is None:
                raise RuntimeError(
                    f"fold {fold} did not come to its end: {outcome.reason or outcome.state}; see "
                    f"{start.log}. The same command goes on from there"
                )
            if not was_there:
                seconds.append(time.monotonic() - began)
            _say(_fold_line(kfold, fold, outcome.value, was_there, seconds))
            parent.log_metrics({"kfold_fold_top1": outcome.value}, fold)
    return None


@contextlib.contextmanager
def _stop_request() -> Iterator[StopRequest]:
    """Signals ask the trainings to stop; afterwards they are what they were."""
    stop = StopRequest()
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stop.install()
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _start_of(kfold: Kfold, fold: int, parent: ParentRun) -> TrialStart:
    overrides = [f"data.fold={fold}"]
    if parent.run_id is not None:
        overrides.append(f"tracking.parent_run_id={parent.run_id}")
    tracking = kfold.recipe.tracking
    if tracking.mlflow and tracking.uri is None and "MLFLOW_TRACKING_URI" not in os.environ:
        # The database beside the parent, also for whoever adds a report to a fold later.
        overrides.append(f"tracking.uri={json.dumps(tracking_uri(tracking, kfold.folder.parent))}")
    run_folder = kfold.run_folder(fold)
    return TrialStart(
        recipe=kfold.folder / RECIPE_NAME,
        folder=run_folder,
        overrides=overrides,
        log=run_folder.with_name(f"{run_folder.name}.log"),
        num_ranks=kfold.num_ranks,
        environment=parent.environment,
    )


def _fold_line(kfold: Kfold, fold: int, top1: float, was_there: bool, seconds: list[float]) -> str:
    left = kfold.num_folds - fold - 1
    parts = [f"fold {fold} of {kfold.num_folds}", f"final top1 {top1:.2%}"]
    parts += ["was trained before"] if was_there else []
    parts += [f"about {duration(sum(seconds) / len(seconds) * left)} to go"] if left and seconds else []
    return "  ".join(parts)


def _evaluate(kfold: Kfold, parent: ParentRun) -> None:
    """Out-of-fold predictions, figures, page."""
    recipe = kfold.recipe
    data = Path(recipe.data.path)
    if is_s3(str(recipe.data.path)):
        data = stage(str(recipe.data.path), recipe.data.stage_folder).folder
    manifest = load_manifest(data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    judged = [
        predict_fold(folder, recipe.data.model_copy(update={"fold": fold}), data, device)
        for fold, folder in enumerate(kfold.run_folders)
    ]
    of_folds = [fold.predictions for fold in judged]
    results, together = summarize(of_folds), out_of_fold(of_folds)
    save_out_of_fold(kfold.folder / PREDICTIONS_NAME, together)
    num_train = manifest.splits["train"].num_samples
    damaged = np.setdiff1d(np.arange(num_train), together.sample_ids).tolist()
    warnings = _write(kfold, results, manifest, [fold.weights_at_start for fold in judged], damaged)
    for warning in warnings:
        _say(f"warning: {warning}")
    pooled = results.pooled
    figures = {
        f"kfold_{key}_{name}": getattr(results, name)[key] for key in results.mean for name in ("mean", "std")
    }
    parent.log_metrics(figures | {"kfold_top1": pooled.top1, "kfold_top5": pooled.top5}, kfold.num_folds)
    names = (PAGE_NAME, TABLE_NAME, RECIPE_NAME)
    parent.finish("FINISHED", {}, [kfold.folder / name for name in names])
    print(
        f"top-1 {spread_text(results.mean['top1'], results.std['top1'])} over {kfold.num_folds} folds (mean "
        f"± standard deviation), {percent_text(pooled.top1)} of {count_text(pooled.num_samples, 'image')}; "
        f"page: {kfold.folder / PAGE_NAME}"
    )


def _write(
    kfold: Kfold,
    results: KfoldResults,
    manifest: Manifest,
    weights_at_start: Sequence[str],
    damaged: Sequence[int],
) -> list[str]:
    """JSON and page; the warnings on it.

    Args:
        weights_at_start: of each fold. damaged: sample ids that no fold's predictions hold.
    """
    recipe = kfold.recipe
    warnings = list(filter(None, [different_weights(weights_at_start), steered_by_folds(recipe.schedule)]))
    if damaged:
        warnings.append(f"{count_text(len(damaged), 'damaged training image')} left out of all figures.")
    facts = [
        ("data set", f"{recipe.data.path} (train)"),
        ("model", f"{recipe.model.library} {recipe.model.name}"),
        ("weights at the start", ", ".join(dict.fromkeys(weights_at_start))),
        ("damaged images, left out", f"{len(damaged):,}"),
        ("epochs of each fold", str(recipe.num_epochs)),
        ("seed of the folds", str(recipe.data.fold_seed)),
        ("seed of the trainings", str(recipe.run.seed)),
    ]
    fields = {
        "data": str(recipe.data.path),
        "num_folds": kfold.num_folds,
        "source_fingerprint": manifest.source_fingerprint,
        "index_sha256": manifest.splits["train"].index.sha256,
        "runs": [folder.name for folder in kfold.run_folders],
        "weights_at_start": list(weights_at_start),
        "damaged_sample_ids": list(damaged),
    }
    names = manifest.display_names or manifest.class_names
    table = kfold_json(kfold.title, results, manifest.class_names, facts, fields)
    write_atomically(kfold.folder / TABLE_NAME, utf8_bytes(table))
    page = kfold_page(kfold.title, results, names, facts, warnings)
    write_atomically(kfold.folder / PAGE_NAME, utf8_bytes(page))
    return warnings


def _say(line: str) -> None:
    print(line, flush=True)
