"""The comparison itself: which run is the best, and which are better than which.

Example:
    >>> runs = [examine("A", record, data=None, …), …]
    >>> comparison = compare(runs, baseline=None)
    >>> comparison.verdicts[0]
    'resnet18 is better than residual_cnn by 2.1 points (95% 0.6 to 3.6, McNemar p = 0.008)'
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from evaluation.compare.figures import ComparedRun, with_figures
from evaluation.compare.paired import (
    PairedResult,
    compare_all,
    in_words,
    num_wrong_for_all,
    same_images,
)
from evaluation.text import count_text
from train.distributed import describe_hardware, distributed


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
            "The runs validated themselves on different images (other data sets, or other folds): their own "
            "figures must not be compared with each other."
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
