"""The validation crops of some samples, read by id: for looking at a few images of a large split again.

crops, labels = validation_crops(trained, Path("data/intel"), "val", ids, resolution=96)
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from data_prep.manifest import load_index, load_manifest
from data_prep.progress import progress_bar
from evaluation.predict import TrainedModel
from train.data.augment import center_crops
from train.data.resize import resize_area
from train.data.samples import SampleReader

READ_AHEAD = 64  # samples announced to the kernel at a time


def validation_crops(
    trained: TrainedModel,
    folder: Path,
    split: Literal["train", "val"],
    sample_ids: NDArray[np.int64],
    *,
    resolution: int | None = None,
    progress: bool = False,
) -> NDArray[np.uint8]:
    """Centre crops as the validation of this checkpoint sees them: uint8 (n, resolution, resolution, 3).

    Equal to those of every loader but for rounding. The whole answer is in memory: 3 × resolution² bytes an
    image.

    Args:
        sample_ids: int64 (n,), of the split.
        resolution: side in pixels; None: the recipe's validation resolution.

    Raises:
        ValueError: no such sample. RuntimeError: a sample is damaged.
    """
    manifest = load_manifest(folder)
    index = load_index(folder, manifest, split)
    if len(sample_ids) and not (sample_ids.min() >= 0 and sample_ids.max() < len(index)):
        raise ValueError(f"The split {split} of {folder} has the samples 0 to {len(index) - 1}.")
    side = resolution or trained.recipe.validation_resolution
    boxes = center_crops(
        index["width"][sample_ids], index["height"][sample_ids], trained.recipe.validation.crop_ratio
    )
    reader = SampleReader([folder / shard.name for shard in manifest.splits[split].shards], index)
    crops = np.empty((len(sample_ids), side, side, 3), np.uint8)
    try:
        with progress_bar(len(sample_ids), "read", progress) as bar:
            for position, sample_id in enumerate(sample_ids):
                if position % READ_AHEAD == 0:
                    reader.will_need(sample_ids[position : position + READ_AHEAD])
                top, left, height, width = boxes[position]
                image = _decode(reader, int(sample_id), folder)
                crop = image[top : top + height, left : left + width]
                crops[position] = resize_area(torch.from_numpy(crop.copy()), side).numpy()
                bar.update()
    finally:
        reader.close()
    return crops


def _decode(reader: SampleReader, sample_id: int, folder: Path) -> NDArray[np.uint8]:
    content = reader.read(sample_id)
    if fault := reader.fault(sample_id, content, check=True):
        raise RuntimeError(f"sample {sample_id} of {folder} is damaged: {fault}: copy the data set again")
    return np.asarray(Image.open(io.BytesIO(content), formats=["JPEG"]).convert("RGB"))
