"""`train/<class>/…` and `val/<class>/…` (also `valid`, `validation` or `test`): torchvision's ImageFolder."""

from __future__ import annotations

from pathlib import Path

from data_prep.sources.files import SourceFile, class_folders, subfolders

NAME = "image-folder"
DESCRIPTION = "train and val folders with one folder a class"
TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "test", "testing")


def detect(root: Path) -> bool:
    return _find(root, TRAIN_NAMES) is not None


def _find(root: Path, names: tuple[str, ...]) -> Path | None:
    """The first of `names` (in any case) that is a folder with class folders in it."""
    folders = {folder.name.lower(): folder for folder in subfolders(root)}
    return next((folders[n] for n in names if n in folders and subfolders(folders[n])), None)


def list_files(root: Path) -> tuple[list[SourceFile], set[str]]:
    """All files with class and split; without a val folder, the split is assigned later."""
    train, val = _find(root, TRAIN_NAMES), _find(root, VAL_NAMES)
    if train is None:
        raise ValueError(f"{root} has no train folder with class folders: name another --layout")
    files, class_names = class_folders(root, train, "train" if val else None)
    if val:
        val_files, val_class_names = class_folders(root, val, "val")
        files, class_names = files + val_files, class_names | val_class_names
    return files, class_names
