"""`python -m serve download`: whole, resumed, refused, from a folder, S3 and MLflow."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_prep.manifest import Manifest
from serve.__main__ import main
from serve.classifier import TorchClassifier
from serve.download import from_folder, from_s3, resumable
from tests.integration.s3_server import Bucket
from tests.unit.serve.trained_run import TIMM, build_run
from train.checkpoint import CheckpointMirror, CheckpointStore
from train.tracking.mlflow_client import open_client


@pytest.fixture(scope="module")
def run(prepared: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("runs") / "small", prepared[0], TIMM, steps=1)


def best_of(folder: Path) -> bytes:
    return (folder / "checkpoints" / "best.pt").read_bytes()


def test_a_folder_is_copied_and_goes_on_where_it_was_cut(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumable, "PIECE_BYTES", 100_000)
    asked: list[int] = []
    whole = from_folder.bring_file

    def dying(read: Any, *rest: Any) -> None:
        def read_some(offset: int, length: int) -> bytes:
            asked.append(offset)
            if len(asked) == 4:
                raise OSError("the network disk is gone")
            return read(offset, length)

        whole(read_some, *rest)

    monkeypatch.setattr(from_folder, "bring_file", dying)
    out = tmp_path / "copy"
    assert main(["download", str(run), "--out", str(out)]) == 1
    assert not list((out / "checkpoints").glob("*.pt")) and not (out / "checkpoints/manifest.json").exists()
    assert main(["download", str(run), "--out", str(out)]) == 0
    assert asked[4] == asked[3] == 300_000  # not from the beginning
    assert best_of(out) == best_of(run)
    assert (out / "summary.json").read_bytes() == (run / "summary.json").read_bytes()
    assert TorchClassifier(out).info.class_names == TorchClassifier(run).info.class_names


def test_a_damaged_source_and_another_runs_folder_are_refused(
    run: Path, prepared: tuple[Path, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = Path(shutil.copytree(run, tmp_path / "damaged"))
    path = next((damaged / "checkpoints").glob("step-*.pt"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert main(["download", str(damaged), "--out", str(tmp_path / "out")]) == 1
    assert "SHA-256" in capsys.readouterr().err
    other = build_run(tmp_path / "other", prepared[0], TIMM, steps=2)
    assert main(["download", str(run), "--out", str(other)]) == 1
    assert "another run" in capsys.readouterr().err


def test_a_run_that_went_on_is_brought_again_and_what_is_newer_here_stays(
    prepared: tuple[Path, Manifest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = build_run(tmp_path / "runs" / "mine", prepared[0], TIMM, steps=1)
    out = tmp_path / "copy"
    assert main(["download", str(run), "--out", str(out)]) == 0
    shutil.rmtree(run)
    build_run(run, prepared[0], TIMM, steps=2)  # none of the checkpoints of before is left
    assert main(["download", str(run), "--out", str(out)]) == 0
    assert best_of(out) == best_of(run)
    shutil.rmtree(run)
    build_run(run, prepared[0], TIMM, steps=1)
    capsys.readouterr()
    assert main(["download", str(run), "--out", str(out)]) == 1
    assert "is at step 2, the run at 1" in capsys.readouterr().err


def test_from_s3_with_a_cut_in_the_middle(
    run: Path, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = CheckpointMirror(bucket.at("runs/small"), say=lambda line: None)
    mirror.submit(run, CheckpointStore(run / "checkpoints").manifest())
    assert mirror.wait(60)
    mirror.close(10)
    monkeypatch.setattr(resumable, "PIECE_BYTES", 100_000)
    out = tmp_path / "small"
    whole, asked = from_s3.bring_file, []

    def dying(read: Any, *rest: Any) -> None:
        def read_some(offset: int, length: int) -> bytes:
            asked.append(offset)
            if len(asked) == 4:
                raise RuntimeError("the network is gone")
            return read(offset, length)

        whole(read_some, *rest)

    monkeypatch.setattr(from_s3, "bring_file", dying)
    assert main(["download", bucket.at("runs/small"), "--out", str(out)]) == 1
    assert main(["download", bucket.at("runs/small"), "--out", str(out)]) == 0
    assert asked[4] == 300_000
    assert best_of(out) == best_of(run)
    # Once more: nothing large is asked for.
    del asked[:]
    assert main(["download", bucket.at("runs/small"), "--out", str(out)]) == 0
    assert asked == []
    monkeypatch.setattr(from_s3, "bring_file", whole)
    exported = tmp_path / "exported"
    words = ["--format", "safetensors", "--out", str(exported), "--check-images", "10"]
    assert main(["export", bucket.at("runs/small"), *words]) == 0
    origin = TorchClassifier(exported).info.provenance
    assert origin["checkpoint_sha256"] == hashlib.sha256(best_of(run)).hexdigest()
    assert origin["run"] == "small"
    assert main(["download", bucket.at("runs/none"), "--out", str(tmp_path / "none")]) == 1


def test_from_mlflow_by_name(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = open_client(uri)
    experiment = client.create_experiment("e", artifact_location=(tmp_path / "artifacts").as_uri())
    run_id = client.create_run(experiment, run_name="small").info.run_id
    for name in ("recipe.yaml", "summary.json", "metrics.jsonl"):
        client.log_artifact(run_id, str(run / name))
    client.log_artifact(run_id, str(run / "checkpoints" / "best.pt"), "checkpoints")
    words = ["download", "small", "--out", str(tmp_path / "out"), "--tracking-uri", uri]
    assert main(words) == 0
    assert best_of(tmp_path / "out") == best_of(run)
    assert best_of(run)  # MLflow's own copy was not moved away
    # Damaged on this side: brought again.
    best = tmp_path / "out" / "checkpoints" / "best.pt"
    best.unlink()
    assert main(words) == 0 and best_of(tmp_path / "out") == best_of(run)
    # Trained on from there: the run on the server does not take its place.
    (best.parent / "step-00000009.pt").write_bytes(b"newer")
    capsys.readouterr()
    assert main(words) == 1 and "choose another folder" in capsys.readouterr().err
    assert main(["download", "nobody", *words[2:]]) == 1
    assert "has no run 'nobody'" in capsys.readouterr().err


def test_what_is_nowhere_is_said_and_makes_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main(["download", "mistyped", "--out", str(tmp_path / "runs" / "mine")]) == 1
    assert "there is no MLflow store at sqlite:///" in capsys.readouterr().err
    assert main(["download", str(tmp_path / "mistyped"), "--out", str(tmp_path / "runs" / "mine")]) == 1
    assert "mistyped holds no checkpoint: name a run's folder" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.db"))
