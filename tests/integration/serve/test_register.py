"""`python -m serve register`: a model that MLflow runs on raw bytes, and an alias that moves when asked."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.manifest import Manifest
from evaluation.stored_images import StoredImages
from serve.__main__ import main
from serve.classifier import TorchClassifier
from serve.portable.model_info import load_info
from tests.unit.serve.trained_run import TIMM, build_run
from train.tracking.mlflow_client import open_client, open_experiment

# In a process and a folder of its own, without this project on its path.
CLIENT = """
import sys, mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/scenes@best")
answer = model.predict(pandas.DataFrame({"image": [open(sys.argv[2], "rb").read(), b"no image", None]}))
print(answer["name"][0], answer["probability"][0], len(answer["names"][0]), *answer["error"][1:], sep="|")
assert "torch" not in sys.modules and "serve" not in sys.modules
"""


def test_a_registered_run_answers_raw_bytes_and_the_alias_moves_only_by_request(
    prepared: tuple[Path, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = build_run(tmp_path / "runs" / "small", prepared[0], TIMM)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    words = ["--name", "scenes", "--tracking-uri", uri]
    assert main(["register", str(run), *words, "--alias", "best"]) == 0
    assert "models:/scenes@best" in capsys.readouterr().out
    stored = StoredImages(prepared[0], "val")
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(stored.jpeg(20))
    wanted = TorchClassifier(run).classify([photo.read_bytes()])[0]
    answer = subprocess.run(
        [sys.executable, "-c", CLIENT, uri, str(photo)], cwd=tmp_path, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    assert "ype hint" not in answer.stderr  # MLflow's warnings, in colours
    name, probability, num_names, error, nothing = answer.stdout.strip().split("|")
    assert name == wanted.names[0] and int(num_names) == 4
    assert float(probability) == pytest.approx(wanted.probabilities[0], abs=1e-4)
    assert "not an image" in error and nothing == "This is not the bytes of an image file."
    assert not list((tmp_path / "runs").rglob("*.pkl"))

    # Named after its content, so that two versions in one process run each its own code.
    (package,) = {path.parent.name for path in (tmp_path / "runs").rglob("code/*/onnx_classifier.py")} or {""}
    assert package.startswith("portable_")

    client = open_client(uri)
    other = build_run(tmp_path / "runs" / "other", prepared[0], TIMM, steps=2)
    assert main(["register", str(other), *words]) == 0
    assert int(client.get_model_version_by_alias("scenes", "best").version) == 1
    assert main(["register", str(other), *words, "--alias", "best"]) == 0  # the same checkpoint: no third one
    assert int(client.get_model_version_by_alias("scenes", "best").version) == 2
    assert len(client.search_model_versions("name = 'scenes'")) == 2

    # Other names of the classes are other answers: another version.
    exported = tmp_path / "exported"
    export = ["export", str(other), "--format", "onnx", "--data", str(prepared[0]), "--out", str(exported)]
    assert main(export) == 0
    info = load_info(exported)
    replace(info, display_names=tuple(f"shown {name}" for name in info.class_names)).save(exported)
    assert main(["register", str(exported), *words]) == 0
    assert len(client.search_model_versions("name = 'scenes'")) == 3


@pytest.mark.parametrize("status", ["KILLED", "RUNNING"])
def test_registering_changes_nothing_of_how_the_training_ended(
    prepared: tuple[Path, Manifest], tmp_path: Path, status: str
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = open_client(uri)
    place = open_experiment(client, "scenes", uri, tmp_path)
    run_id = client.create_run(place).info.run_id
    if status != "RUNNING":
        client.set_terminated(run_id, status, 1_700_000_000_000)
    run = build_run(tmp_path / "runs" / "small", prepared[0], TIMM, steps=1)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"mlflow_run_id": run_id}))
    assert main(["register", str(run), "--name", "scenes", "--tracking-uri", uri]) == 0
    (version,) = client.search_model_versions("name = 'scenes'")
    assert version.run_id == run_id
    after = client.get_run(run_id).info
    assert after.status == status
    if status != "RUNNING":  # of one that runs, its own end puts it right
        assert after.end_time == 1_700_000_000_000
