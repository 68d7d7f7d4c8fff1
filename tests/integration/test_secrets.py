"""Credentials in the environment, where AWS, MLflow, Kaggle and the Hub look for them, stay there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.manifest import Manifest
from tests.integration.launch import run, write_recipe
from train.__main__ import main

NAMES = (
    *(
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
    ),
    *("KAGGLE_KEY", "KAGGLE_API_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
)
ONE_EPOCH = "schedule.phases=[{kind: constant, epochs: 1}]"


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Values that stand nowhere else; MLflow's user name is not one of them."""
    values = {name: f"planted-{name[::-1].lower()}-{number:04d}" for number, name in enumerate(NAMES)}
    for name, value in (values | {"MLFLOW_TRACKING_USERNAME": "somebody"}).items():
        monkeypatch.setenv(name, value)
    return [value.encode() for value in values.values()]


def found_in(secrets: list[bytes], folder: Path, printed: str) -> list[str]:
    contents = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {Path(name).name for name in contents} >= {"recipe.yaml", "status.json"}
    contents["its output"] = printed.encode()
    return [name for name, content in contents.items() if any(secret in content for secret in secrets)]


def test_no_credential_is_printed_or_stored(
    prepared: tuple[Path, Manifest], tmp_path: Path, secrets: list[bytes]
) -> None:
    recipe = write_recipe(tmp_path, prepared[0], **{"{mlflow: false}": "{mlflow: true}"})
    words = ("train", str(recipe), f"run.folder={tmp_path}/runs", ONE_EPOCH, "profile.steps=[1, 3]")
    result = run(*words)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "mlflow.db").is_file(), (
        "MLflow's parameters and tags were to be looked at, too"
    )
    assert found_in(secrets, tmp_path / "runs", result.stdout + result.stderr) == []
    (tmp_path / "runs" / "leak").write_bytes(b"key=" + secrets[0])
    assert found_in(secrets, tmp_path / "runs", "") == [str(tmp_path / "runs" / "leak")]


@pytest.mark.long
def test_no_credential_is_in_what_a_failure_says(
    copy_of_prepared: Callable[[], Path],
    tmp_path: Path,
    secrets: list[bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copy_of_prepared()
    (folder / "val.index.npy").write_bytes(b"")
    recipe = write_recipe(tmp_path, folder)
    assert main(["check", str(recipe)]) == 1
    printed = "".join(capsys.readouterr())
    result = run("train", str(recipe), f"run.folder={tmp_path}/runs")
    assert result.returncode != 0
    assert "val.index.npy" in printed and "val.index.npy" in result.stderr
    assert found_in(secrets, tmp_path / "runs", printed + result.stdout + result.stderr) == []
