"""`train/<class>/…` and `val/<class>/…` (also `valid`, `validation` or `test`): torchvision's ImageFolder."""

from __future__ import annotations

from pathlib import Path

from data_prep.sources.files import SourceFile, class_folders, subfolders

NAME = "image-folder"
DESCRIPTION = "train and val folders with one folder a class"
VAL_NAMES = ("val", "valid", "validation", "test")


def detect(root: Path) -> bool:
    return (root / "train").is_dir() and bool(subfolders(root / "train"))


def list_files(root: Path) -> tuple[list[SourceFile], set[str]]:
    """All files with class and split; without a val folder, the split is assigned later."""
    val = next((root / name for name in VAL_NAMES if (root / name).is_dir()), None)
    files, class_names = class_folders(root, root / "train", "train" if val else None)
    if val:
        val_files, val_class_names = class_folders(root, val, "val")
        files, class_names = files + val_files, class_names | val_class_names
    return files, class_names
