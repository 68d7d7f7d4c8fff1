"""A run that is elsewhere, from its mirror: `python -m train fetch`, and `follow` into MLflow here."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.integration.s3_server import Bucket
from train.__main__ import main
from train.checkpoint import CheckpointMirror, CheckpointStore, load_checkpoint

AT = "runs/mine"


class Run:
    """A training somewhere else, that mirrors what it saves."""

    def __init__(self, folder: Path, bucket: Bucket) -> None:
        self.folder, self.store = folder, CheckpointStore(folder / "checkpoints")
        self.store.folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text("data: {path: somewhere}\nrun: {name: mine}\n")
        self.mirror = CheckpointMirror(bucket.at(AT), say=lambda line: None)

    def save(self, step: int, is_best: bool = True) -> None:
        state = {"version": 1, "step": step, "model": {"weight": torch.full((40, 40), float(step))}}
        self.store.save(state, step, is_best=is_best, keep_last=2)
        with (self.folder / "metrics.jsonl").open("a") as file:
            common = {"step": step, "epoch": step / 10, "time": 1000.0 + step}
            file.write(json.dumps({**common, "split": "train", "loss": 1 / step}) + "\n")
            file.write(json.dumps({**common, "split": "val", "loss": 1 / step, "top1": step / 100}) + "\n")
        self.mirror.submit(self.folder, self.store.manifest())
        assert self.mirror.wait(30)

    def sha256(self, name: str) -> str:
        return hashlib.sha256((self.store.folder / name).read_bytes()).hexdigest()


@pytest.fixture
def run(tmp_path: Path, bucket: Bucket):
    run = Run(tmp_path / "there" / "mine", bucket)
    yield run
    run.mirror.close(10)


def fetch(bucket: Bucket, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["fetch", bucket.at(AT), str(folder), "--json"])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_best_checkpoint_arrives_whole(
    run: Run, bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.save(10)
    run.save(20, is_best=False)
    here = tmp_path / "here" / "mine"
    code, out, _ = fetch(bucket, here, capsys)
    facts = json.loads(out)
    assert code == 0 and facts["step"] == 20 and facts["best"]["step"] == 10
    assert facts["best"]["sha256"] == run.sha256("best.pt")
    assert load_checkpoint(here / "checkpoints" / "best.pt")["step"] == 10
    assert (here / "checkpoints" / "best.safetensors").is_file()
    assert (here / "metrics.jsonl").read_bytes() == (run.folder / "metrics.jsonl").read_bytes()
    assert CheckpointStore(here / "checkpoints").manifest().best == "step-00000010.pt"


def test_again_it_brings_only_what_is_new_or_damaged(
    run: Run, bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.save(10)
    here = tmp_path / "mine"
    fetch(bucket, here, capsys)
    bucket.server.clear()
    assert fetch(bucket, here, capsys)[0] == 0
    assert not [asked for asked in bucket.server.all("GetObject") if asked.key.endswith(".pt")]
    path = here / "checkpoints" / "step-00000010.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    (here / "checkpoints" / "best.pt").unlink()
    assert fetch(bucket, here, capsys)[0] == 0
    assert load_checkpoint(here / "checkpoints" / "best.pt")["step"] == 10
    run.save(30)
    assert json.loads(fetch(bucket, here, capsys)[1])["best"]["step"] == 30
    assert sorted(p.name for p in (here / "checkpoints").glob("step-*.pt")) == ["step-00000030.pt"]


def test_a_damaged_best_checkpoint_is_not_taken_for_one(
    run: Run, bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.save(10)
    (key,) = [key for key in bucket.files(AT) if key.endswith(".pt")]
    bucket.flip(f"{AT}/{key}", 500)
    code, _, err = fetch(bucket, tmp_path / "mine", capsys)
    assert code == 1 and ("damaged" in err or "whole" in err)
    assert not (tmp_path / "mine" / "checkpoints" / "best.pt").exists()


def test_without_a_checkpoint_it_says_so(
    bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = fetch(bucket, tmp_path / "mine", capsys)
    assert code == 1 and "holds no checkpoint yet" in err


def test_another_runs_folder_is_left_alone(
    run: Run, bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.save(30)
    other = tmp_path / "mine"
    store = CheckpointStore(other / "checkpoints")
    store.folder.mkdir(parents=True)
    store.save({"version": 1, "step": 5, "model": {"weight": torch.ones(3)}}, 5, is_best=True, keep_last=2)
    before = {path.name: path.read_bytes() for path in store.folder.iterdir()}
    code, _, err = fetch(bucket, other, capsys)
    assert code == 1 and "another run" in err
    assert {path.name: path.read_bytes() for path in store.folder.iterdir()} == before


def follow(bucket: Bucket, folder: Path, *words: str) -> int:
    return main(["follow", bucket.at(AT), str(folder), "--once", *words])


def rows_in_mlflow(folder: Path) -> tuple[str, list[int]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder.parent / 'mlflow.db'}")
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    history = client.get_metric_history(found.info.run_id, "val_top1")
    assert all(metric.timestamp == (1000 + metric.step) * 1000 for metric in history), "their own times"
    return found.info.status, [metric.step for metric in history]


def test_mlflow_here_follows_a_run_that_is_elsewhere(
    run: Run, bucket: Bucket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "ui" / "mine"
    assert follow(bucket, here) == 0 and "nothing yet" in capsys.readouterr().out
    run.save(10)
    assert follow(bucket, here) == 0
    assert rows_in_mlflow(here) == ("RUNNING", [10])
    run.save(20)
    assert follow(bucket, here) == 0
    # A copy that is further than the mirror.
    run.save(30)
    shutil.copytree(run.folder, tmp_path / "live", ignore=shutil.ignore_patterns("checkpoints"))
    with (tmp_path / "live" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 40, "epoch": 4.0, "time": 1040.0, "split": "val", "top1": 0.4}) + "\n")
    assert follow(bucket, here, "--live", str(tmp_path / "live")) == 0
    assert rows_in_mlflow(here) == ("RUNNING", [10, 20, 30, 40])
    assert follow(bucket, here, "--live", str(tmp_path / "live"), "--end", "finished") == 0
    assert rows_in_mlflow(here) == ("FINISHED", [10, 20, 30, 40])
