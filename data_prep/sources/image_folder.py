"""`train/<class>/…` and `val/<class>/…` (also `valid`, `validation` or `test`): torchvision's ImageFolder."""

from __future__ import annotations

from data_prep.sources.listing import Listing, class_folders
from data_prep.sources.tree import SourceTree

NAME = "image-folder"
DESCRIPTION = "train and val folders with one folder a class"
TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "test", "testing")


def detect(tree: SourceTree) -> bool:
    return _find(tree, TRAIN_NAMES) is not None


def is_complete(tree: SourceTree) -> bool:
    """Whether both train and val have class folders: then nothing else beside them is the data set."""
    return _find(tree, TRAIN_NAMES) is not None and _find(tree, VAL_NAMES) is not None


def _find(tree: SourceTree, names: tuple[str, ...]) -> str | None:
    """The first of `names` (in any case) that is a folder with class folders in it."""
    folders = {folder.lower(): folder for folder in tree.subfolders()}
    return next((folders[n] for n in names if n in folders and tree.subfolders(folders[n])), None)


def list_files(tree: SourceTree) -> Listing:
    """All files with class and split; without a val folder, the split is assigned later."""
    train, val = _find(tree, TRAIN_NAMES), _find(tree, VAL_NAMES)
    if train is None:
        raise ValueError(f"{tree.location} has no train folder with class folders: name another --layout")
    listing = class_folders(tree, train, "train" if val else None)
    if val:
        listing = listing.joined(class_folders(tree, val, "val"))
    return listing
