from dataclasses import replace

import numpy as np
import pytest
import torch

from data_prep.manifest import load_manifest
from evaluation.crops import validation_crops
from evaluation.predict import TrainedModel
from train.config import Recipe
from train.data.batch import Normalize
from train.data.loaders import LoaderPlan, build_loader
from train.distributed import distributed
from train.models.residual_cnn import ResidualCnn


@pytest.fixture
def trained(prepared):
    folder, manifest = prepared
    recipe = Recipe.model_validate(
        {
            "data": {"path": str(folder), "num_workers": 0},
            "validation": {"resolution": 40, "crop_ratio": 0.8, "batch_size": 16},
            "precision": {"mode": "fp32"},
        }
    )
    torch.manual_seed(0)
    return TrainedModel(
        model=ResidualCnn(4, [8, 8, 16, 16]).eval(),
        normalize=Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        recipe=recipe,
        class_names=manifest.class_names,
        progress={"epoch": 1},
        device=torch.device("cpu"),
    )


def test_crops_are_those_of_the_validation(trained, prepared):
    folder = prepared[0]
    with distributed() as ranks:
        plan = LoaderPlan.validation(
            folder, load_manifest(folder), trained.recipe.validation, trained.recipe.data, ranks
        )
        loader = build_loader("reference", plan)
        whole = torch.cat([batch.images for batch in loader.epoch(0, resolution=40)]).numpy()
        loader.close()
    ids = np.array([17, 2, 42, 2])
    crops = validation_crops(trained, folder, "val", ids)
    assert crops.shape == (4, 40, 40, 3)
    # Two decoders of JPEG, which may round another way.
    assert np.abs(crops.astype(int) - whole[ids]).max() <= 4
    assert (crops[1] == crops[3]).all() and (crops[0] != crops[1]).any()
    assert validation_crops(trained, folder, "val", ids[:1], resolution=24).shape == (1, 24, 24, 3)


def test_a_sample_that_is_not_there_or_damaged_is_a_sentence(trained, prepared, copy_of_prepared):
    with pytest.raises(ValueError, match="samples 0 to 42"):
        validation_crops(trained, prepared[0], "val", np.array([43]))
    folder = copy_of_prepared()
    shard = folder / load_manifest(folder).splits["val"].shards[0].name
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(RuntimeError, match=r"sample 3 .* is damaged: its bytes are not those"):
        validation_crops(replace(trained), folder, "val", np.array([3]))
