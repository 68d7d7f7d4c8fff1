"""Intel image classification: `seg_train/<class>/N.jpg` and `seg_test/<class>/N.jpg`.

Kaggle's archive nests a second folder of the same name (`seg_train/seg_train/<class>`), and brings an
unlabelled `seg_pred`, which is left alone.
"""

from __future__ import annotations

from data_prep.sources.listing import Listing, class_folders
from data_prep.sources.tree import SourceTree

NAME = "intel"
DESCRIPTION = "Intel scenes: seg_train and seg_test with one folder a class"


def detect(tree: SourceTree) -> bool:
    return tree.is_folder("seg_train") and tree.is_folder("seg_test")


def list_files(tree: SourceTree) -> Listing:
    train, test = (
        class_folders(tree, f"{name}/{name}" if tree.is_folder(f"{name}/{name}") else name, split)
        for name, split in (("seg_train", "train"), ("seg_test", "val"))
    )
    return train.joined(test)
