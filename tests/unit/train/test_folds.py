"""Folds: every sample in exactly one, stratified, the same for loaders, ranks and restarts."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.manifest import Manifest, load_index
from tests.integration.launch import write_recipe
from tests.unit.train.loader_cases import CASES, PATIENCE, Case, consume, long_but, read, same
from train.__main__ import main
from train.check import split_faults
from train.config import DataSection, Recipe, ValidationSection
from train.data.folds import FoldPart, assign_folds, class_counts_of, fold_identity, fold_sizes
from train.data.loaders import LoaderPlan, build_loader
from train.distributed import Ranks
from train.resuming import load_state
from train.run_folder import RECIPE_NAME, dump_recipe, recipe_differences

NUM_FOLDS = 3


def section(folder: Path, case: Case, fold: int | None = 1, **changes: object) -> DataSection:
    fields = {"folds": NUM_FOLDS if fold is not None else None, "fold": fold, "global_batch_size": 16}
    return DataSection(path=folder, num_workers=case.num_workers, **{**fields, **changes})  # type: ignore[arg-type]


def plans(
    data: tuple[Path, Manifest], case: Case, rank: int = 0, world_size: int = 1, fold: int | None = 1
) -> tuple[LoaderPlan, LoaderPlan]:
    """(training, validation)."""
    config = section(data[0], case, fold)
    ranks = Ranks(rank, world_size, rank, world_size, torch.device("cpu"), 1)
    view = ValidationSection(batch_size=10)
    return (
        replace(LoaderPlan.training(*data, config, 5, ranks), **PATIENCE),
        replace(LoaderPlan.held_out(*data, view, config, ranks), **PATIENCE),
    )


@pytest.mark.parametrize("num_folds", [2, 3, 7])
def test_every_sample_is_in_one_fold_and_classes_are_even(num_folds: int) -> None:
    labels = np.random.default_rng(0).choice(5, 203, p=[0.5, 0.3, 0.15, 0.04, 0.01])
    folds = assign_folds(labels, num_folds, seed=0)
    assert set(folds.tolist()) == set(range(num_folds))
    sizes = fold_sizes(tuple(np.bincount(labels, minlength=5).tolist()), num_folds)
    for fold in range(num_folds):
        assert np.bincount(labels[folds == fold], minlength=5).tolist() == sizes[fold].tolist()
    assert (sizes.max(0) - sizes.min(0)).max() <= 1 and np.ptp(sizes.sum(1)) <= 1
    held_out = [FoldPart(num_folds, fold, 0, True).sample_ids(labels) for fold in range(num_folds)]
    assert sorted(np.concatenate(held_out)) == list(range(203))
    for fold, ids in enumerate(held_out):
        rest = FoldPart(num_folds, fold, 0, False).sample_ids(labels)
        assert sorted([*ids, *rest]) == list(range(203)) and np.all(np.diff(rest) > 0)


def test_folds_follow_from_seed_and_labels_alone() -> None:
    labels = np.repeat(np.arange(4), 50)
    assert np.array_equal(assign_folds(labels, 5, 0), assign_folds(labels.astype(np.int32), 5, 0))
    assert (assign_folds(labels, 5, 0) == assign_folds(labels, 5, 1)).mean() < 0.5


@pytest.mark.parametrize("case", long_but("reference", "ffcv", "dali"))
def test_a_run_never_trains_on_what_it_is_validated_on(prepared: tuple[Path, Manifest], case: Case) -> None:
    labels = load_index(*prepared, "train")["label"]
    for fold in range(NUM_FOLDS):
        training, validation = plans(prepared, case, fold=fold)
        seen = read(case, training)
        held_out = read(case, validation)
        assert held_out.ids.tolist() == np.flatnonzero(assign_folds(labels, NUM_FOLDS, 0) == fold).tolist()
        assert np.array_equal(held_out.labels, labels[held_out.ids])
        assert not set(seen.ids) & set(held_out.ids) and len(set(seen.ids)) == len(seen.ids)
        assert len(seen.ids) == (160 - len(held_out.ids)) // 16 * 16


@pytest.mark.parametrize("case", CASES[:1])
def test_any_number_of_ranks_sees_the_same(prepared: tuple[Path, Manifest], case: Case) -> None:
    whole_training, whole_validation = (read(case, plan) for plan in plans(prepared, case))
    shares = [plans(prepared, case, rank, 2) for rank in range(2)]
    trained = [read(case, training) for training, _ in shares]
    assert sorted(np.concatenate([s.ids for s in trained])) == sorted(whole_training.ids)
    assert all(
        np.array_equal(whole_training.by_id[i], image) for s in trained for i, image in s.by_id.items()
    )
    validated = np.concatenate([read(case, validation).ids for _, validation in shares])
    assert sorted(validated) == whole_validation.ids.tolist()


@pytest.mark.parametrize("case", CASES[:1])
def test_crops_are_those_of_the_same_sample_without_folds(
    prepared: tuple[Path, Manifest], case: Case
) -> None:
    without = read(case, plans(prepared, case, fold=None)[0], epoch=2).by_id
    within = read(case, plans(prepared, case)[0], epoch=2).by_id
    assert len(within) > 90 and all(np.array_equal(without[i], image) for i, image in within.items())


@pytest.mark.parametrize("case", CASES[:1])
def test_taken_up_in_the_middle_of_an_epoch(prepared: tuple[Path, Manifest], case: Case) -> None:
    training, _ = plans(prepared, case)
    whole, rest = read(case, training, 1), read(case, training, 1, start_sample=32)
    assert np.array_equal(whole.ids[32:], rest.ids) and np.array_equal(whole.images[32:], rest.images)
    assert not same(whole, read(case, training, 2))


def test_what_replaces_a_damaged_sample_is_not_held_out(
    prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    case = Case("reference")
    folder = Path(shutil.copytree(prepared[0], tmp_path / "copy"))
    index = load_index(*prepared, "train")
    training, _ = plans((folder, prepared[1]), case)
    held_out = set(FoldPart(NUM_FOLDS, 1, 0, True).sample_ids(index["label"]).tolist())
    damaged = [sample_id for sample_id in range(160) if sample_id not in held_out][:30]
    shard = folder / prepared[1].splits["train"].shards[0].name
    with shard.open("r+b") as file:
        for sample_id in damaged:
            file.seek(int(index[sample_id]["offset"]) + 20)
            file.write(b"damage")
    loader = build_loader("reference", replace(training, max_damaged_fraction=1.0))
    seen = consume(loader)
    loader.close()
    assert len(loader.damaged) > 20
    assert not (set(seen.ids.tolist()) & (held_out | set(damaged)))


def test_steps_and_class_counts_follow(prepared: tuple[Path, Manifest]) -> None:
    manifest = prepared[1]
    counts = class_counts_of(manifest, section(prepared[0], Case("reference")))
    assert sum(counts["train"]) + sum(counts["val"]) == 160 and len(counts["train"]) == 4
    assert class_counts_of(manifest, section(prepared[0], Case("reference"), None))["val"] == (10, 11, 11, 11)
    assert Counter(counts["val"]).keys() <= {13, 14}


def recipe(folder: Path, **data: object) -> Recipe:
    return Recipe.model_validate({"data": {"path": str(folder), "global_batch_size": 16, **data}})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"fold": 0}, "fold needs data.folds"),
        ({"folds": 5}, "fold must be one of 0 … 4"),
        ({"folds": 5, "fold": 5}, "fold must be one of 0 … 4"),
        ({"folds": 1, "fold": 0}, "greater than or equal to 2"),
    ],
)
def test_a_fold_that_is_none_is_refused(tmp_path: Path, keys: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recipe(tmp_path, **keys)


def test_data_that_folds_leave_nothing_of_are_refused(prepared: tuple[Path, Manifest]) -> None:
    folder, manifest = prepared
    assert split_faults(manifest, recipe(folder, folds=5, fold=0)) == []
    assert "128 training images without fold 0" in "".join(
        split_faults(manifest, recipe(folder, folds=5, fold=0, global_batch_size=129))
    )
    train = manifest.splits["train"]
    lonely = manifest.model_copy(
        update={"splits": {"train": train.model_copy(update={"class_counts": (1, 39, 60, 60)})}}
    )
    # A split of its own is not needed where folds validate.
    assert split_faults(lonely, recipe(folder, folds=5, fold=0)) == [
        "data.folds: class 'class_0' has one training image: each class needs two or more"
    ]


def test_another_fold_is_another_recipe(tmp_path: Path) -> None:
    (tmp_path / RECIPE_NAME).write_text(dump_recipe(recipe(tmp_path, folds=3, fold=0)))
    assert recipe_differences(tmp_path, recipe(tmp_path, folds=3, fold=0)) == []
    assert recipe_differences(tmp_path, recipe(tmp_path, folds=3, fold=1)) == ["data.fold: was 0, now 1"]


def test_a_fork_keeps_the_fold(
    prepared: tuple[Path, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(write_recipe(tmp_path, prepared[0])), f"run.folder={tmp_path}", "run.name=x"]
    words += ["schedule.phases=[{kind: constant, epochs: 1}]", "data.folds=3"]
    assert main([*words, "data.fold=0", "budget.max_hours=1.0e-9"]) == 0
    assert main([*words, "data.fold=1", "--fork"]) == 1
    error = capsys.readouterr().err
    assert "without fold 0 of 3 (fold_seed 0)" in error and "without fold 1 of 3 (fold_seed 0)" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("then", "now", "fits"), [(None, None, True), (1, 1, True), (1, 2, False), (None, 1, False)]
)
def test_a_checkpoint_without_a_saved_fold(tmp_path: Path, then: Any, now: Any, fits: bool) -> None:
    before, after = (
        recipe(tmp_path) if fold is None else recipe(tmp_path, folds=3, fold=fold) for fold in (then, now)
    )
    run: Any = SimpleNamespace(
        folder=tmp_path,
        recipe=after,
        manifest=SimpleNamespace(class_names=("a", "b")),
        data_identity="0",
        fold_identity=fold_identity(after.data),
    )
    state = {"class_names": ["a", "b"], "data_identity": "0", "recipe": dump_recipe(before)}
    # The state has no more than this: where the fold fits, the next thing is missed.
    with pytest.raises(ValueError, match="written by an earlier version" if fits else "hold out the same"):
        load_state(run, state)
    del state["recipe"]
    with pytest.raises(
        ValueError, match="written by an earlier version" if now is None else "hold out the same"
    ):
        load_state(run, state)
