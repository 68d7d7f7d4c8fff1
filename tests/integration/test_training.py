"""The training as a user starts it: real processes, two and three ranks on gloo, a real MLflow store."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_prep.manifest import Manifest
from evaluation.metrics import topk_accuracy
from evaluation.predictions_file import load_predictions
from tests.integration.launch import read_json, run, start, write_recipe
from train.checkpoint import load_checkpoint, state_sha256
from train.tracking.metrics_file import read_metrics

# What whoever reads a run's result may rely on.
SUMMARY_FIELDS = {
    *("final_top1", "final_top5", "best_top1", "best_top5", "best_epoch", "validation_resolution", "epochs"),
    *("world_size", "num_parameters", "images_per_second", "data_wait_fraction", "wall_seconds", "cost_usd"),
    *("planned_epochs", "validation", "views", "mfu", "memory_bytes", "skipped_steps"),
    *("weights_at_start", "weights_note"),
    *("mlflow_run_id", "damaged_samples", "stopped_because", "checkpoint", "checkpoint_sha256"),
}


@pytest.fixture(scope="module")
def finished(prepared: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, learning-rate finder, one-cycle then plateau, MLflow on SQLite: the run's folder."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(
        folder,
        prepared[0],
        **{
            "tracking: {mlflow: false}": "tracking: {mlflow: true}\n"
            "lr_finder: {enabled: true, use: true, start_lr: 1.0e-3, num_steps: 24}"
        },
    )
    result = run("train", str(recipe), f"run.folder={folder}/runs", "run.name=first", num_ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "learning-rate finder" in result.stdout and "epoch   3/3" in result.stdout
    return folder / "runs" / "first"


def test_run_folder_is_complete(finished: Path) -> None:
    summary = read_json(finished / "summary.json")
    assert set(summary) == SUMMARY_FIELDS
    assert (summary["weights_at_start"], summary["weights_note"]) == ("random", "random weights")
    assert summary["epochs"] == 3 and summary["world_size"] == 2 and summary["stopped_because"] == "finished"
    assert 0 <= summary["final_top1"] <= summary["best_top1"] <= 1 == summary["final_top5"]
    assert read_json(finished / "status.json")["status"] == "finished"
    assert (finished / summary["checkpoint"]).is_file() and (finished / "lr_finder.png").is_file()
    chosen = read_json(finished / "lr_finder.json")
    assert len(chosen["learning_rates"]) == len(chosen["losses"]) > 5
    assert all(math.isfinite(loss) for loss in chosen["losses"])


def test_metrics_rows(finished: Path) -> None:
    rows = read_metrics(finished / "metrics.jsonl")
    val = [row for row in rows if row["split"] == "val"]
    train = [row for row in rows if row["split"] == "train"]
    assert [(row["step"], row["epoch"]) for row in val] == [(6, 1.0), (12, 2.0), (18, 3.0)]
    assert [row["step"] for row in train] == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert all(row["images_per_second"] > 0 and 0 <= row["data_wait_fraction"] <= 1 for row in train)
    peak = read_json(finished / "lr_finder.json")["trained_with"]
    rates = [row["learning_rate"] for row in train]
    assert max(rates) <= peak * 1.001
    # The cycle has ended at step 12; the plateau starts at a rate of its own.
    assert rates[5] < peak * 1e-3 and rates[6] == pytest.approx(0.05 * peak)


def test_mlflow_has_the_run(finished: Path) -> None:
    from mlflow import MlflowClient

    summary = read_json(finished / "summary.json")
    client = MlflowClient(tracking_uri=f"sqlite:///{finished.parent / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("imagenet-sprint").experiment_id])
    assert [r.info.run_id for r in runs] == [summary["mlflow_run_id"]]
    logged = runs[0]
    assert logged.info.status == "FINISHED" and logged.data.params["model.name"] == "test_resnet"
    assert logged.data.metrics["final_top1"] == summary["final_top1"]
    history = client.get_metric_history(logged.info.run_id, "val_top1")
    rows = [row for row in read_metrics(finished / "metrics.jsonl") if row["split"] == "val"]
    assert [(m.step, round(m.value, 5)) for m in history] == [(r["step"], round(r["top1"], 5)) for r in rows]
    names = {artifact.path for artifact in client.list_artifacts(logged.info.run_id)}
    assert {"recipe.yaml", "metrics.jsonl", "summary.json", "lr_finder.png", "checkpoints"} <= names
    inside = {artifact.path for artifact in client.list_artifacts(logged.info.run_id, "checkpoints")}
    assert "checkpoints/best.pt" in inside


def test_evaluation_reports_the_same_accuracy(
    finished: Path, prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    result = run("evaluation", str(finished), "--data", str(prepared[0]), "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    summary = read_json(finished / "summary.json")
    assert report["top1"] == pytest.approx(summary["best_top1"])
    page = (tmp_path / "report.html").read_text()
    assert f"{summary['best_top1']:.1%}"[:4] in page and "data:image/png" in page
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{finished.parent / 'mlflow.db'}")
    names = {artifact.path for artifact in client.list_artifacts(summary["mlflow_run_id"], "report")}
    assert {"report/report.html", "report/confusion_matrix.png", "report/prediction_grid.png"} <= names
    logged = client.get_run(summary["mlflow_run_id"]).data.metrics
    assert logged["report_top1"] == report["top1"] and logged["report_macro_f1"] == report["macro_f1"]
    assert logged["report_ece"] == report["calibration"]["before"]["ece"]
    assert logged["report_nll"] == report["calibration"]["before"]["nll"]
    saved = load_predictions(tmp_path / "predictions.npz")
    assert topk_accuracy(saved, 1) == report["top1"]
    assert saved.checkpoint_sha256 == summary["checkpoint_sha256"]
    assert saved.data_index_sha256 == prepared[1].splits["val"].index.sha256
    assert report["image_properties"]["num_images"] == report["num_samples"]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_validation_counts_agree_on_one_two_and_three_ranks(
    finished: Path, prepared: tuple[Path, Manifest], precision: str
) -> None:
    words = ("tests.integration.count_correct", str(finished), str(prepared[0]), "reference", precision)
    counts = []
    for num_ranks in (1, 2, 3):
        result = run(*words, num_ranks=num_ranks)
        assert result.returncode == 0, result.stderr
        counts.append([line for line in result.stdout.splitlines() if line.startswith("counts")])
    assert counts[0][0].startswith("counts 43 ") and counts[0] == counts[1] == counts[2]


def test_training_log_is_written_from_mlflow(finished: Path, tmp_path: Path) -> None:
    log = tmp_path / "logs.md"
    result = run("train", "logs", "--runs", str(finished.parent), "--file", str(log))
    assert result.returncode == 0, result.stderr
    summary = read_json(finished / "summary.json")
    row = next(line for line in log.read_text().splitlines() if "| first |" in line)
    assert f"{summary['final_top1']:.2%}" in row and "test_resnet" in row


def wait_for_step(folder: Path, step: int, process) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.is_file() and any(row["step"] >= step for row in read_metrics(path)):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0]}")


@pytest.mark.parametrize(
    ("num_ranks", "number"),
    [
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.long),
        (2, signal.SIGTERM),
        pytest.param(1, signal.SIGINT, marks=pytest.mark.long),
    ],
)
def test_stopped_and_taken_up_again_equals_a_calm_run(
    prepared: tuple[Path, Manifest], tmp_path: Path, num_ranks: int, number: int
) -> None:
    # Long enough epochs to be stopped in the middle of one.
    recipe = write_recipe(
        tmp_path,
        prepared[0],
        **{"global_batch_size: 24": "global_batch_size: 4", "every_steps: 2": "every_steps: 1"},
    )
    words = ("train", str(recipe), f"run.folder={tmp_path}/runs")
    calm = run(*words, "run.name=calm", num_ranks=num_ranks)
    assert calm.returncode == 0, calm.stderr
    folder = tmp_path / "runs" / "stopped"
    process = start(*words, "run.name=stopped", num_ranks=num_ranks)
    wait_for_step(folder, 50, process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    status = read_json(folder / "status.json")
    assert status["status"] == "restart", output
    name = sorted(path.name for path in (folder / "checkpoints").glob("step-*.pt"))[-1]
    stopped_at = int(name[5:13])
    assert 50 <= stopped_at < 120 and f"step {stopped_at}" in output

    again = run(*words, "run.name=stopped", num_ranks=num_ranks)
    assert again.returncode == 0, again.stderr
    assert f"going on from {name}" in again.stdout
    states = [
        load_checkpoint(tmp_path / "runs" / run_name / "checkpoints" / "step-00000120.pt")
        for run_name in ("calm", "stopped")
    ]
    parameters = [{k: v for k, v in s["model"].items() if "running_" not in k} for s in states]
    assert state_sha256(parameters[0]) == state_sha256(parameters[1])
    for key, value in states[0]["model"].items():
        # With several ranks, BatchNorm statistics were averaged once more in between: equal but for rounding.
        torch.testing.assert_close(value, states[1]["model"][key], rtol=1e-5, atol=1e-6)
    rows = [read_metrics(tmp_path / "runs" / n / "metrics.jsonl") for n in ("calm", "stopped")]
    kept = [[(r["step"], r["split"], r["learning_rate"]) for r in some] for some in rows]
    assert kept[0] == kept[1]
    assert [r["loss"] for r in rows[0]] == pytest.approx([r["loss"] for r in rows[1]], rel=1e-4)


def test_rate_that_explodes_ends_in_a_sentence(prepared: tuple[Path, Manifest], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, prepared[0], **{"peak_lr: 0.05": "peak_lr: 1.0e+30"})
    result = run("train", str(recipe), f"run.folder={tmp_path}", num_ranks=2)
    assert result.returncode != 0
    assert (
        "became non-finite in 4 steps in a row" in result.stderr
        and "lower optimizer.peak_lr" in result.stderr
    )
    assert read_json(tmp_path / "tiny" / "status.json")["status"] == "failed"
    assert not list((tmp_path / "tiny").glob("checkpoints/*.pt"))


def test_damaged_sample_ends_all_ranks_and_is_named(
    prepared: tuple[Path, Manifest], copy_of_prepared: Callable[[], Path], tmp_path: Path
) -> None:
    folder = copy_of_prepared()
    shard = bytearray((folder / "train.beton").read_bytes())
    shard[(8 << 20) + 700] ^= 0xFF
    (folder / "train.beton").write_bytes(shard)
    result = run("train", str(write_recipe(tmp_path, folder)), f"run.folder={tmp_path}", num_ranks=2)
    assert result.returncode != 0
    status = read_json(tmp_path / "tiny" / "status.json")
    assert status["status"] == "failed" and "sample 0 (train/class_" in status["reason"]


def test_dead_tracking_server_costs_nothing_but_a_warning(
    prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, prepared[0], **{"mlflow: false": "uri: 'http://127.0.0.1:9'"})
    result = run("train", str(recipe), f"run.folder={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert "warning: MLflow at http://127.0.0.1:9 failed" in result.stdout
    assert read_json(tmp_path / "tiny" / "summary.json")["mlflow_run_id"] is None


def check(recipe: Path, *overrides: str) -> str:
    """What `check` says of a bad case: sentences only, exit code not 0."""
    result = run("train", "check", str(recipe), *overrides)
    assert result.returncode != 0 and "Traceback" not in result.stderr + result.stdout
    lines = result.stderr.strip().splitlines()
    assert lines and all(line.startswith(("error: ", "  - ")) for line in lines), result.stderr
    return result.stderr


def test_check_finds_nothing_in_a_good_case(prepared: tuple[Path, Manifest], tmp_path: Path) -> None:
    result = run("train", "check", "--nproc-per-node", "2", str(write_recipe(tmp_path, prepared[0])))
    assert result.returncode == 0 and "are fine" in result.stdout, result.stderr


def test_check_names_bad_cases(
    prepared: tuple[Path, Manifest], copy_of_prepared: Callable[[], Path], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, prepared[0])
    assert "does not exist" in check(recipe, "data.path=/nowhere")
    several = check(recipe, "model.name=resnet81", "data.global_batch_size=999", "budget.instance_type=x1")
    assert several.count("error: ") == 3 and "no model 'resnet81'" in several
    assert "3 fault(s)" in check(recipe, "modle.name=x", "data.resolution=1", "run.seed=-1")
    assert "cannot be shared by 5 ranks" in check(recipe, "--nproc-per-node=5")
    folder = copy_of_prepared()
    shard = bytearray((folder / "train.beton").read_bytes())
    shard[(8 << 20) + 700] ^= 0xFF
    (folder / "train.beton").write_bytes(shard)
    assert "train.beton is damaged at sample 0" in check(recipe, f"data.path={folder}")
    os.truncate(folder / "train.beton", 9000)
    assert "truncated" in check(recipe, f"data.path={folder}")


def test_check_names_a_truncated_checkpoint(
    finished: Path, prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "broken"
    shutil.copytree(finished, folder)
    (folder / "status.json").unlink()
    os.truncate(next((folder / "checkpoints").glob("step-*18.pt")), 1000)
    said = check(folder / "recipe.yaml", f"run.folder={tmp_path}", "run.name=broken")
    assert "is truncated: 1,000 bytes" in said
    evaluated = run(
        "evaluation", str(folder / "checkpoints" / "step-00000018.pt"), "--data", str(prepared[0])
    )
    assert evaluated.returncode == 1 and "is truncated" in evaluated.stderr
    assert "Traceback" not in evaluated.stderr


@pytest.mark.parametrize("changes", [{"mode: fp32": "mode: fp16"}, {"name: sgd": "name: adamw"}])
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_other_precisions_optimizers_and_libraries(
    prepared: tuple[Path, Manifest], tmp_path: Path, changes: dict[str, str], library: str
) -> None:
    if library == "torchvision":
        changes = changes | {
            "library: timm, name: test_resnet": "library: torchvision, name: shufflenet_v2_x0_5"
        }
    recipe = write_recipe(tmp_path, prepared[0], **changes)
    result = run("train", str(recipe), f"run.folder={tmp_path}", "data.grad_accum_steps=2")
    assert result.returncode == 0, result.stderr
    losses = [
        row["loss"] for row in read_metrics(tmp_path / "tiny" / "metrics.jsonl") if row["split"] == "val"
    ]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)


def test_stopped_in_the_learning_rate_finder(prepared: tuple[Path, Manifest], tmp_path: Path) -> None:
    finder = "lr_finder: {enabled: true, start_lr: 1.0e-9, end_lr: 1.0e-8, num_steps: 100000}"
    recipe = write_recipe(
        tmp_path, prepared[0], **{"tracking: {mlflow: false}": "tracking: {mlflow: false}\n" + finder}
    )
    process = start("train", str(recipe), f"run.folder={tmp_path}", num_ranks=2)
    while process.poll() is None and "epochs ×" not in (process.stdout.readline() if process.stdout else ""):
        pass
    time.sleep(4)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    output = process.communicate(timeout=60)[0]
    assert read_json(tmp_path / "tiny" / "status.json")["status"] == "restart", output
    assert time.monotonic() - began < 25  # torchrun kills after 30


def test_other_data_of_the_same_classes_is_not_gone_on_with(
    prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    from data_prep.pipeline import PrepareOptions, prepare
    from data_prep.sources import open_source
    from tests.conftest import write_image_folder

    source = write_image_folder(tmp_path / "source", num_classes=4, num_train=30, num_val=11)
    prepare(open_source(source), PrepareOptions(out=tmp_path / "data", num_workers=1, progress=False))
    recipe = write_recipe(tmp_path, prepared[0])
    words = ("train", str(recipe), f"run.folder={tmp_path}/runs")
    assert run(*words).returncode == 0
    (tmp_path / "runs" / "tiny" / "status.json").unlink()  # as if it had been stopped
    result = run(*words, f"data.path={tmp_path / 'data'}")
    assert result.returncode == 1 and "another version of" in result.stderr


def test_second_training_in_one_folder_is_refused(prepared: tuple[Path, Manifest], tmp_path: Path) -> None:
    from data_prep.storage import exclusive_lock

    (tmp_path / "tiny").mkdir()
    with exclusive_lock(tmp_path / "tiny"):
        result = run("train", str(write_recipe(tmp_path, prepared[0])), f"run.folder={tmp_path}")
    assert result.returncode == 1 and "another process is writing to" in result.stderr


def test_check_passes_images_through_the_model(prepared: tuple[Path, Manifest], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, prepared[0])
    assert "does not take 32 px in training" in check(recipe, "model.name=vit_tiny_patch16_224")
    assert "does not take 32 px" in check(recipe, "model.library=torchvision", "model.name=inception_v3")


def test_address_inside_a_checkpoint_is_never_called(
    finished: Path, prepared: tuple[Path, Manifest], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        state = load_checkpoint(finished)
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        state["recipe"] = state["recipe"].replace("uri: null", f"uri: {uri}")
        assert uri in state["recipe"]
        torch.save(state, tmp_path / "foreign.pt")
        words = (
            "evaluation",
            str(tmp_path / "foreign.pt"),
            "--data",
            str(prepared[0]),
            "--out",
            str(tmp_path / "r"),
        )
        result = run(*words)
        assert result.returncode == 0, result.stderr
        with pytest.raises(TimeoutError):
            server.accept()
