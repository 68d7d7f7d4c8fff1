from __future__ import annotations

import json

import numpy as np
import pytest

from evaluation.__main__ import main
from evaluation.compare.examine import _num_own_images, _own_images_sha256, examine
from evaluation.compare.figures import ComparedRun, fraction_interval, memory_of
from evaluation.compare.mlflow_runs import is_mlflow_reference, recipe_of_parameters
from evaluation.compare.model_cost import static_cost
from evaluation.compare.runs import read_run_folder, with_own_names
from tests.unit.evaluation.compare.made_up import write_run
from train.config import ModelSection, flatten, parse_recipe
from train.models.build import build_model


def examined(folder, letter="A"):
    return examine(letter, read_run_folder(folder), data=None, split="val", loader="auto",
                   with_measurements=False, say=print)  # fmt: skip


def test_flops_are_twice_the_macs_that_papers_give():
    cost = static_cost(build_model(ModelSection(name="resnet18"), 1000), 224)
    assert cost.forward_flops == pytest.approx(3.63e9, rel=0.01)
    assert cost.forward_macs == pytest.approx(1.81e9, rel=0.01)
    assert cost.num_parameters == 11_689_512
    assert cost.weights_bytes == pytest.approx(4 * 11.7e6, rel=0.01)


def test_a_run_folder_gives_its_figures(tmp_path):
    run = examined(write_run(tmp_path / "demo", (0.3, 0.72, 0.715, 0.7)))
    expected = {
        "best_top1": 0.72, "final_top1": 0.7, "best_epoch": 2, "epochs": 4, "epochs_to_near_best": 2,
        "training_memory_bytes": 5e8, "images_per_second": 100.0, "cost_usd": 0.02, "loss_spikes": 0,
        "stopped_because": "finished", "num_parameters": 12_345,
    }  # fmt: skip
    assert {key: run.figures[key] for key in expected} == expected
    assert run.figures["largest_drop"] == pytest.approx(0.015)
    assert (
        "best_top1_low" not in run.figures
    )  # its data set is not here: of how many images it is, nobody knows
    assert any("best.pt" in note for note in run.notes)


def test_a_run_without_a_summary_has_the_figures_so_far(tmp_path):
    folder = write_run(tmp_path / "demo", (0.3, 0.7, 0.6))
    (folder / "summary.json").unlink()
    (folder / "status.json").write_text(json.dumps({"status": "restart", "reason": "SIGTERM"}))
    run = examined(folder)
    assert (run.figures["best_top1"], run.figures["final_top1"], run.figures["best_epoch"]) == (0.7, 0.6, 2)
    assert run.figures["best_top5"] == pytest.approx(0.9) and run.figures["images_per_second"] == 100
    assert run.figures["stopped_because"] == "did not end"
    assert any("did not end (SIGTERM)" in note for note in run.notes)


def test_damaged_rows_are_counted_and_passed_over(tmp_path):
    folder = write_run(tmp_path / "demo")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"split": "val", "epo\n[1, 2]\nnull\n\xff\xfe\n' + b"[" * 5000 + b"\n")
        file.write(b'{"split": "val", "epoch": 9, "top1": "high", "loss": NaN}\n')
        file.write(b'{"split": ["val"], "epoch": {}, "top1": true}\n')
    run = examined(folder)
    assert run.figures["best_top1"] == 0.7
    assert any("6 of 51 lines" in note for note in run.notes)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 5000, b'{"best_top1": NaN}', b"\xff"])
def test_a_damaged_summary_is_passed_over(tmp_path, content):
    folder = write_run(tmp_path / "demo")
    (folder / "summary.json").write_bytes(content)
    run = examined(folder)
    assert run.figures["best_top1"] == 0.7
    assert any("summary.json is damaged" in note for note in run.notes)


def test_a_summary_of_nonsense_gives_no_figure_of_nonsense(tmp_path):
    folder = write_run(tmp_path / "demo", best_top1=7.5, final_top1="high", cost_usd=[], wall_seconds=None,
                       checkpoint_sha256=3, stopped_because={"a": 1}, best_epoch=True)  # fmt: skip
    run = examined(folder)
    assert run.figures["best_top1"] == 0.7 and run.figures["final_top1"] == 0.7
    assert "cost_usd" not in run.figures and "wall_seconds" not in run.figures
    assert run.record.checkpoint_sha256 is None


@pytest.mark.parametrize(
    "content", [b"model: !!python/object/apply:os.system [ls]", b"a: [", b"x" * 300_000, b""]
)
def test_a_recipe_that_is_none_costs_what_needs_it(tmp_path, content):
    folder = write_run(tmp_path / "demo")
    (folder / "recipe.yaml").write_bytes(content)
    run = examined(folder)
    assert run.record.recipe is None and run.figures["best_top1"] == 0.7
    assert any("recipe.yaml is damaged" in note for note in run.notes)


def test_a_damaged_checkpoint_is_a_note(tmp_path):
    folder = write_run(tmp_path / "demo")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "best.pt").write_bytes(b"not a checkpoint")
    run = examined(folder)
    assert run.figures["best_top1"] == 0.7
    assert any("Its checkpoint cannot be used" in note for note in run.notes)


def test_an_interval_needs_the_number_of_images_that_makes_the_fraction():
    assert set(fraction_interval("x", 0.75, 400)) == {"x_low", "x_high"}
    assert fraction_interval("x", 0.7513, 400) == {}  # 300.52 images: the data set is another one now
    assert fraction_interval("x", 0.75, None) == {}
    # A row of metrics.jsonl has six digits.
    assert fraction_interval("x", float(f"{12_345 / 50_000:.6g}"), 50_000) != {}


def test_whose_memory_it_is():
    assert memory_of("4 × NVIDIA L4") == "the GPU"
    assert memory_of("Intel(R) Xeon(R) Processor, 2 cores") == "the whole process"
    assert "or" in memory_of(None)


def test_runs_of_one_name_get_their_own(tmp_path):
    folders = [write_run(tmp_path / parent / "demo") for parent in ("a", "b")]
    records = [read_run_folder(folder) for folder in (*folders, folders[0])]
    assert [record.name for record in with_own_names(records)] == ["a/demo", "b/demo", "a/demo (2)"]


def test_a_recipe_comes_back_from_parameters():
    text = """
data: {path: data/x, resolution: {0: 32, 1: 48}, grad_accum_steps: auto}
model: {library: own, name: residual_cnn, options: {widths: [4, 4, 8, 8], shortcut: pool}, head: null}
optimizer: {name: adamw, peak_lr: 1.0e-5}
schedule: {phases: [{kind: one_cycle, epochs: 2}, {kind: plateau, epochs: 1, initial_lr_fraction: 0.1}]}
"""
    recipe = parse_recipe(text)
    logged = {key: str(value) for key, value in flatten(recipe.model_dump(mode="json")).items()}
    assert recipe_of_parameters(logged) == recipe
    assert recipe_of_parameters(logged | {"model.surprise": "1"}) is None
    assert recipe_of_parameters(logged | {"expected": "x" * 500}) is None
    assert recipe_of_parameters({}) is None


def test_references_to_mlflow():
    assert is_mlflow_reference("mlflow:imagenet-sprint") and is_mlflow_reference("0" * 32)
    assert not is_mlflow_reference("runs/demo")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN"], "needs two runs"),
        (["RUN", "nowhere"], "neither a run folder nor an MLflow run"),
        (["RUN", "EMPTY"], "is no run folder"),
        (["RUN"] * 9, "at most 8"),
        (["RUN", "RUN", "--data", "nowhere"], "does not exist"),
        (["RUN", "RUN", "--no-measure", "--baseline", "other"], "none of the runs"),
        (["RUN", "0" * 32, "--mlflow", "sqlite:///no-such.db"], "no MLflow store"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    write_run(tmp_path / "RUN")
    assert main(["compare", *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "comparison").exists()


def test_a_comparison_of_bare_folders_is_written(tmp_path, monkeypatch, capsys):
    """Neither checkpoints nor data nor measurements: curves and own figures are compared all the same."""
    for name, top1 in (("first", (0.3, 0.5, 0.55)), ("second", (0.2, 0.6, 0.65))):
        write_run(tmp_path / name, top1)
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "first", "second", "--out", "out", "--no-measure"]) == 0
    assert "B second: top-1 65.00%, the best" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert numbers["is_paired"] is False and numbers["best"] == "B"
    assert np.isclose(numbers["runs"][1]["figures"]["final_top1"], 0.65)


def test_label_and_score():
    record = type("Record", (), {"name": "x"})()
    run = ComparedRun("A", record, figures={"best_top1": 0.5})
    assert (run.label, run.score) == ("A · x", 0.5)


def test_runs_of_folds_judged_themselves_by_their_folds(prepared, tmp_path):
    """160 training images in three folds, not the 43 of the validation split; and never the same ones."""
    manifest = prepared[1]
    sizes, digests = [], set()
    for fold in range(3):
        data = {"path": str(prepared[0]), "folds": 3, "fold": fold}
        recipe = parse_recipe(json.dumps({"data": data}))
        sizes.append(_num_own_images(manifest, recipe))
        digests.add(_own_images_sha256(manifest, recipe))
    assert sorted(sizes) == [53, 53, 54] and len(digests) == 3
    whole = parse_recipe(json.dumps({"data": {"path": str(prepared[0])}}))
    assert _num_own_images(manifest, whole) == 43
    assert _own_images_sha256(manifest, whole) == manifest.splits["val"].index.sha256
