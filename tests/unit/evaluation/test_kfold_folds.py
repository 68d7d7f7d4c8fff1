"""Folds of a cross-validation: of this data set, with one start, and without damaged images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from data_prep.manifest import Manifest, load_index, load_manifest
from evaluation.kfold import folds as module
from evaluation.kfold.folds import check_data, different_weights, predict_fold, steered_by_folds
from evaluation.predict import TrainedModel
from tests.unit.evaluation.test_crops import trained  # noqa: F401
from train.config import ScheduleSection
from train.data.folds import FoldPart
from train.run_folder import write_status
from train.sweep.trial import Outcome, StopRequest, TrialStart, run_trial


@pytest.fixture
def fold(
    prepared: tuple[Path, Manifest],
    trained: TrainedModel,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> TrainedModel:
    """Fold 1 of 4 of the prepared data set, as its checkpoint would be read."""
    data = trained.recipe.data.model_copy(update={"folds": 4, "fold": 1, "loader": "reference"})
    identity = prepared[1].splits["train"].index.sha256
    fields = vars(trained) | {"progress": {"weights_at_start": "random"}, "data_identity": identity}
    made = TrainedModel(**fields | {"recipe": trained.recipe.model_copy(update={"data": data})})
    monkeypatch.setattr(module, "_last_checkpoint", lambda folder: folder / "step.pt")
    monkeypatch.setattr(module, "load_trained", lambda path, device: made)
    monkeypatch.setattr(module, "load_checkpoint", lambda path, check_sha256: {"data_identity": identity})
    return made


def test_a_fold_of_another_data_set_is_refused(prepared: tuple[Path, Manifest], fold: TrainedModel) -> None:
    run, config = Path("runs/x-fold1"), fold.recipe.data
    check_data([run], fold.data_identity, "data/intel")
    with pytest.raises(ValueError, match="runs/x-fold1 was trained on another version of data/mended"):
        check_data([run], "of another data set", "data/mended")
    object.__setattr__(fold, "data_identity", "of another data set")
    with pytest.raises(ValueError, match="was trained on another version"):
        predict_fold(run, config, prepared[0], torch.device("cpu"))


def test_damaged_images_are_left_out(
    prepared: tuple[Path, Manifest], fold: TrainedModel, tmp_path: Path
) -> None:
    shutil.copytree(prepared[0], tmp_path / "data")
    data, manifest = tmp_path / "data", load_manifest(tmp_path / "data")
    index = load_index(data, manifest, "train")
    ids = FoldPart(4, 1, 0, is_held_out=True).sample_ids(index["label"])
    row = index[ids[3]]
    with (data / manifest.splits["train"].shards[row["shard"]].name).open("r+b") as file:
        file.seek(int(row["offset"]))
        file.write(bytes(int(row["length"])))
    judged = predict_fold(Path("runs/x-fold1"), fold.recipe.data, data, torch.device("cpu"))
    assert sorted(judged.predictions.sample_ids.tolist()) == sorted(set(ids.tolist()) - {int(ids[3])})
    assert judged.weights_at_start == "random"


def test_different_weights_are_said() -> None:
    assert different_weights(["pretrained", "pretrained"]) == ""
    assert "fold 0: pretrained, fold 1: random" in different_weights(["pretrained", "random"])


def test_a_training_that_spent_its_budget_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrialStart, "command", property(lambda self: ["true"]))
    start = TrialStart(tmp_path / "recipe.yaml", tmp_path / "fold0", [], tmp_path / "fold0.log")
    start.folder.mkdir()
    write_status(start.folder, "finished", "time budget")
    (start.folder / "summary.json").write_text('{"final_top1": 0.75}')
    assert run_trial(start, "top1", lambda epoch, value: False, StopRequest()) != Outcome("complete", 0.75)
    assert start.log.exists()


def test_a_training_that_its_own_fold_steered_is_said() -> None:
    cycle, plateau = {"kind": "one_cycle", "epochs": 4}, {"kind": "plateau", "epochs": 2}
    assert steered_by_folds(ScheduleSection(phases=(cycle,))) == ""
    assert steered_by_folds(ScheduleSection(phases=(cycle, plateau))).startswith("a plateau phase looked")
    stopping = ScheduleSection(phases=(cycle,), early_stopping={"patience": 3})
    assert steered_by_folds(stopping).startswith("early stopping looked")
