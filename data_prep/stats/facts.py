"""What a data card says in words and figures, the same on the page and in the picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.stats.look import bytes_text, count_text
from data_prep.stats.samples import DataSet

FORMATS = {"ffcv": "FFCV (.beton)", "dali": "DALI / WebDataset (tars)"}


@dataclass(frozen=True)
class Facts:
    """The words and figures of a data set.

    Attributes:
        titles: class titles in label order.
        counts: by split, images a class, int (classes,).
        indexes: by split, INDEX_DTYPE (samples,).
        tiles: (what, figure, note) each.
        recipe: how the images were made, one sentence.
        details: (what, value) each, for the list at the end of the page.
    """

    name: str
    titles: list[str]
    counts: dict[str, np.ndarray]
    indexes: dict[str, np.ndarray]
    lede: str
    tiles: list[tuple[str, str, str]]
    balance: str
    recipe: str
    details: list[tuple[str, str]]


def facts_of(data_set: DataSet) -> Facts:
    """The facts of an opened data set."""
    indexes: dict[str, np.ndarray] = {name: samples.index for name, samples in data_set.splits.items()}
    counts: dict[str, np.ndarray] = {
        name: np.array(samples.entry.class_counts) for name, samples in data_set.splits.items()
    }
    splits = ", ".join(f"{len(index):,} {name}" for name, index in indexes.items())
    num_classes = data_set.manifest.num_classes
    lede = (
        f"{count_text(data_set.num_samples, 'image')} of {count_text(num_classes, 'class', 'classes')}: "
        f"{splits}. {FORMATS[data_set.manifest.format]}, {bytes_text(data_set.num_bytes)}."
    )
    if "val" not in counts:
        lede += " It has no validation split."
    return Facts(
        name=data_set.name,
        titles=data_set.class_titles,
        counts=counts,
        indexes=indexes,
        lede=lede,
        tiles=_tiles(data_set, counts),
        balance=_balance(counts),
        recipe=_recipe(data_set),
        details=_details(data_set),
    )


def _tiles(data_set: DataSet, counts: dict[str, np.ndarray]) -> list[tuple[str, str, str]]:
    manifest = data_set.manifest
    index = np.concatenate([samples.index for samples in data_set.splits.values()])
    total = np.sum(list(counts.values()), axis=0)
    smallest, largest = int(total.min()), int(total.max())
    spread = (
        f"{count_text(smallest, 'image')} each"
        if smallest == largest
        else f"{smallest:,} to {largest:,} images"
    )
    splits = " + ".join(f"{len(samples.index):,} {name}" for name, samples in data_set.splits.items())
    median = f"{np.median(index['width']):.0f} × {np.median(index['height']):.0f}" if len(index) else "–"
    average = bytes_text(float(index["length"].mean())) if len(index) else "–"
    return [
        ("Images", f"{data_set.num_samples:,}", splits),
        ("Classes", f"{manifest.num_classes:,}", spread),
        ("Size on disk", bytes_text(data_set.num_bytes), f"{average} an image"),
        ("Median image", median, "pixels, width × height"),
        ("Left out", f"{manifest.num_quarantined:,}", f"of {manifest.num_found:,} files found"),
    ]


def _balance(counts: dict[str, np.ndarray]) -> str:
    sentences = []
    for split, part in counts.items():
        smallest, largest = int(part.min()), int(part.max())
        if smallest == largest:
            sentences.append(f"Every class has {count_text(largest, f'{split} image')}.")
            continue
        num_largest = int((part == largest).sum())
        many = f"; {num_largest:,} classes have the most" if num_largest > 1 else ""
        times = largest / smallest if smallest else 0
        ratio = f", {times:,.{times < 10:d}f} times as many in the largest" if smallest else ""
        empty = int((part == 0).sum())
        none = f"; {count_text(empty, 'class has', 'classes have')} none" if empty else ""
        sentences.append(f"A class has {smallest:,} to {largest:,} {split} images{ratio}{many}{none}.")
    return " ".join(sentences)


def _recipe(data_set: DataSet) -> str:
    images, manifest = data_set.manifest.images, data_set.manifest
    cap = f"{images.cap_side} side ≤ {images.resolution_cap} px" if images.resolution_cap else "no size limit"
    how = f"re-encoded at quality {images.quality}" if images.encode == "q90" else "bytes kept where possible"
    mean, std = (" ".join(f"{value:.3f}" for value in row) for row in (manifest.mean, manifest.std))
    made_by = f"Made by imagenet-sprint {manifest.tool_version}."
    return f"JPEG, {how}, {cap}. Mean {mean}, std {std} (RGB, of 1). {made_by}"


def _details(data_set: DataSet) -> list[tuple[str, str]]:
    manifest, images = data_set.manifest, data_set.manifest.images
    yes_no = ("no", "yes")
    details = [
        ("Location", data_set.location),
        ("Format", FORMATS[manifest.format]),
        ("Source layout", manifest.layout),
        ("Mean (RGB, of 1)", ", ".join(f"{value:.4f}" for value in manifest.mean)),
        ("Standard deviation", ", ".join(f"{value:.4f}" for value in manifest.std)),
        ("Encoding", "re-encoded once" if images.encode == "q90" else "lossless where possible"),
        ("JPEG quality", f"{images.quality}, chroma {':'.join(images.subsampling)}"),
        (
            "Size limit",
            f"{images.cap_side} side {images.resolution_cap} px" if images.resolution_cap else "none",
        ),
        ("Turned as EXIF says", yes_no[images.apply_exif]),
        ("Restart markers", yes_no[images.restart_markers]),
    ]
    for name, samples in data_set.splits.items():
        size = bytes_text(sum(shard.bytes for shard in samples.entry.shards))
        shards = count_text(len(samples.entry.shards), "shard")
        details.append((f"Split {name}", f"{count_text(len(samples.index), 'image')}, {shards}, {size}"))
    details.append(("Files found", f"{manifest.num_found:,}"))
    details.append(("Quarantined", f"{manifest.num_quarantined:,}"))
    details += [
        (f"Quarantined: {reason}", f"{count:,}") for reason, count in manifest.quarantined_by_reason.items()
    ]
    details.append(("Fingerprint of the source", manifest.source_fingerprint))
    return [*details, ("Made by", f"imagenet-sprint {manifest.tool_version}")]
