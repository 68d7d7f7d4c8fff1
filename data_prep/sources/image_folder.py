"""`train/<class>/…` and `val/<class>/…` (also `valid`, `validation` or `test`): torchvision's ImageFolder.

One split may lie in a second folder of its name (`train/train/<class>`), as programs that unpack leave it.
"""

from __future__ import annotations

from data_prep.sources.listing import Listing, class_folders, is_image
from data_prep.sources.tree import SourceTree, readable

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
    listing = class_folders(tree, _unnested(tree, train), "train" if val else None)
    if val:
        listing = listing.joined(class_folders(tree, _unnested(tree, val), "val"))
    for name in tree.subfolders():
        if name not in (train, val) and (num_images := _num_images(tree, name)):
            taken = f"{readable(train)} and {readable(val)} are" if val else f"{readable(train)} is"
            listing.warnings.append(
                f"{num_images:,} images of the {readable(name)} folder are left out: {taken} the data set"
            )
    return listing


def _unnested(tree: SourceTree, folder: str) -> str:
    """`train`, or `train/train` where unpacking made one in the other: it is alone and has class folders."""
    inner = f"{folder}/{folder}"
    return inner if tree.subfolders(folder) == [folder] and tree.subfolders(inner) else folder


def _num_images(tree: SourceTree, folder: str) -> int:
    """Images in the folders of a folder; of those directly in it, every layout of folders warns."""
    return sum(path.count("/") > 1 and is_image(path) for path in tree.files_below(folder))
