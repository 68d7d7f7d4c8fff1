"""Validate a checkpoint on any number of ranks and print the exact counts; started by test_training."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from data_prep.manifest import load_manifest
from evaluation.predict import load_trained
from train.data.loaders import LoaderPlan, build_loader
from train.distributed import distributed, exit_rank
from train.precision import build_autocast
from train.validation import validate

checkpoint, folder, loader_name, precision = sys.argv[1:]
with distributed() as ranks:
    trained = load_trained(Path(checkpoint), torch.device("cpu"))
    data = trained.recipe.data.model_copy(update={"num_workers": 0})
    plan = LoaderPlan.validation(
        Path(folder), load_manifest(Path(folder)), trained.recipe.validation, data, ranks
    )
    loader = build_loader(loader_name, plan)
    autocast = build_autocast(precision, ranks.device)
    result = validate(trained.model, loader, trained.normalize, ranks, 32, autocast)
    loader.close()
    if ranks.is_primary:
        print("counts", result.num_samples, *result.correct)
exit_rank(0)
