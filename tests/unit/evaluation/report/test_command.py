import hashlib
import json

import numpy as np
import pytest

from evaluation import predict
from evaluation.report.command import _log_to_mlflow
from evaluation.report.write import ReportFiles
from train.run_folder import RECIPE_NAME


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "runs" / "first"
    (folder / "report").mkdir(parents=True)
    for name in ("report.html", "report.json", "predictions.npz", "calibration.png"):
        (folder / "report" / name).write_bytes(b"content")
    (folder / RECIPE_NAME).write_text(json.dumps({"data": {"path": "x"}}))
    return folder


def files_of(run_folder):
    report = run_folder / "report"
    metrics = {"report_top1": 0.75, "report_ece": 0.125, "report_nll": np.float64(1.5)}
    return ReportFiles(
        html=report / "report.html",
        json=report / "report.json",
        predictions=report / "predictions.npz",
        plots={},
        metrics=metrics,
    )


def test_figures_and_files_reach_the_run_in_mlflow(run_folder, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from train.tracking.mlflow_client import open_client, open_experiment

    uri = f"sqlite:///{run_folder.parent / 'mlflow.db'}"
    client = open_client(uri)
    run_id = client.create_run(open_experiment(client, "test", uri, run_folder.parent)).info.run_id
    _log_to_mlflow(run_folder, None, {"mlflow_run_id": run_id}, files_of(run_folder))
    assert "added to MLflow run" in capsys.readouterr().err
    assert client.get_run(run_id).data.metrics == {
        "report_top1": 0.75,
        "report_ece": 0.125,
        "report_nll": 1.5,
    }
    names = {artifact.path for artifact in client.list_artifacts(run_id, "report")}
    assert names == {
        f"report/{name}" for name in ("report.html", "report.json", "predictions.npz", "calibration.png")
    }


def test_a_checkpoint_that_is_replaced_meanwhile_is_noticed(tmp_path, monkeypatch):
    file = tmp_path / "best.pt"
    file.write_bytes(b"epoch 3")
    monkeypatch.setattr(predict, "load_trained", lambda path, device: "model")
    assert predict.load_trained_with_sha256(file, None) == ("model", hashlib.sha256(b"epoch 3").hexdigest())
    monkeypatch.setattr(predict, "load_trained", lambda path, device: file.write_bytes(b"epoch 4"))
    with pytest.raises(RuntimeError, match="was replaced while it was read"):
        predict.load_trained_with_sha256(file, None)


def test_a_run_that_mlflow_does_not_know_is_a_warning(run_folder, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    _log_to_mlflow(run_folder, None, {"mlflow_run_id": "0" * 32}, files_of(run_folder))
    assert capsys.readouterr().err.startswith("warning: MLflow at sqlite:")
    _log_to_mlflow(run_folder, None, None, files_of(run_folder))  # an untracked run: nothing to say
    assert capsys.readouterr().err == ""
