"""Cross-validation and label audit as a user starts them: real trainings, Ctrl-C, planted wrong labels."""

from __future__ import annotations

import csv
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main as data_prep
from data_prep.manifest import load_index, load_manifest
from evaluation.__main__ import main as evaluation
from evaluation.kfold.results import load_out_of_fold
from tests.integration.launch import read_json, run, start, write_recipe
from train.data.folds import assign_folds

# A minute of trainings; the folds themselves are in tests/unit/evaluation/test_kfold_folds.py.
pytestmark = pytest.mark.long

COLOURS = ((200, 60, 60), (60, 190, 60), (70, 70, 210))
NUM_EACH = 30  # of a class; every tenth of them lies in the folder of the next class
WAIT_SECONDS = 900.0  # of a machine that does much else


def write_colours(root: Path) -> set[str]:
    """Classes that any network learns; returns the keys of the images in a wrong folder."""
    planted = set()
    for split, count in (("train", NUM_EACH), ("val", 4)):
        for label, colour in enumerate(COLOURS):
            for number in range(count):
                is_wrong = split == "train" and number % 10 == 0
                folder = root / split / f"class_{(label + is_wrong) % 3}"
                folder.mkdir(parents=True, exist_ok=True)
                rng = np.random.default_rng([label, number, count])
                pixels = np.array(colour) + rng.normal(0, 40, (40, 40, 3)) + rng.normal(0, 12, 3)
                path = folder / f"{label}-{number:03d}.jpg"
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=92)
                planted |= {str(path.relative_to(root))} if is_wrong else set()
    return planted


def words(folder: Path, *more: str) -> tuple[str, ...]:
    recipe = write_recipe(
        folder,
        folder / "data",
        **{
            "tracking: {mlflow: false}": "tracking: {mlflow: true}",
            "global_batch_size: 24": "global_batch_size: 12",
            "one_cycle, epochs: 2": "one_cycle, epochs: 7",
            "name: sgd, peak_lr: 0.05": "name: adamw, peak_lr: 0.01",
        },
    )
    return ("evaluation", "kfold", str(recipe), "--folds", "2", *more, f"run.folder={folder}/runs")


@pytest.fixture(scope="module")
def folds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, set[str]]:
    """Two folds, interrupted in the second and taken up: folder, what the second start said, the planted."""
    folder = tmp_path_factory.mktemp("kfold")
    planted = write_colours(folder / "source")
    prepare = ["prepare", "--source", str(folder / "source"), "--out", str(folder / "data"), "--workers", "1"]
    assert data_prep(prepare) == 0
    out = folder / "runs" / "tiny-kfold"
    process = start(*words(folder))
    deadline = time.monotonic() + WAIT_SECONDS
    while not (out / "tiny-fold1" / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 130, said
    assert "stopped by SIGINT; the same command goes on" in said and not (out / "kfold.json").exists()
    again = run(*words(folder), timeout=WAIT_SECONDS)
    assert again.returncode == 0, again.stdout + again.stderr
    return out, again.stdout, planted


def test_finished_folds_are_skipped_and_figures_are_those_of_the_runs(
    folds: tuple[Path, str, set[str]],
) -> None:
    out, said, _ = folds
    assert "fold 0 of 2" in said and said.count("was trained before") == 1
    table = read_json(out / "kfold.json")
    summaries = [read_json(out / f"tiny-fold{fold}" / "summary.json") for fold in range(2)]
    values = [row["top1"] for row in table["folds"]]
    assert values == pytest.approx([summary["final_top1"] for summary in summaries])
    assert table["mean"]["top1"] == pytest.approx(np.mean(values))
    assert table["std"]["top1"] == pytest.approx(np.std(values, ddof=1))
    assert table["pooled"]["top1_interval"][0] < table["pooled"]["top1"] < table["pooled"]["top1_interval"][1]
    page = (out / "kfold.html").read_text()
    assert "2 folds" in page and "https://" not in page


def test_each_image_is_predicted_by_the_model_of_its_fold(folds: tuple[Path, str, set[str]]) -> None:
    out = folds[0]
    data = out.parent.parent / "data"
    manifest = load_manifest(data)
    predictions = load_out_of_fold(out / "oof.npz", manifest.class_names)
    labels = load_index(data, manifest, "train")["label"]
    assert predictions.sample_ids.tolist() == list(range(3 * NUM_EACH))
    assert np.array_equal(predictions.labels, labels)
    assert np.array_equal(predictions.fold, assign_folds(labels, 2, 0))


def test_folds_stand_under_one_run_in_mlflow(folds: tuple[Path, str, set[str]]) -> None:
    from mlflow import MlflowClient

    out = folds[0]
    client = MlflowClient(tracking_uri=f"sqlite:///{out.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("imagenet-sprint")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"tiny-kfold", "tiny-fold0", "tiny-fold1"}
    parent = runs["tiny-kfold"]
    assert {runs[f"tiny-fold{fold}"].data.tags["mlflow.parentRunId"] for fold in range(2)} == {
        parent.info.run_id
    }
    pooled = read_json(out / "kfold.json")["pooled"]["top1"]
    assert parent.data.metrics["kfold_top1"] == pytest.approx(pooled)
    assert parent.info.status == "FINISHED" and parent.data.tags["kind"] == "kfold"


def test_another_recipe_in_the_same_folder_is_refused(
    folds: tuple[Path, str, set[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = folds[0]
    arguments = words(out.parent.parent, "optimizer.peak_lr=0.3")[1:]
    assert evaluation(list(arguments)) == 1
    assert "optimizer.peak_lr: was 0.01, now 0.3" in capsys.readouterr().err
    assert evaluation([*words(out.parent.parent)[1:], "data.fold=1"]) == 1
    assert "data.fold cannot be set: each fold has its own" in capsys.readouterr().err


def test_planted_labels_are_found_reviewed_and_mended(
    folds: tuple[Path, str, set[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _, planted = folds
    assert evaluation(["audit", "--kfold", str(out), "--review"]) == 0
    said = capsys.readouterr().out
    assert "higher by construction" in said
    audit = out / "audit"
    with (audit / "suspects.csv").open(newline="") as file:
        ranked = list(csv.DictReader(file))
    assert len(planted) == 9
    first = {row["key"] for row in ranked[:9]}
    assert len(first & planted) >= 8
    assert (audit / "contact_sheet.png").stat().st_size > 10_000
    assert (audit / "audit.html").read_text().count("data:image/jpeg") == min(
        60, read_json(audit / "audit.json")["num_suspects"]
    )
    # A second start must not overwrite what a person has filled in.
    assert evaluation(["audit", "--kfold", str(out), "--review"]) == 1
    assert "is there already, perhaps with verdicts" in capsys.readouterr().err
    with (audit / "review.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:  # the person sees the colour, which the file's name tells
        own = f"class_{Path(row['key']).name[0]}"
        row["verdict"] = f"relabel:{own}" if row["key"] in planted else "keep"
    rows[0]["verdict"] = "drop"
    with (audit / "review.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert evaluation(["audit", "--apply", str(audit / "review.csv")]) == 0
    assert "1 drop" in capsys.readouterr().out
    root = out.parent.parent
    prepare = ["prepare", "--source", str(root / "source"), "--out", str(root / "mended"), "--workers", "1"]
    assert data_prep([*prepare, "--corrections", str(audit / "corrections.json")]) == 0
    before, after = load_manifest(root / "data"), load_manifest(root / "mended")
    assert after.quarantined_by_reason == {"label audit": 1}
    assert sum(after.splits["train"].class_counts) == sum(before.splits["train"].class_counts) - 1
    # The data set is another one now, and the predictions are not of it.
    assert evaluation(["audit", "--kfold", str(out), "--data", str(root / "mended")]) == 1
    assert "is not the data set of this cross-validation" in capsys.readouterr().err


def test_a_split_that_the_model_learned_is_refused(
    folds: tuple[Path, str, set[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = folds[0]
    run_folder, data = str(out / "tiny-fold0"), str(out.parent.parent / "data")
    assert evaluation(["audit", "--run", run_folder, "--data", data, "--split", "train"]) == 1
    assert "has learned its labels" in capsys.readouterr().err
    arguments = [
        "audit",
        "--run",
        run_folder,
        "--data",
        data,
        "--second",
        str(out / "tiny-fold1"),
    ]
    assert evaluation(arguments) == 0
    said = capsys.readouterr()
    assert "added to MLflow run" in said.err and "a second model" in said.out
    table = read_json(out / "tiny-fold0" / "audit" / "audit.json")
    assert table["split"] == "val" and table["num_samples"] == 12
    assert table["second_opinion"]["all_images"]["num_samples"] == 12
