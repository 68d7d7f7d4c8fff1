"""The names behind WordNet ids such as `n01440764`.

timm, which is installed anyway, brings the list; it is read as a text file, since importing timm would
import torch.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

WORDNET_ID = re.compile(r"n\d{8}")


def wordnet_names(class_names: set[str]) -> dict[str, str]:
    """Names for those classes that are WordNet ids; {} where none is, or where the list is missing."""
    ids = {name for name in class_names if WORDNET_ID.fullmatch(name)}
    if not ids:
        return {}
    known = _lemmas()
    return {name: known[name] for name in ids if name in known}


def wordnet_id_in(file_name: str) -> str | None:
    """The WordNet id in an image's name: `n01440764_18.JPEG`, `ILSVRC2012_val_00000001_n01751748.JPEG`."""
    stem = file_name.rpartition("/")[2].split(".", 1)[0]
    found = [part for part in stem.split("_") if WORDNET_ID.fullmatch(part)]
    return found[-1] if found else None


def imagenet_ids() -> list[str]:
    """The 1,000 WordNet ids of ImageNet-1k in label order; [] where the list is missing."""
    file = _timm_info("imagenet_synsets.txt")
    return file.read_text(encoding="utf-8").split() if file else []


@functools.cache
def _lemmas() -> dict[str, str]:
    file = _timm_info("imagenet_synset_to_lemma.txt")
    if file is None:
        return {}
    lines = (line.split("\t", 1) for line in file.read_text(encoding="utf-8").splitlines())
    return {parts[0]: parts[1] for parts in lines if len(parts) == 2}


def _timm_info(name: str) -> Path | None:
    spec = importlib.util.find_spec("timm")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(place) / "data" / "_info" / name
        if file.is_file():
            return file
    return None
