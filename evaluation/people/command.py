"""The command `people`: a network's features beside what people said of the same images.

python -m evaluation people runs/rocks --data data/rocks --split train \\
    --coordinates human/mds_360.txt --similarities human/similarity_ratings_360_collapsed_30x30.txt
python -m evaluation people runs/rocks --data data/rocks --list-layers
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch

from data_prep.manifest import Manifest, load_index, load_keys, load_manifest
from data_prep.plain_json import read_json
from data_prep.storage import is_s3
from evaluation.people.human import HumanMatrix, read_coordinates, read_order, read_similarities
from evaluation.people.layers import PENULTIMATE
from evaluation.predict import TrainedModel, load_trained, run_folder_of
from train.data.loaders import BACKENDS
from train.data.staging import stage
from train.run_folder import SUMMARY_NAME

DESCRIPTION = "features + human similarity data → Procrustes fit, representational similarity"
MAX_PAIRS = 12
SORTED = "sorted"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a checkpoint file, or a run folder (its best one)")
    parser.add_argument("--data", required=True, help="the prepared data set: a folder or s3://…")
    parser.add_argument("--split", choices=["val", "train"], default="val")
    human = parser.add_argument_group("human data (text, CSV or NPY; at least one)")
    human.add_argument(
        "--coordinates", type=Path, metavar="FILE", help="a human space, one row a sample or a class"
    )
    given = human.add_mutually_exclusive_group()
    given.add_argument(
        "--similarities", type=Path, metavar="FILE", help="class × class, larger is more alike"
    )
    given.add_argument("--distances", type=Path, metavar="FILE", help="class × class, larger is less alike")
    human.add_argument("--rows", choices=["auto", "samples", "classes"], default="auto",
                       help="what a row of --coordinates is (default: told by names or counts)")  # fmt: skip
    human.add_argument("--order", metavar="FILE", default=SORTED,
                       help="source keys of rows that are samples (default: all, sorted)")  # fmt: skip
    human.add_argument("--class-order", metavar="FILE", default=SORTED,
                       help="names of rows that are classes (default: all, sorted)")  # fmt: skip
    model = parser.add_argument_group("features")
    model.add_argument("--layer", nargs="+", default=[PENULTIMATE], metavar="NAME",
                       help="names, patterns as 'blocks.*', penultimate (default), or all")  # fmt: skip
    model.add_argument("--list-layers", action="store_true", help="print the model's layers and end")
    model.add_argument("--pool", choices=["mean", "flatten"], default="mean",
                       help="of maps and tokens: their mean, or all of them in a row")  # fmt: skip
    model.add_argument("--similarity", choices=["correlation", "cosine", "euclidean"], default="correlation",
                       help="when two rows of features are alike")  # fmt: skip
    model.add_argument("--num-untrained", type=int, default=3,
                       help="networks with random weights to compare with (default: 3; 0: none)")  # fmt: skip
    model.add_argument("--resolution", type=int, help="side in pixels (default: the recipe's)")
    model.add_argument("--loader", choices=["auto", *BACKENDS], default="auto")
    parser.add_argument(
        "--pairs", default="", help="dimensions to draw, as 1-2,3-4 (default: the first four pairs)"
    )
    parser.add_argument("--permutations", type=int, default=1000, help="of each test (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of permutations, halves and random weights")
    parser.add_argument(
        "--no-ridge", action="store_true", help="leave ridge regression out, which takes longest"
    )
    parser.add_argument("--out", type=Path, help="default: people/ in the run's folder")
    parser.add_argument("--no-mlflow", action="store_true", help="do not add the figures to the MLflow run")
    parser.add_argument("--tracking-uri", help="MLflow server to add them to (default: the run's own)")


def run(options: argparse.Namespace) -> int:
    """Compare and write the page; the exit code."""
    _check(options)
    trained = load_trained(options.checkpoint, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    resolution = options.resolution or trained.recipe.validation_resolution
    from evaluation.people.features import layers_of

    layers = layers_of(trained, resolution)
    if options.list_layers:
        width = max(len(layer.name) for layer in layers)
        for layer in layers:
            print(f"{layer.name:<{width}}  {'×'.join(map(str, layer.shape)):<14}  {layer.kind}")
        return 0
    folder = (
        stage(options.data, trained.recipe.data.stage_folder).folder
        if is_s3(options.data)
        else Path(options.data)
    )
    return compare(options, trained, folder, layers)


def compare(options: argparse.Namespace, trained: TrainedModel, folder: Path, layers: Any) -> int:
    """All after the arguments: match, extract, measure, write, log."""
    from evaluation.people.analysis import check_order
    from evaluation.people.layers import choose_layers
    from evaluation.people.measuring import measure_all
    from evaluation.people.writing import write_comparison

    manifest = load_manifest(folder)
    if manifest.class_names != trained.class_names:
        raise ValueError(
            f"{folder} has other classes than the checkpoint was trained on ({manifest.num_classes} and "
            f"{len(trained.class_names)}): compare on the data set it was trained for"
        )
    names = choose_layers(layers, options.layer)
    question, rules = _question(options, folder, manifest)
    checks = check_order(question)
    for line in [*rules, *[check.sentence for check in checks]]:
        print(line)
    for check in checks:
        if check.fault:
            print(f"warning: {check.fault}", file=sys.stderr)
    pairs = _pairs(options.pairs, question.coordinates.values.shape[1] if question.coordinates else 0)
    results = measure_all(options, trained, folder, manifest, names, question)
    run_folder = run_folder_of(options.checkpoint)
    out = options.out or (run_folder or Path()) / "people"
    figures = write_comparison(out, options, trained, folder, question, results, rules, checks, pairs)
    print("; ".join(f"{name.removeprefix('people_')} {value:.3f}" for name, value in figures.items()))
    print(f"page: {out / 'people.html'}")
    if not options.no_mlflow:
        _log_to_mlflow(run_folder, options.tracking_uri, out, figures)
    return 0


def _check(options: argparse.Namespace) -> None:
    if not (options.list_layers or options.coordinates or options.similarities or options.distances):
        raise ValueError(
            "nothing to compare with: give --coordinates, --similarities or --distances (or --list-layers)"
        )
    if options.resolution is not None and not 8 <= options.resolution <= 2048:
        raise ValueError(f"--resolution is {options.resolution}: it must be from 8 to 2048 pixels")
    if not 0 <= options.num_untrained <= 20:
        raise ValueError(f"--num-untrained is {options.num_untrained}: it must be from 0 to 20")
    if not 100 <= options.permutations <= 100_000:
        raise ValueError(f"--permutations is {options.permutations}: it must be from 100 to 100,000")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed is {options.seed}: it must be from 0 to 4,294,967,295")


def _question(options: argparse.Namespace, folder: Path, manifest: Manifest) -> tuple[Any, list[str]]:
    """The human side, its rows matched, and the sentences on how."""
    from evaluation.people.analysis import HumanSide, Question
    from evaluation.people.matching import match_rows

    index = load_index(folder, manifest, options.split)  # ValueError where there is no such split
    keys = load_keys(folder, manifest, options.split)
    others = {str(name): entry.num_samples for name, entry in manifest.splits.items()}
    others.pop(options.split)
    sample_order = None if options.order == SORTED else read_order(Path(options.order))
    class_order = None if options.class_order == SORTED else read_order(Path(options.class_order))
    rules: list[str] = []

    def side(people: HumanMatrix, rows: Any, with_samples: bool) -> Any:
        matching = match_rows(
            people, keys, manifest.class_names, split=options.split, other_counts=others, rows=rows,
            sample_order=sample_order if with_samples else None, class_order=class_order,
        )  # fmt: skip
        rules.append(f"{people.path.name}: {matching.rule}.")
        rules.extend(f"{people.path.name}: {note}." for note in people.notes)
        return HumanSide(people.values, matching)

    coordinates = judgments = None
    if options.coordinates:
        coordinates = side(read_coordinates(options.coordinates), options.rows, True)
    if path := options.similarities or options.distances:
        # A matrix of all classes and one of all samples are told apart by their size.
        judgments = side(
            read_similarities(path, are_distances=bool(options.distances)), "auto", not coordinates
        )
    question = Question(
        coordinates=coordinates,
        judgments=judgments,
        labels=index["label"].astype("int64"),
        class_names=manifest.class_names,
        measure=options.similarity,
        num_permutations=options.permutations,
        seed=options.seed,
    )
    return question, rules


def _pairs(text: str, num_dimensions: int) -> list[tuple[int, int]]:
    """Dimensions to draw, from 0: those named, or the first four pairs of neighbours.

    Raises:
        ValueError: no such pairs, or dimensions that are not there.
    """
    if not text:
        return [(first, first + 1) for first in range(0, min(num_dimensions - 1, 8), 2)]
    if not re.fullmatch(r"\d{1,4}-\d{1,4}(,\d{1,4}-\d{1,4})*", text):
        raise ValueError(f"--pairs is {text[:80]!r}: write pairs of dimensions as 1-2,3-4")
    pairs = [
        (int(first) - 1, int(second) - 1) for first, second in (pair.split("-") for pair in text.split(","))
    ]
    if len(pairs) > MAX_PAIRS or any(
        one == two or not 0 <= min(one, two) <= max(one, two) < num_dimensions for one, two in pairs
    ):
        raise ValueError(
            f"--pairs is {text!r}: at most {MAX_PAIRS} pairs of different dimensions from 1 to "
            f"{num_dimensions}"
        )
    return pairs


def _log_to_mlflow(
    run_folder: Path | None, named_uri: str | None, out: Path, figures: dict[str, float]
) -> None:
    from train.config import RecipeError, load_recipe
    from train.config.credentials import without_credentials
    from train.run_folder import RECIPE_NAME
    from train.tracking.mlflow_client import add_to_run, tracking_uri

    if run_folder is None or not (run_folder / SUMMARY_NAME).is_file():
        return
    try:
        summary = read_json(run_folder / SUMMARY_NAME)
        # Never the address inside a checkpoint, which may come from anybody: the run folder's, or a named
        # one.
        tracking = load_recipe(run_folder / RECIPE_NAME).tracking
    except (ValueError, RecipeError):
        return
    run_id = summary.get("mlflow_run_id") if isinstance(summary, dict) else None
    if not isinstance(run_id, str):
        return
    uri = named_uri or tracking_uri(tracking, run_folder.parent)
    fault = add_to_run(uri, run_id, out, "people", figures)
    print(
        f"warning: {fault}" if fault else f"added to MLflow run {run_id} ({without_credentials(uri)})",
        file=sys.stderr,
    )
