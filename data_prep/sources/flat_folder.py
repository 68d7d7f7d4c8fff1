"""`<class>/…` with no split: a seeded, stratified share of each class becomes `val`."""

from __future__ import annotations

from data_prep.sources.listing import Listing, class_folders
from data_prep.sources.tree import SourceTree

NAME = "flat-folder"
DESCRIPTION = "one folder a class, no split: a stratified share becomes val"


def detect(tree: SourceTree) -> bool:
    # Where every folder holds folders only, those are splits of some name, not classes.
    return any(tree.files_in(folder) for folder in tree.subfolders())


def list_files(tree: SourceTree) -> Listing:
    return class_folders(tree, "", None)
