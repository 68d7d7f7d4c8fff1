"""The category is in the file's name: the rock images of OSF.

`360 Rocks/I_Andesite_01.jpg` (train) and `120 Rocks/I_Andesite_1_120.jpg` (val). The class is the name
without its trailing numbers: `I_Andesite`. The leading letter (igneous, metamorphic, sedimentary) stays, so
that the label order is the order of the human judgments that come with the images.
"""

from __future__ import annotations

import re
from pathlib import Path

from data_prep.sources.files import SourceFile, files_in, readable

NAME = "category-in-filename"
DESCRIPTION = "rocks: the category is in the file's name, 360 Rocks for train, 120 Rocks for val"
FOLDERS = (("360 Rocks", "train"), ("120 Rocks", "val"))
CATEGORY = re.compile(r"^(?P<category>.+?)(_\d+)+\.[A-Za-z]+$")


def detect(root: Path) -> bool:
    return all((root / folder).is_dir() for folder, _ in FOLDERS)


def list_files(root: Path) -> tuple[list[SourceFile], set[str]]:
    """All files with class and split.

    Raises:
        ValueError: a file's name does not end in _NUMBER, so its category cannot be told.
    """
    files = []
    for folder, split in FOLDERS:
        for path in files_in(root / folder):
            match = CATEGORY.match(path.name)
            if match is None:
                raise ValueError(
                    f"{path} does not name its category: expected CATEGORY_NUMBER.jpg; rename or remove it"
                )
            key = readable(path.relative_to(root).as_posix())
            files.append(SourceFile(key, path, readable(match["category"]), split))
    return files, {file.class_name for file in files}
