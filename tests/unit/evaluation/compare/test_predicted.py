from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from evaluation.compare.comparison import compare
from evaluation.compare.examine import examine
from evaluation.compare.predicted import saved_predictions
from evaluation.compare.runs import read_run_folder
from evaluation.predictions_file import PREDICTIONS_NAME, SavedPredictions, predictions_bytes
from tests.unit.evaluation.compare.made_up import make_predictions, write_run

DATA, CHECKPOINT, VIEW = "d" * 64, "c" * 64, "40 px, crop 1"


def write_reported(folder, right, **changes):
    """A run folder with a report's predictions in it."""
    write_run(folder, checkpoint_sha256=CHECKPOINT)
    plain = make_predictions(right, shuffle=True)
    texts = {
        "data_index_sha256": DATA,
        "checkpoint_sha256": CHECKPOINT,
        "split": "val",
        "view": VIEW,
    } | changes
    saved = SavedPredictions(plain.logits, plain.labels, plain.sample_ids, plain.class_names, **texts)
    (folder / "report").mkdir()
    (folder / "report" / PREDICTIONS_NAME).write_bytes(predictions_bytes(saved))
    return folder


def find(folder, data_sha256=None):
    return saved_predictions(read_run_folder(folder), "val", data_sha256=data_sha256, view=VIEW)


def test_predictions_of_the_checkpoint_are_taken_in_order(tmp_path):
    found, note = find(write_reported(tmp_path / "demo", np.ones(30)))
    assert found.predictions.sample_ids.tolist() == list(range(30))
    assert (found.data_sha256, note) == (DATA, "")


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"checkpoint_sha256": "e" * 64}, "another checkpoint"),
        ({"checkpoint_sha256": ""}, "another checkpoint"),
        ({"split": "train"}, "the split 'train'"),
        ({"view": "64 px, crop 1"}, "another view (64 px, crop 1)"),
        ({"data_index_sha256": ""}, "other data"),
    ],
)
def test_predictions_of_something_else_are_passed_over(tmp_path, changes, note):
    found, said = find(write_reported(tmp_path / "demo", np.ones(30), **changes))
    assert found is None and note in said


def test_predictions_must_be_of_the_data_that_was_named(tmp_path):
    folder = write_reported(tmp_path / "demo", np.ones(30))
    assert find(folder, data_sha256=DATA)[0] is not None
    assert find(folder, data_sha256="f" * 64)[0] is None


def test_a_checkpoint_that_was_trained_on_since_does_not_have_them(tmp_path):
    folder = write_reported(tmp_path / "demo", np.ones(30))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "best.pt").write_bytes(b"newer weights")
    assert "another checkpoint" in find(folder)[1]


def test_a_damaged_file_is_a_note(tmp_path):
    folder = write_reported(tmp_path / "demo", np.ones(30))
    (folder / "report" / PREDICTIONS_NAME).write_bytes(b"PK\x03\x04 and no more")
    found, said = find(folder)
    assert found is None and "cannot be used" in said


def test_reports_are_compared_without_data_and_without_checkpoints(tmp_path):
    rights = [np.arange(300) >= 90, np.arange(300) >= 30]
    folders = [write_reported(tmp_path / f"r{n}", right) for n, right in enumerate(rights)]
    folders.append(write_reported(tmp_path / "other", np.ones(300), data_index_sha256="f" * 64))
    runs = [
        examine(letter, read_run_folder(folder), data=None, split="val", loader="auto",
                with_measurements=False, say=print)
        for letter, folder in zip("ABC", folders, strict=True)
    ]  # fmt: skip
    comparison = compare(runs, None)
    assert (comparison.best.letter, comparison.second.letter) == ("B", "A")
    assert comparison.pairs[0].result.difference == pytest.approx(-0.2)
    assert comparison.runs[2].predictions is None
    # The same ids of another data set are not the same images.
    pair = compare([runs[0], replace(runs[1], predictions_sha256="f" * 64)], None)
    assert not pair.is_paired
