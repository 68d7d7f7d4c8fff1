"""The comparison itself: what each run can be asked, which is the best, and which are better than which.

Example:
    >>> runs = [examine("A", record, data=None, …), …]
    >>> comparison = compare(runs, baseline=None)
    >>> comparison.verdicts[0]
    'resnet18 is better than residual_cnn by 2.1 points (95% 0.6 to 3.6, McNemar p = 0.008)'
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from data_prep.manifest import load_manifest
from evaluation.compare.figures import ComparedRun, run_figures
from evaluation.compare.model_cost import NOTHING_MEASURED, measure_cost, static_cost
from evaluation.compare.paired import (
    PairedResult,
    compare_all,
    in_words,
    num_wrong_for_all,
    same_images,
)
from evaluation.compare.predicted import FoundPredictions, new_predictions, saved_predictions
from evaluation.compare.runs import RunRecord, index_sha256, own_manifest
from evaluation.predict import TrainedModel, load_trained
from evaluation.text import count_text
from train.config import Recipe
from train.distributed import describe_hardware, distributed
from train.models.build import build_model
from train.validation import views_of


@dataclass(frozen=True)
class Pair:
    """A run against the baseline."""

    run: ComparedRun
    result: PairedResult
    words: str


@dataclass(frozen=True)
class Comparison:
    """What the page says.

    Attributes:
        best, second: by top-1 on the common images, or where there are none by the runs' own best; None where
            no run, or only one, has an accuracy.
        is_paired: whether best and second were told by the same images.
        pairs: every other run with predictions against `baseline`, in the order of the runs.
        num_wrong_for_all: of the common images; None without any.
        machine: that the measurements here were made on.
        notes: sentences on the comparison as a whole.
    """

    runs: tuple[ComparedRun, ...]
    best: ComparedRun | None
    second: ComparedRun | None
    baseline: ComparedRun | None
    is_paired: bool
    pairs: tuple[Pair, ...]
    num_wrong_for_all: int | None
    machine: str
    notes: tuple[str, ...]

    @property
    def verdicts(self) -> list[str]:
        return [pair.words for pair in self.pairs]


def examine(
    letter: str,
    record: RunRecord,
    *,
    data: Path | None,
    split: Literal["train", "val"],
    loader: str,
    with_measurements: bool,
    say: Callable[[str], None],
) -> ComparedRun:
    """Everything about one run; what cannot be had is a note.

    Args:
        data: the data set to predict on; None: only what reports saved is used.
        say: takes a line of progress.

    Raises:
        RuntimeError: samples of the data set are damaged.
    """
    notes: list[str] = []
    manifest = own_manifest(record)
    trained = _load(record, notes)
    recipe = record.recipe if trained is None else trained.recipe
    num_classes = None if manifest is None else manifest.num_classes
    static, measured = None, NOTHING_MEASURED
    if trained is not None:
        num_classes = len(trained.class_names)
        if recipe is not None:
            static = static_cost(trained.model, recipe.validation_resolution)
    elif recipe is not None and num_classes is not None:
        config = recipe.model.model_copy(update={"pretrained": False, "checkpoint": None})
        static = static_cost(build_model(config, num_classes), recipe.validation_resolution)
    found = _predictions(letter, record, trained, recipe, data, split, loader, notes, say)
    del trained  # before the next one is loaded
    run = ComparedRun(
        letter=letter,
        record=record if recipe is None else replace(record, recipe=recipe),
        static=static,
        predictions=None if found is None else found.predictions,
        predictions_sha256="" if found is None else found.data_sha256,
        num_classes=num_classes,
        num_images=None
        if manifest is None or "val" not in manifest.splits
        else manifest.splits["val"].num_samples,
        data_sha256=index_sha256(manifest, "val"),
    )
    if with_measurements and recipe is not None and num_classes is not None:
        say(f"{letter} {record.name}: measuring speed and memory")
        is_of_gpu = run_figures(run).get("training_memory_of") == "the GPU"
        world_size = max(1, int(record.number("world_size") or 1))
        measured = measure_cost(
            recipe, num_classes, recipe.validation_resolution, world_size, with_training=not is_of_gpu
        )
        notes += measured.notes
    return with_figures(replace(run, measured=measured, notes=(*record.notes, *notes)))


def with_figures(run: ComparedRun) -> ComparedRun:
    return replace(run, figures=run_figures(run))


def _load(record: RunRecord, notes: list[str]) -> TrainedModel | None:
    if record.checkpoint is None:
        return None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return load_trained(record.checkpoint, device)
    except (ValueError, RuntimeError, OSError) as error:
        notes.append(f"Its checkpoint cannot be used: {error}.")
        return None


def _predictions(
    letter: str,
    record: RunRecord,
    trained: TrainedModel | None,
    recipe: Recipe | None,
    data: Path | None,
    split: Literal["train", "val"],
    loader: str,
    notes: list[str],
    say: Callable[[str], None],
) -> FoundPredictions | None:
    """Those that a report saved, or new ones where there is a data set to make them on."""
    wanted_sha256 = None if data is None else index_sha256(load_manifest(data), split)
    view = None if recipe is None else views_of(recipe)[0].words
    found, note = saved_predictions(record, split, data_sha256=wanted_sha256, view=view)
    if found is not None:
        return found
    if data is None or trained is None:
        notes += [note] if note else []
        return None
    say(f"{letter} {record.name}: predicting")
    try:
        return new_predictions(trained, data, split, loader)
    except ValueError as error:
        notes.append(f"It is compared by its own figures only: {error}.")
        return None


def compare(runs: Sequence[ComparedRun], baseline: str | None, notes: Sequence[str] = ()) -> Comparison:
    """Best, second, and each run against the baseline on the same images.

    Args:
        baseline: name, letter or source of a run; None: the best one.

    Raises:
        ValueError: no run is called so.
    """
    runs, more_notes = _with_common_images(runs)
    notes = [*notes, *more_notes, *_data_notes(runs)]
    common = [run for run in runs if run.predictions is not None]
    is_paired = len(common) >= 2
    if not is_paired:
        notes.append(
            "Fewer than two runs have predictions of the same images: there is no paired test, and the best "
            "was told by the runs’ own validations. Name a data set with --data."
        )
    ranked = sorted(
        (run for run in (common if is_paired else runs) if run.score is not None),
        key=lambda run: -(run.score or 0.0),
    )
    best, second = (ranked[place] if len(ranked) > place else None for place in (0, 1))
    against = _named(runs, baseline) if baseline is not None else best
    pairs: list[Pair] = []
    if is_paired and against is not None:
        if against.predictions is None:
            notes.append(f"The baseline {against.name} has no predictions: nothing is tested against it.")
        else:
            others = [run for run in common if run.letter != against.letter]
            predictions = [run.predictions for run in others if run.predictions is not None]
            results = compare_all(predictions, against.predictions)
            pairs = [
                Pair(run, result, in_words(run.name, against.name, result))
                for run, result in zip(others, results, strict=True)
            ]
    wrong = [run.predictions for run in common if run.predictions is not None]
    return Comparison(
        runs=tuple(runs),
        best=best,
        second=second,
        baseline=against,
        is_paired=is_paired,
        pairs=tuple(pairs),
        num_wrong_for_all=num_wrong_for_all(wrong) if is_paired else None,
        machine=_machine(runs),
        notes=tuple(notes),
    )


def _named(runs: Sequence[ComparedRun], text: str) -> ComparedRun:
    for run in runs:
        folder = str(run.record.folder) if run.record.folder is not None else None
        if text in (run.name, run.letter, run.record.source, folder) or text.rstrip("/") == folder:
            return run
    raise ValueError(
        f"--baseline {text}: none of the runs is called so; they are {', '.join(r.name for r in runs)}"
    )


def _with_common_images(runs: Sequence[ComparedRun]) -> tuple[list[ComparedRun], list[str]]:
    """The runs, predictions kept only where they are of the images that most runs have predictions of."""
    groups: list[list[ComparedRun]] = []
    for run in runs:
        if run.predictions is None:
            continue
        for group in groups:
            first = group[0]
            assert first.predictions is not None
            is_same = first.predictions_sha256 == run.predictions_sha256
            if is_same and same_images(first.predictions, run.predictions):
                group.append(run)
                break
        else:
            groups.append([run])
    largest = max(groups, key=len, default=[])
    if len(groups) < 2:
        return list(runs), []
    left_out = [run.name for group in groups if group is not largest for run in group]
    kept = {run.letter for run in largest}
    changed = [
        run if run.predictions is None or run.letter in kept else with_figures(replace(run, predictions=None))
        for run in runs
    ]
    return changed, [
        f"{' and '.join(left_out)} {'is' if len(left_out) == 1 else 'are'} of other images than the other "
        "runs: compared by own figures only."
    ]


def _data_notes(runs: Sequence[ComparedRun]) -> list[str]:
    """Whether the runs' own validations are of the same images."""
    known = {run.data_sha256 for run in runs if run.data_sha256 is not None}
    names = {run.record.recipe.data.name for run in runs if run.record.recipe is not None}
    if len(known) > 1:
        return [
            "The runs validated themselves on different data sets (their sample indexes differ): their own "
            "figures are not of the same images, and must not be compared with each other."
        ]
    num_unknown = sum(run.data_sha256 is None for run in runs)
    if num_unknown and len(names) > 1:
        return [
            f"The runs name different data sets ({', '.join(sorted(names))}), and not all of them are here: "
            "their own figures may be of other images."
        ]
    if num_unknown and len(runs) > 1:
        return [
            f"The data of {count_text(num_unknown, 'run')} is not on this machine: whether all validated "
            "themselves on the same images was not checked."
        ]
    return []


def _machine(runs: Sequence[ComparedRun]) -> str:
    """Hardware, threads, and whether it had other things to do; empty where nothing was measured."""
    if not any(run.measured.inference_seconds for run in runs):
        return ""
    with distributed() as ranks:
        words = describe_hardware(ranks)
    if torch.cuda.is_available():
        return words
    words += f", {count_text(torch.get_num_threads(), 'thread')}"
    load = os.getloadavg()[1]
    cores = os.cpu_count() or 1
    if load > 1.5 * cores:
        busy = f"load {load:.1f} on {count_text(cores, 'core')}"
        words += f"; other processes were at work ({busy}), so times are too long"
    return words
