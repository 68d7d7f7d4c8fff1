"""The command `audit`: which labels are probably wrong, for a person to look at.

python -m evaluation audit --run runs/demo --data data/intel --split val --review
python -m evaluation audit --kfold runs/demo-kfold --second runs/other-kfold
python -m evaluation audit --apply runs/demo/audit/review.csv
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.corrections import save_corrections
from data_prep.manifest import load_index, load_keys, load_manifest
from data_prep.plain_json import read_json
from data_prep.progress import progress_bar
from data_prep.stats.contact_sheet import load_picture
from data_prep.stats.samples import open_data_set
from data_prep.storage import write_atomically
from evaluation.audit.inputs import MAX_TABLE_BYTES, Audited, of_kfold, of_run
from evaluation.audit.page import AuditContent, audit_page
from evaluation.audit.review import (
    Suspect,
    corrected_accuracy,
    corrections_of,
    read_review,
    suspects_csv,
)
from evaluation.audit.sheet import SuspectImage, plot_suspects
from evaluation.audit.suspects import (
    METHOD,
    Accuracy,
    BeforeAndAfter,
    LabelAudit,
    SecondOpinion,
    before_and_after,
    duplicates_of_other_labels,
    find_suspects,
    second_opinion,
)
from evaluation.files import utf8_bytes
from evaluation.kfold.results import load_out_of_fold, save_out_of_fold
from evaluation.metrics import distinct_names
from evaluation.plot_style import png_bytes
from evaluation.text import count_text, interval_text, percent_text
from train.config import RecipeError, load_recipe
from train.config.credentials import without_credentials
from train.data.loaders import BACKENDS
from train.run_folder import MLFLOW_NAME, RECIPE_NAME
from train.tracking.mlflow_client import add_to_run, tracking_uri

DESCRIPTION = "label audit: a ranked list and a contact sheet of labels that are probably wrong"
PAGE_NAME, TABLE_NAME, LIST_NAME = "audit.html", "audit.json", "suspects.csv"
SHEET_NAME, REVIEW_NAME, PREDICTIONS_NAME = "contact_sheet.png", "review.csv", "predictions.npz"
CORRECTIONS_NAME = "corrections.json"
MIN_ROWS = 100  # of the list: some that are no suspects, to see where it ends


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--run", type=Path, dest="held_out", help="run folder or checkpoint of a held-out model"
    )
    what.add_argument("--kfold", type=Path, help="folder of a cross-validation, for the train split")
    what.add_argument("--apply", type=Path, metavar="REVIEW", help="a review.csv with verdicts")
    parser.add_argument("--data", help="the prepared data set: a folder or s3://…")
    parser.add_argument("--split", choices=["val", "train"], default="val", help="with --run (default: val)")
    parser.add_argument("--second", type=Path, help="another run (with --kfold: cross-validation) to compare")
    parser.add_argument("--out", type=Path, help="default: audit/ in the run's or cross-validation's folder")
    parser.add_argument("--num-images", type=int, default=60, help="on the contact sheet (default: 60)")
    parser.add_argument("--review", action="store_true", help="write review.csv, for a person's verdicts")
    parser.add_argument("--loader", choices=["auto", *BACKENDS], default="auto")
    parser.add_argument("--no-mlflow", action="store_true", help="do not add the audit to the MLflow run")


def run(options: argparse.Namespace) -> int:
    """Audit, or apply a review; the exit code."""
    if options.apply is not None:
        return _apply(options.apply)
    if not 0 <= options.num_images <= 1000:
        raise ValueError(f"--num-images is {options.num_images}: it must be from 0 to 1000")
    if options.held_out is not None and options.data is None:
        raise ValueError("--run needs --data, the data set whose labels are audited")
    source = options.held_out or options.kfold
    if options.second is not None and options.second.resolve() == source.resolve():
        raise ValueError("--second is the same model: name one that was trained apart")
    audited = _audited(options, source)
    audit = find_suspects(audited.predictions.probabilities, audited.predictions.labels)
    second = None if options.second is None else _second(options, audited, audit)
    folder = source if source.is_dir() else source.parent
    out = options.out or folder / "audit"
    facts = list(audited.facts)
    if options.second is not None:
        facts.append(("second model", str(options.second)))
    result = _Result(audited, audit, _ranked(audited, audit), second, facts)
    images = _images(audited, result.suspects[: min(options.num_images, audit.num_suspects)])
    _write(out, result, images, options.review)
    _say_result(out, result)
    if not options.no_mlflow:
        _log_to_mlflow(folder, out, audit)
    return 0


def _audited(options: argparse.Namespace, source: Path) -> Audited:
    if options.held_out is not None:
        return of_run(source, options.data, options.split, options.loader)
    return of_kfold(source, options.data)


def _second(options: argparse.Namespace, audited: Audited, audit: LabelAudit) -> SecondOpinion:
    other = _audited(options, options.second)
    if not np.array_equal(other.predictions.sample_ids, audited.predictions.sample_ids):
        raise ValueError(f"--second {options.second} is of other images: it must be of the same split")
    predicted = other.predictions.probabilities.argmax(1)
    return second_opinion(audit, audited.predictions.labels, predicted)


def _ranked(audited: Audited, audit: LabelAudit) -> list[Suspect]:
    """The suspects and as many again, at least MIN_ROWS."""
    manifest = load_manifest(audited.data)
    index = load_index(audited.data, manifest, audited.split)
    keys = load_keys(audited.data, manifest, audited.split)
    predictions = audited.predictions
    rows = index[predictions.sample_ids]
    if not np.array_equal(rows["label"], predictions.labels):
        raise ValueError(f"{audited.data} has other labels than the predictions: run kfold again")
    elsewhere: dict[int, tuple[str, ...]] = {}
    for group in duplicates_of_other_labels(rows["crc32c"], rows["length"], predictions.labels):
        for place in group:
            others = [other for other in group if predictions.labels[other] != predictions.labels[place]]
            elsewhere[place] = tuple(keys[predictions.sample_ids[other]] for other in others)
    suspects = []
    for rank, place in enumerate(audit.ranking[: max(MIN_ROWS, 2 * audit.num_suspects)].tolist(), start=1):
        sample_id = int(predictions.sample_ids[place])
        suspects.append(
            Suspect(
                rank=rank,
                sample_id=sample_id,
                split=audited.split,
                key=keys[sample_id],
                given=int(predictions.labels[place]),
                suggested=int(audit.suggested[place]),
                score=float(audit.quality[place]),
                beyond_threshold=bool(audit.is_suspect[place]),
                duplicates=elsewhere.get(place, ()),
            )
        )
    return suspects


def _images(audited: Audited, suspects: list[Suspect]) -> list[SuspectImage]:
    data_set = open_data_set(str(audited.data))
    names = distinct_names(data_set.class_titles)
    items = []
    with progress_bar(len(suspects), "read suspects", True) as bar:
        for suspect in suspects:
            picture = load_picture(data_set, audited.split, suspect.sample_id)
            items.append(SuspectImage(suspect, picture, names[suspect.given], names[suspect.suggested]))
            bar.update(1)
    return items


@dataclass(frozen=True, eq=False)
class _Result:
    """All that an audit found."""

    audited: Audited
    audit: LabelAudit
    suspects: list[Suspect]
    second: SecondOpinion | None
    facts: list[tuple[str, str]]

    @property
    def num_samples(self) -> int:
        return len(self.audited.predictions.labels)

    @property
    def figures(self) -> BeforeAndAfter:
        return before_and_after(self.audit, self.audited.predictions.labels)


def _write(out: Path, result: _Result, images: list[SuspectImage], review: bool) -> None:
    """All files, the page last."""
    names = load_manifest(result.audited.data).class_names
    if review and (out / REVIEW_NAME).is_file():
        raise ValueError(
            f"{out / REVIEW_NAME} is there already, perhaps with verdicts: move it, or take another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    save_out_of_fold(out / PREDICTIONS_NAME, result.audited.predictions)
    _replace(out / LIST_NAME, suspects_csv(result.suspects, names))
    if review:
        only = [suspect for suspect in result.suspects if suspect.beyond_threshold]
        _replace(out / REVIEW_NAME, suspects_csv(only, names, for_review=True))
    if images:
        write_atomically(out / SHEET_NAME, png_bytes(plot_suspects(images)))
    else:
        (out / SHEET_NAME).unlink(missing_ok=True)  # one of an earlier audit would pass for one of this
    content = json.dumps(_table(result), allow_nan=False, ensure_ascii=False, indent=1)
    _replace(out / TABLE_NAME, content + "\n")
    _replace(out / PAGE_NAME, _page(result, images))


def _table(result: _Result) -> dict[str, Any]:
    manifest, audited, audit = load_manifest(result.audited.data), result.audited, result.audit
    second = result.second
    return {
        "title": audited.title,
        "method": METHOD,
        "split": audited.split,
        "num_samples": result.num_samples,
        "num_suspects": audit.num_suspects,
        "estimated_wrong_fraction": audit.estimated_wrong_fraction,
        "before_and_after": {key: _figures(value) for key, value in vars(result.figures).items()},
        "second_opinion": second and {key: _figures(value) for key, value in vars(second).items()},
        "class_names": list(manifest.class_names),
        "pair_counts": audit.pair_counts.tolist(),
        "index_sha256": manifest.splits[audited.split].index.sha256,
        "suspects": [asdict(suspect) for suspect in result.suspects],
        "details": dict(result.facts),
    }


def _page(result: _Result, images: list[SuspectImage]) -> str:
    manifest = load_manifest(result.audited.data)
    return audit_page(
        AuditContent(
            title=result.audited.title,
            class_names=distinct_names(manifest.display_names or manifest.class_names),
            num_samples=result.num_samples,
            num_suspects=result.audit.num_suspects,
            estimated_wrong_fraction=result.audit.estimated_wrong_fraction,
            figures=result.figures,
            second=result.second,
            pair_counts=result.audit.pair_counts,
            images=images,
            facts=result.facts,
            method=METHOD,
        )
    )


def _figures(accuracy: Accuracy) -> dict[str, Any]:
    return {**asdict(accuracy), "top1": accuracy.top1, "interval": accuracy.interval}


def _replace(path: Path, text: str) -> None:
    # A key may hold bytes that are no text; they are written as "\\udcff", valid in JSON too.
    write_atomically(path, utf8_bytes(text))


def _say_result(out: Path, result: _Result) -> None:
    figures, share = result.figures, percent_text(result.audit.estimated_wrong_fraction)
    print(
        f"{count_text(result.audit.num_suspects, 'suspect')} among {result.num_samples:,} labels "
        f"({result.audited.split}), about {share} wrong by the model's estimate; page: {out / PAGE_NAME}\n"
        f"top-1 {_words(figures.all_images)}; without the suspects {_words(figures.without_suspects)}, "
        "higher by construction: the model is wrong on every suspect"
    )
    if result.second is not None:
        print(
            f"a second model has {_words(result.second.all_images)}; it names the suggested class on "
            f"{_words(result.second.agrees_on_suspects)} of the suspects, and repeats "
            f"{_words(result.second.agrees_on_other_errors)} of the first one's other errors"
        )


def _words(accuracy: Accuracy) -> str:
    if accuracy.top1 is None or accuracy.interval is None:
        return "none"
    return f"{percent_text(accuracy.top1)} ({interval_text(accuracy.interval)}, n = {accuracy.num_samples:,})"


def _apply(review: Path) -> int:
    """A reviewed list → corrections.json beside it, and the accuracy that follows from the verdicts."""
    folder = review.parent
    try:
        table = read_json(folder / TABLE_NAME, MAX_TABLE_BYTES)
        names = tuple(map(str, table["class_names"]))
        suspects = [Suspect(**row) for row in table["suspects"]]
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no {TABLE_NAME}: leave the review where the audit wrote it"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / TABLE_NAME} cannot be understood: audit again") from None
    predictions = load_out_of_fold(folder / PREDICTIONS_NAME, names)
    verdicts, num_empty = read_review(review, suspects, names)
    before, after = corrected_accuracy(
        verdicts, predictions.probabilities.argmax(1), predictions.labels, predictions.sample_ids
    )
    corrections = corrections_of(verdicts, names)
    save_corrections(folder / CORRECTIONS_NAME, corrections)
    counts = Counter(verdict.kind for verdict in verdicts)
    print(
        f"{len(verdicts)} verdicts: {counts['keep']} keep, {counts['drop']} drop, {counts['relabel']} "
        f"relabel; {num_empty} rows have none\n"
        f"top-1 {_words(before)} with the labels as given, {_words(after)} with the verdicts\n"
        "(only errors of this model were looked at: wrong labels that it repeats are still in both figures)\n"
        f"python -m data_prep prepare … --corrections {folder / CORRECTIONS_NAME}"
    )
    return 0


def _log_to_mlflow(folder: Path, out: Path, audit: LabelAudit) -> None:
    """To the run or cross-validation that the predictions are of, where it is known."""
    folder = folder.parent if folder.name == "checkpoints" else folder
    try:
        run_id = read_json(folder / MLFLOW_NAME)["run_id"]
        tracking = load_recipe(folder / RECIPE_NAME).tracking
    except (OSError, ValueError, KeyError, TypeError, RecipeError):
        run_id = None
    if not isinstance(run_id, str):
        return
    uri = tracking_uri(tracking, folder.parent)
    figures = {
        "audit_suspects": float(audit.num_suspects),
        "audit_wrong_fraction": audit.estimated_wrong_fraction,
    }
    fault = add_to_run(uri, run_id, out, "audit", figures)
    shown = without_credentials(uri)
    print(f"warning: {fault}" if fault else f"added to MLflow run {run_id} ({shown})", file=sys.stderr)
