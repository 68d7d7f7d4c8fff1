"""Tiny ImageNet, unpacked or as its zip.

train/n01443537/images/n01443537_0.JPEG     beside it n01443537_boxes.txt
val/images/val_0.JPEG
val/val_annotations.txt                     val_0.JPEG <tab> n03444034 <tab> box
test/images/…                               no labels: left out
wnids.txt, words.txt                        n01443537 <tab> goldfish, Carassius auratus
"""

from __future__ import annotations

import sys

from data_prep.sources.blobs import MissingBlob
from data_prep.sources.listing import Listing, Sample, read_lines
from data_prep.sources.tree import SourceTree, readable

NAME = "tiny-imagenet"
DESCRIPTION = "Tiny ImageNet: train/<class>/images, and val/images with val_annotations.txt"
ANNOTATIONS = "val/val_annotations.txt"


def detect(tree: SourceTree) -> bool:
    return (
        tree.is_file(ANNOTATIONS)
        and tree.is_folder("val/images")
        and any(tree.is_folder(f"train/{name}/images") for name in tree.subfolders("train")[:3])
    )


def list_files(tree: SourceTree) -> Listing:
    """All labelled images with class and split. ValueError: the annotations do not fit the images."""
    samples, class_names = [], set()
    for name in tree.subfolders("train"):
        class_name = sys.intern(readable(name))
        class_names.add(class_name)
        samples += [
            Sample(readable(path), tree.blob(path), class_name, "train")
            for path in tree.files_below(f"train/{name}/images")
        ]
    samples += _list_val(tree)
    class_names |= {sample.class_name for sample in samples}
    display_names = {}
    for line in read_lines(tree, "words.txt") if tree.is_file("words.txt") else ():
        class_name, tab, words = line.partition("\t")
        if tab and class_name in class_names:
            display_names[class_name] = words.strip()
    return Listing(samples, class_names, display_names)


def _list_val(tree: SourceTree) -> list[Sample]:
    if not tree.is_file(ANNOTATIONS):
        raise ValueError(f"{tree.location} has no {ANNOTATIONS}, which holds val's labels: unpack it again")
    classes: dict[str, str] = {}
    for number, line in enumerate(read_lines(tree, ANNOTATIONS), 1):
        fields = line.split("\t")
        if len(fields) < 2 or not fields[1].strip():
            raise ValueError(
                f"{tree.location}/{ANNOTATIONS}, line {number}: expected the image and its class, "
                "separated by a tab"
            )
        classes[fields[0]] = sys.intern(fields[1].strip())
    samples = []
    for name in tree.files_in("val/images"):
        path = f"val/images/{name}"
        if name not in classes:
            raise ValueError(
                f"{tree.location}/{ANNOTATIONS} has no line for {readable(path)}: add it, or remove the image"
            )
        samples.append(Sample(readable(path), tree.blob(path), classes.pop(name), "val"))
    for name, class_name in classes.items():
        samples.append(Sample(readable(f"val/images/{name}"), MissingBlob(), class_name, "val"))
    return samples
