"""`python -m evaluation compare` on two small trainings, from their folders and from MLflow."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("mlflow")

from data_prep.manifest import Manifest
from evaluation.__main__ import main
from evaluation.compare.model_cost import measure_cost
from tests.integration.launch import read_json, run, write_recipe
from train.config import TrackingSection, load_recipe
from train.tracking.mlflow_client import open_client
from train.tracking.sync import sync

OWN = ["model.library=own", "model.name=residual_cnn"]
WIDTHS = {"small": "[4, 4, 8, 8]", "wide": "[8, 8, 16, 16]"}


@pytest.fixture(scope="module")
def trained(prepared: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs/` with two trainings, `small` and `wide`, and their MLflow store."""
    folder = tmp_path_factory.mktemp("trained")
    runs = folder / "runs"
    recipe = write_recipe(folder, prepared[0], **{"mlflow: false": "mlflow: true"})
    cases = {
        name: {"overrides": [*OWN, f"model.options={{widths: {widths}}}"]} for name, widths in WIDTHS.items()
    }
    listing = folder / "cases.json"
    listing.write_text(json.dumps({"folder": str(runs), "recipe": str(recipe), "cases": cases}))
    done = run("tests.integration.train_cases", str(listing), timeout=900)
    assert done.returncode == 0, done.stderr
    for name in WIDTHS:
        sync(runs / name)  # on a busy machine the training does not wait for MLflow for ever
    return runs


def compared(folder: Path, *words: str) -> dict:
    assert main(["compare", *words, "--out", str(folder)]) == 0
    return read_json(folder / "compare.json")


@pytest.fixture(scope="module")
def from_folders(
    trained: Path, prepared: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory
) -> dict:
    out = tmp_path_factory.mktemp("out")
    words = [str(trained / "small"), str(trained / "wide"), "--data", str(prepared[0])]
    words += ["--loader", "reference", "--no-measure"]  # logged where the runs are
    return compared(out, *words) | {"out": str(out)}


def test_figures_are_those_of_the_trainings(trained: Path, from_folders: dict) -> None:
    for entry in from_folders["runs"]:
        summary, figures = read_json(trained / entry["name"] / "summary.json"), entry["figures"]
        assert figures["best_top1"] == figures["top1"] == summary["best_top1"]  # the same weights and images
        assert figures["num_images"] == figures["num_own_images"] == 43
        assert figures["best_top1_low"] <= figures["best_top1"] <= figures["best_top1_high"]
        assert figures["num_parameters"] == summary["num_parameters"]
        assert (
            figures["file_bytes"] == (trained / entry["name"] / "checkpoints/best.safetensors").stat().st_size
        )
        assert "top5" not in figures and "best_top5" not in figures  # of four classes
        assert entry["notes"] == []
    assert [run["name"] for run in from_folders["runs"]] == ["small", "wide"]


@pytest.mark.long
def test_speed_and_memory_are_measured_in_processes_of_their_own(trained: Path) -> None:
    recipe = load_recipe(trained / "wide" / "recipe.yaml")
    cost = measure_cost(recipe, 4, 32, world_size=1, with_training=True)
    assert cost.notes == ()
    assert cost.inference_seconds[64] > 0 and cost.inference_seconds[1] > 0
    assert cost.inference_memory_bytes[64] >= cost.inference_memory_bytes[1] > 0
    assert cost.training_memory_bytes > 1e6 and cost.micro_batch_size == 24
    # 64 images of 32 × 32 × 3 floats and some channels of half that side: no interpreter is counted in.
    assert cost.inference_memory_bytes[64] < 300e6


def test_arithmetic_is_counted(from_folders: dict) -> None:
    small, wide = (entry["figures"] for entry in from_folders["runs"])
    assert small["forward_flops"] == 2 * small["forward_macs"]
    assert wide["forward_flops"] > 2 * small["forward_flops"]
    assert small["training_memory_of"] == "the whole process"


def test_the_pair_is_tested_on_all_images(from_folders: dict) -> None:
    (pair,) = from_folders["paired"]
    by_letter = {entry["letter"]: entry["figures"]["top1"] for entry in from_folders["runs"]}
    assert pair["num_images"] == 43 and from_folders["is_paired"]
    assert pair["difference"] == pytest.approx(by_letter[pair["run"]] - by_letter[from_folders["baseline"]])
    assert pair["interval"][0] <= pair["difference"] <= pair["interval"][1]


def test_the_files_are_there(from_folders: dict) -> None:
    out = Path(from_folders["out"])
    assert {path.name for path in out.iterdir()} == {
        "compare.html", "compare.json", "compare.md", "compare.csv", "curves.png", "trade_offs.png",
        "confusion_matrix.png", "class_differences.png",
    }  # fmt: skip
    assert len(list(csv.DictReader((out / "compare.csv").open()))) == 2


def test_the_comparison_is_a_run_of_mlflow(trained: Path, from_folders: dict) -> None:
    client = open_client(f"sqlite:///{trained / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(TrackingSection().experiment)
    logged = client.search_runs([experiment.experiment_id], "tags.kind = 'comparison'")[-1]  # the first
    assert logged.info.run_name == "compare-a-small-b-wide" and logged.info.status == "FINISHED"
    assert logged.data.metrics["A_small/top1"] == from_folders["runs"][0]["figures"]["top1"]
    (pair,) = from_folders["paired"]
    name = {"A": "small", "B": "wide"}[pair["run"]]
    assert logged.data.metrics[f"{pair['run']}_{name}/mcnemar_p"] == pytest.approx(pair["p_value"])
    paths = {file.path for file in client.list_artifacts(logged.info.run_id, "comparison")}
    assert {"comparison/compare.html", "comparison/compare.json", "comparison/curves.png"} <= paths


@pytest.fixture(scope="module")
def moved(trained: Path, from_folders: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The MLflow store without the run folders: what another machine sees."""
    for name in ("small", "wide"):
        shutil.move(trained / name, tmp_path_factory.mktemp("away") / name)
    return trained


def test_mlflow_runs_give_the_same_figures(
    moved: Path, from_folders: dict, prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    words = [f"mlflow:{TrackingSection().experiment}", "--mlflow", f"sqlite:///{moved / 'mlflow.db'}"]
    found = compared(tmp_path, *words, "--data", str(prepared[0]), "--loader", "reference", "--no-measure")
    assert {entry["name"] for entry in found["runs"]} == {"small", "wide"}  # and not the comparison itself
    before = {entry["name"]: entry for entry in from_folders["runs"]}
    for entry in found["runs"]:
        former = before[entry["name"]]["figures"]
        assert {key: former[key] for key in entry["figures"]} == entry["figures"]
        assert entry["notes"] == []


def test_metric_histories_are_enough_for_the_curves(
    moved: Path, from_folders: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.move(moved / "mlartifacts", tmp_path / "away")
    uri = f"sqlite:///{moved / 'mlflow.db'}"
    client = open_client(uri)
    experiment = client.get_experiment_by_name(TrackingSection().experiment)
    runs = client.search_runs([experiment.experiment_id], "metrics.val_top1 >= 0")
    ids = [found.info.run_id for found in runs]
    try:
        found = compared(tmp_path / "out", *ids, "--mlflow", uri, "--no-measure")
    finally:
        shutil.move(tmp_path / "away", moved / "mlartifacts")
    before = {entry["name"]: entry["figures"] for entry in from_folders["runs"]}
    assert (tmp_path / "out" / "curves.png").is_file() and found["is_paired"] is False
    for entry in found["runs"]:
        figures, former = entry["figures"], before[entry["name"]]
        same = ["best_top1", "final_top1", "best_epoch", "epochs_to_near_best", "forward_flops"]
        same += ["wall_seconds", "largest_drop", "loss_spikes", "images_per_second", "num_parameters"]
        assert {key: figures.get(key) for key in same} == {key: former.get(key) for key in same}
        assert any("best.pt" in note for note in entry["notes"])
