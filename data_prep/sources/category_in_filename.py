"""The category is in the file's name: the rock images of OSF.

`360 Rocks/I_Andesite_01.jpg` (train) and `120 Rocks/I_Andesite_1_120.jpg` (val). The class is the name
without its trailing numbers: `I_Andesite`. The leading letter (igneous, metamorphic, sedimentary) stays, so
that the label order is the order of the human judgments that come with the images.
"""

from __future__ import annotations

import re

from data_prep.sources.listing import Listing, Sample
from data_prep.sources.tree import SourceTree, readable

NAME = "category-in-filename"
DESCRIPTION = "rocks: the category is in the file's name, 360 Rocks for train, 120 Rocks for val"
FOLDERS = (("360 Rocks", "train"), ("120 Rocks", "val"))
CATEGORY = re.compile(r"^(?P<category>.+?)(_\d+)+\.[A-Za-z]+$")


def detect(tree: SourceTree) -> bool:
    return all(tree.is_folder(folder) for folder, _ in FOLDERS)


def list_files(tree: SourceTree) -> Listing:
    """All files with class and split.

    Raises:
        ValueError: a file's name does not end in _NUMBER, so its category cannot be told.
    """
    samples = []
    for folder, split in FOLDERS:
        for name in tree.files_in(folder):
            match = CATEGORY.match(name)
            path = f"{folder}/{name}"
            if match is None:
                raise ValueError(
                    f"{tree.location}/{readable(path)} does not name its category: expected "
                    "CATEGORY_NUMBER.jpg; rename or remove it"
                )
            samples.append(Sample(readable(path), tree.blob(path), readable(match["category"]), split))
    return Listing(samples, by_folder=True)
