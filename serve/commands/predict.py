"""`python -m serve predict`: the most probable classes of image files, as a table, JSON or CSV.

python -m serve predict runs/mine photo.jpg photos/ --top 3
python -m serve predict exported/mine photos/ --csv > predictions.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.progress import progress_bar
from data_prep.sources.walk import files_below
from serve.classifier import BadImage, Classifier, Limits, Prediction, open_classifier
from serve.model_folder import ASSUMED
from serve.portable.texts import as_cell, encodable, printable

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
MAX_TOP = 1000


@dataclass(frozen=True)
class Answer:
    """What came of one file: a prediction, or the sentence on why there is none."""

    file: str
    prediction: Prediction | None
    fault: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a checkpoint file, a run folder or an exported folder")
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE|FOLDER", help="folders are searched below"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object on standard output")
    form.add_argument("--csv", action="store_true", help="a row a file on standard output")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes a file (5)")
    parser.add_argument("--batch-size", type=int, default=32, help="images computed at once (32)")
    parser.add_argument("--form", choices=["onnx", "int8", "safetensors"], help="of an exported folder")


def run(options: argparse.Namespace) -> int:
    """Classify; exit code 1 where no file could be."""
    if not 1 <= options.top <= MAX_TOP:
        raise ValueError(f"--top is {options.top}: it must be from 1 to {MAX_TOP:,}")
    if not 1 <= options.batch_size <= 4096:
        raise ValueError(f"--batch-size is {options.batch_size}: it must be from 1 to 4,096")
    paths, num_passed_over = find_files(options.files)
    classifier = open_classifier(options.model, form=options.form)
    if classifier.info.provenance.get("image_settings") == ASSUMED:
        print(
            "note: this checkpoint does not say how its data set's images were made, so the defaults are "
            "assumed (500 pixels, not turned by EXIF); python -m serve export … --data FOLDER knows",
            file=sys.stderr,
        )
    answers = []
    with progress_bar(len(paths), "predict") as bar:
        for answer in classify_files(classifier, paths, options.top, options.batch_size):
            answers.append(answer)
            bar.update()
    if options.json:
        _print_json(answers, classifier)
    elif options.csv:
        _print_csv(answers, min(options.top, len(classifier.info.names)))
    else:
        _print_table(answers)
    bad = [answer for answer in answers if answer.fault is not None]
    for answer in bad if options.csv or options.json else []:
        print(f"warning: {printable(answer.file)}: {answer.fault}", file=sys.stderr)
    words = f"{len(answers) - len(bad):,} of {len(answers):,} files classified"
    words += f", {len(bad):,} could not be" if bad else ""
    words += (
        f"; {num_passed_over:,} files without an image's name were passed over" if num_passed_over else ""
    )
    print(words, file=sys.stderr)
    return 1 if len(bad) == len(answers) else 0


def find_files(named: list[Path]) -> tuple[list[Path], int]:
    """The files that are meant, and how many in folders were passed over.

    A file that is named counts whatever it is called; in folders, those with an image's suffix.

    Raises:
        ValueError: nothing is there.
    """
    found: dict[Path, None] = {}  # in order, each once
    num_passed_over = 0
    for path in named:
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        if not path.is_dir():
            found[path] = None
            continue
        for name in files_below(str(path), "", lambda name: name.startswith(".")):
            if name.lower().endswith(SUFFIXES):
                found[path / name] = None
            else:
                num_passed_over += 1
    if not found:
        raise ValueError(
            f"no image files in {', '.join(map(str, named))}: name files, or folders that hold some"
        )
    return list(found), num_passed_over


def classify_files(classifier: Classifier, paths: list[Path], top: int, batch_size: int) -> Iterator[Answer]:
    """An answer for each file, in order; a bad file costs only itself."""
    for start in range(0, len(paths), batch_size):
        images: list[NDArray[np.uint8]] = []
        faults: dict[Path, str] = {}
        chunk = paths[start : start + batch_size]
        for path in chunk:
            try:
                images.append(classifier.prepare(_read(path, classifier.limits)))
            except BadImage as error:
                faults[path] = str(error)
            except OSError as error:
                faults[path] = f"It cannot be read ({error.strerror or error})."
        predictions = iter(classifier.predict(np.stack(images), top) if images else [])
        for path in chunk:
            fault = faults.get(path)
            yield Answer(encodable(str(path)), None if fault else next(predictions), fault)


def _read(path: Path, limits: Limits) -> bytes:
    if not path.is_file():
        raise BadImage("not_an_image", "This is no regular file.")
    with path.open("rb") as file:
        return file.read(limits.max_bytes + 1)  # one more is refused as too large


def _print_table(answers: list[Answer]) -> None:
    width = min(60, max(len(answer.file) for answer in answers))
    for answer in answers:
        file = printable(answer.file)
        name = file if len(file) <= width else "…" + file[1 - width :]
        if answer.prediction is None:
            print(f"{name:<{width}}  – {answer.fault}")
            continue
        rows = zip(answer.prediction.names, answer.prediction.probabilities, strict=True)
        classes = (f"{printable(label)} {probability:.1%}" for label, probability in rows)
        print(f"{name:<{width}}  " + "  ".join(classes))


def _print_json(answers: list[Answer], classifier: Classifier) -> None:
    rows = [
        {"file": answer.file, **answer.prediction.as_dict()}
        if answer.prediction
        else {"file": answer.file, "error": answer.fault}
        for answer in answers
    ]
    model = {"title": classifier.info.title, **classifier.info.provenance}
    print(json.dumps({"model": model, "predictions": rows}, indent=1, ensure_ascii=False))


def _print_csv(answers: list[Answer], top: int) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    columns = [f"{what}{rank}" for rank in range(1, top + 1) for what in ("class", "probability")]
    writer.writerow(["file", *columns, "error"])
    for answer in answers:
        cells: list[str] = []
        if answer.prediction is not None:
            rows = zip(answer.prediction.names, answer.prediction.probabilities, strict=True)
            cells = [cell for name, probability in rows for cell in (as_cell(name), f"{probability:.6f}")]
        writer.writerow([as_cell(answer.file), *cells, *[""] * (2 * top - len(cells)), answer.fault or ""])
