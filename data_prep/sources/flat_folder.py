"""`<class>/…` with no split: a seeded, stratified share of each class becomes `val`."""

from __future__ import annotations

from pathlib import Path

from data_prep.sources.files import SourceFile, class_folders, files_in, subfolders

NAME = "flat-folder"
DESCRIPTION = "one folder a class, no split: a stratified share becomes val"


def detect(root: Path) -> bool:
    # Where every folder holds folders only, those are splits of some name, not classes.
    return any(files_in(folder) for folder in subfolders(root))


def list_files(root: Path) -> tuple[list[SourceFile], set[str]]:
    return class_folders(root, root, None)
