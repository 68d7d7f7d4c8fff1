"""ImageNet as Kaggle gives it (imagenet-object-localization-challenge), unpacked or as its zip.

    ILSVRC/Data/CLS-LOC/train/n01440764/n01440764_18.JPEG
    ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG
    ILSVRC/Data/CLS-LOC/test/…           no labels: left out
    LOC_val_solution.csv                 ImageId,PredictionString: the class is the latter's first word
    LOC_synset_mapping.txt               n01440764 tench, Tinca tinca

The source may also be ILSVRC or CLS-LOC itself, with the csv in it.
"""

from __future__ import annotations

import csv
import sys

from data_prep.sources.blobs import MissingBlob
from data_prep.sources.listing import Listing, Sample, class_folders, read_lines
from data_prep.sources.tree import SourceTree, readable
from data_prep.sources.wordnet import WORDNET_ID

NAME = "kaggle-cls-loc"
DESCRIPTION = "Kaggle's ImageNet: ILSVRC/Data/CLS-LOC, with LOC_val_solution.csv for val"
PLACES = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", "")
CSV, NAMES = "LOC_val_solution.csv", "LOC_synset_mapping.txt"


def detect(tree: SourceTree) -> bool:
    place = _place(tree)
    if place is None:
        return False
    # Where the source is CLS-LOC itself, only the csv or the names in val tell it from other folders.
    return bool(place) or tree.is_file(CSV) or _is_flat_val(tree)


def _place(tree: SourceTree) -> str | None:
    return next((place for place in PLACES if tree.is_folder(f"{place}/train".lstrip("/"))), None)


def _is_flat_val(tree: SourceTree) -> bool:
    classes = tree.subfolders("train")
    return (
        bool(classes)
        and all(WORDNET_ID.fullmatch(name) for name in classes)
        and not tree.subfolders("val")
        and any(name.startswith("ILSVRC2012_val_") for name in tree.files_in("val")[:3])
    )


def list_files(tree: SourceTree) -> Listing:
    """All labelled images with class and split. ValueError: the csv is missing or does not fit."""
    place = _place(tree)
    if place is None:
        raise ValueError(f"{tree.location} has no ILSVRC/Data/CLS-LOC/train: name another --layout")
    start = f"{place}/" if place else ""
    listing = class_folders(tree, f"{start}train", "train")
    if tree.subfolders(f"{start}val"):
        listing = listing.joined(class_folders(tree, f"{start}val", "val"))
    elif tree.files_in(f"{start}val"):
        listing.samples += _list_val(tree, place, f"{start}val")
        listing.class_names |= {sample.class_name for sample in listing.samples}
    else:
        listing.warnings.append(
            f"{tree.location}/{start}val has no images, so a share of the training images becomes val"
        )
        for sample in listing.samples:
            sample.split = None
    listing.by_folder = False  # what lies beside the classes, such as test, has no labels
    names = _find(tree, place, NAMES)
    for line in read_lines(tree, names) if names else ():
        class_name, _, words = line.partition(" ")
        if class_name in listing.class_names:
            listing.display_names[class_name] = words.strip()
    return listing


def _find(tree: SourceTree, place: str, name: str) -> str | None:
    """Path of a file that lies beside ILSVRC, or in one of the folders from there to the images."""
    folder, folders = place, [place]
    while folder:
        folder = folder.rpartition("/")[0]
        folders.append(folder)
    paths = [f"{folder}/{name}" if folder else name for folder in reversed(folders)]
    return next((path for path in paths if tree.is_file(path)), None)


def _list_val(tree: SourceTree, place: str, folder: str) -> list[Sample]:
    path = _find(tree, place, CSV)
    if path is None:
        raise ValueError(
            f"{tree.location} has no {CSV}, which holds the labels of {folder}: put it there, or take the "
            "folder that holds both it and ILSVRC as --source"
        )
    classes = _read_csv(tree, path)
    names = tree.files_in(folder)
    samples = []
    for name in names:
        image = name.rpartition(".")[0]
        if image not in classes:
            raise ValueError(
                f"{tree.location}/{path} has no row for {readable(folder + '/' + name)}: download the csv "
                "again, or remove the image"
            )
        key = f"{folder}/{name}"
        samples.append(Sample(readable(key), tree.blob(key), classes.pop(image), "val"))
    for image, class_name in classes.items():
        samples.append(Sample(readable(f"{folder}/{image}.JPEG"), MissingBlob(), class_name, "val"))
    return samples


def _read_csv(tree: SourceTree, path: str) -> dict[str, str]:
    """Image (without its ending) → class name."""
    where = f"{tree.location}/{path}"
    classes = {}
    try:
        rows = csv.DictReader(read_lines(tree, path))
        columns = rows.fieldnames or []
        if "ImageId" not in columns or "PredictionString" not in columns:
            raise ValueError(
                f"{where} has the columns {', '.join(columns) or 'none'}, but ImageId and PredictionString "
                "are needed: download it again"
            )
        for row in rows:
            words = (row["PredictionString"] or "").split()
            if not words or not WORDNET_ID.fullmatch(words[0]):
                raise ValueError(f"{where}, line {rows.line_num}: no WordNet id follows the image's name")
            classes[row["ImageId"]] = sys.intern(words[0])
    except csv.Error as error:
        raise ValueError(f"{where} is no csv file ({error}): download it again") from None
    return classes
