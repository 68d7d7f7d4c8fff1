"""Intel image classification: `seg_train/<class>/N.jpg` and `seg_test/<class>/N.jpg`.

Kaggle's archive nests a second folder of the same name (`seg_train/seg_train/<class>`), and brings an
unlabelled `seg_pred`, which is left alone.
"""

from __future__ import annotations

from pathlib import Path

from data_prep.sources.files import SourceFile, class_folders

NAME = "intel"
DESCRIPTION = "Intel scenes: seg_train and seg_test with one folder a class"


def detect(root: Path) -> bool:
    return (root / "seg_train").is_dir() and (root / "seg_test").is_dir()


def list_files(root: Path) -> tuple[list[SourceFile], set[str]]:
    files: list[SourceFile] = []
    class_names: set[str] = set()
    for name, split in (("seg_train", "train"), ("seg_test", "val")):
        nested = root / name / name
        split_files, split_names = class_folders(root, nested if nested.is_dir() else root / name, split)
        files, class_names = files + split_files, class_names | split_names
    return files, class_names
