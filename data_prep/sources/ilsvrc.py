"""ILSVRC2012 as image-net.org gives it: tars and the development kit, never unpacked.

    ILSVRC2012_img_train.tar            1,000 tars, n01440764.tar with n01440764_18.JPEG …
    ILSVRC2012_img_val.tar              ILSVRC2012_val_00000001.JPEG …
    ILSVRC2012_devkit_t12.tar.gz        or its folder; needed for the labels of val

The training images may also be unpacked by one level or two (`train/n01440764.tar`, `train/n01440764/…`, or
ILSVRC2012_img_train/), those of val in a folder (`val/`, ILSVRC2012_img_val/).
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from data_prep.sources import devkit, image_folder
from data_prep.sources.blobs import Blob, RangeBlob
from data_prep.sources.listing import Listing, Sample, class_folders
from data_prep.sources.tar import tar_members
from data_prep.sources.threads import in_threads
from data_prep.sources.tree import SourceTree, is_hidden, readable
from data_prep.sources.wordnet import WORDNET_ID

NAME = "ilsvrc"
DESCRIPTION = "ILSVRC2012's own tars, with the devkit's labels for val"
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
TRAIN_FOLDERS = ("train", "ILSVRC2012_img_train", "")
VAL_FOLDERS = ("val", "ILSVRC2012_img_val")
CLASS_TAR = re.compile(rf"({WORDNET_ID.pattern})\.tar")
VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
IMAGES_A_CLASS = 1281.167  # on average, for the progress bar


@dataclass(frozen=True)
class _ClassTar:
    """The tar of a class, wherever it lies."""

    class_name: str
    location: str
    offset: int
    num_bytes: int
    version: str
    name: str  # for messages


def detect(tree: SourceTree) -> bool:
    if image_folder.is_complete(tree):
        return False  # wholly unpacked, and the tars were left beside
    files = tree.files_in()
    if TRAIN_TAR in files or VAL_TAR in files or _folder_of_class_tars(tree) is not None:
        return True
    return _folder_of_val(tree) is not None and devkit.find_devkit(tree) is not None


def list_files(tree: SourceTree) -> Listing:
    """All images with class and split; without val's images, the split is assigned later.

    Raises:
        ValueError: the training images or the devkit are missing, or a file is damaged.
    """
    listing = _list_train(tree)
    has_val = VAL_TAR in tree.files_in() or _folder_of_val(tree) is not None
    place = devkit.find_devkit(tree)
    if place is None and has_val:
        raise ValueError(
            f"{tree.location} has validation images, but not their labels: add "
            "ILSVRC2012_devkit_t12.tar.gz from image-net.org"
        )
    kit = devkit.read_devkit(tree, place) if place is not None else None
    if kit is not None:
        listing.display_names = {name: kit.words[name] for name in listing.class_names & kit.words.keys()}
    if kit is None or not has_val:
        listing.warnings.append(
            f"{tree.location} has no {VAL_TAR}, so a share of the training images becomes val: add it for "
            "results that can be compared"
        )
        return listing
    for sample in listing.samples:
        sample.split = "train"
    listing.samples += _list_val(tree, kit)
    listing.class_names |= {sample.class_name for sample in listing.samples}
    return listing


def _folder_of_class_tars(tree: SourceTree) -> str | None:
    for folder in TRAIN_FOLDERS:
        if any(CLASS_TAR.fullmatch(name) for name in tree.files_in(folder)):
            return folder
    return None


def _folder_of_val(tree: SourceTree) -> str | None:
    for folder in VAL_FOLDERS:
        if any(VAL_IMAGE.fullmatch(name) for name in tree.files_in(folder)):
            return folder
    return None


def _list_train(tree: SourceTree) -> Listing:
    tars, num_others = _class_tars(tree)
    if not tars:
        for folder in TRAIN_FOLDERS[:2]:
            names = tree.subfolders(folder)
            if any(WORDNET_ID.fullmatch(name) for name in names):
                others = frozenset(name for name in names if not WORDNET_ID.fullmatch(name))
                listing = class_folders(tree, folder, None, ignore=others)
                return Listing(listing.samples, listing.class_names)
        raise ValueError(f"{tree.location} has no training images: add {TRAIN_TAR} from image-net.org")
    samples: list[Sample] = []
    for found in in_threads(_list_class, tars, f"listing {TRAIN_TAR}", IMAGES_A_CLASS):
        samples += found
    listing = Listing(samples, {tar.class_name for tar in tars})
    if num_others:
        listing.warnings.append(f"{num_others} files among the tars of the classes are left out")
    return listing


def _class_tars(tree: SourceTree) -> tuple[list[_ClassTar], int]:
    """The tars of the classes, and the number of other files in the outer tar."""
    tars = []
    if TRAIN_TAR in tree.files_in():
        location, start, num_bytes, version = tree.container(TRAIN_TAR)
        num_others = 0
        for name, offset, length in tar_members(location, num_bytes, start):
            leaf = name.rpartition("/")[2]
            match = CLASS_TAR.fullmatch(leaf)
            if match is not None:
                class_name = sys.intern(match[1])
                tars.append(_ClassTar(class_name, location, offset, length, version, f"{location}/{leaf}"))
            else:
                num_others += not is_hidden(leaf)
        if not tars:
            raise ValueError(f"{tree.location}/{TRAIN_TAR} holds no tar of a class such as n01440764.tar")
        return tars, num_others
    folder = _folder_of_class_tars(tree)
    for name in tree.files_in(folder) if folder is not None else ():
        match = CLASS_TAR.fullmatch(name)
        if match is not None:
            path = f"{folder}/{name}" if folder else name
            location, offset, num_bytes, version = tree.container(path)
            class_name = sys.intern(match[1])
            tars.append(
                _ClassTar(class_name, location, offset, num_bytes, version, f"{tree.location}/{path}")
            )
    return tars, 0


def _list_class(tar: _ClassTar) -> list[Sample]:
    return [
        Sample(
            readable(f"train/{tar.class_name}/{name}"),
            RangeBlob(tar.location, offset, length, tar.version),
            tar.class_name,
            None,
        )
        for name, offset, length in tar_members(tar.location, tar.num_bytes, tar.offset, tar.name)
        if not any(is_hidden(part) for part in name.split("/"))
    ]


def _list_val(tree: SourceTree, kit: devkit.Devkit) -> list[Sample]:
    """The validation images by their numbers: image n has the label of line n."""
    folder = _folder_of_val(tree)
    where = f"{tree.location}/{folder or VAL_TAR}"
    blobs: dict[str, Blob] = {}
    if VAL_TAR in tree.files_in():
        where = f"{tree.location}/{VAL_TAR}"
        location, start, num_bytes, version = tree.container(VAL_TAR)
        for name, offset, length in tar_members(location, num_bytes, start):
            blobs[name.rpartition("/")[2]] = RangeBlob(location, offset, length, version)
    else:
        blobs = {name: tree.blob(f"{folder}/{name}") for name in tree.files_in(folder or "")}
    numbers = {int(match[1]): name for name in blobs if (match := VAL_IMAGE.fullmatch(name))}
    if len(numbers) != len(kit.val_classes):
        raise ValueError(
            f"{where} has {len(numbers):,} images, but the devkit has labels for {len(kit.val_classes):,}: "
            "one of the two is incomplete, download it again"
        )
    samples = []
    for number, class_name in enumerate(kit.val_classes, 1):
        if number not in numbers:
            raise ValueError(f"{where} has no ILSVRC2012_val_{number:08d}.JPEG: download it again")
        name = numbers[number]
        samples.append(Sample(f"val/{name}", blobs[name], sys.intern(class_name), "val"))
    return samples
