"""Which models a demo offers, and when their weights are fetched."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field

import pytest

from serve.demo.entries import entries_of_paths
from serve.demo.examples import example_files, examples_of_data
from serve.demo.mlflow_entries import entries_of_experiment
from serve.portable.limits import Limits
from tests.conftest import class_image


def test_runs_are_called_by_their_shortest_names(timm_run, tmp_path):
    other = tmp_path / timm_run.name
    shutil.copytree(timm_run, other)
    best = timm_run / "checkpoints" / "best.pt"
    (alone,) = entries_of_paths([timm_run], Limits())
    assert (alone.name, alone.note) == ("small", "top-1 75.00%")
    names = [entry.name for entry in entries_of_paths([timm_run, other, timm_run], Limits())]
    assert names == [f"{timm_run.parent.name}/small", f"{tmp_path.name}/small"]
    assert entries_of_paths([best], Limits())[0].name == "small"
    shown = alone.open()
    facts = dict(shown.facts)
    assert facts["Network"] == "test_resnet" and facts["Run"] == "small" and shown.heat is not None


def test_what_is_no_model_is_said_at_once(tmp_path):
    with pytest.raises(ValueError, match="is no run with a checkpoint, no checkpoint and no exported folder"):
        entries_of_paths([tmp_path], Limits())


def test_examples_are_images_by_their_bytes(tmp_path):
    for number in range(14):
        class_image(0, number, 20, 20).save(tmp_path / f"{number:02d}.png")
    (tmp_path / "00.jpg").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes((tmp_path / "00.png").read_bytes())
    assert [path.name for path in example_files(tmp_path)] == [f"{n:02d}.png" for n in range(12)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image that could be an example"):
        example_files(tmp_path / "empty")


def test_a_data_set_has_an_example_of_each_class(prepared, tmp_path):
    files = examples_of_data(prepared[0], tmp_path)
    assert len(files) == len(example_files(tmp_path)) == 4
    assert examples_of_data(tmp_path, tmp_path) == []


@dataclass
class Store:
    """MLflow's client as far as a demo uses it, with the fetched artifacts counted."""

    checkpoint: object
    fetched: list = field(default_factory=list)

    def get_experiment_by_name(self, name):
        from mlflow.entities import Experiment

        return Experiment("1", name, "", "active") if name == "scenes" else None

    def search_runs(self, ids, wanted, max_results, page_token):
        from mlflow.entities import Metric, Run, RunData, RunInfo

        def run(run_id, name, **metrics):
            info = RunInfo(run_id, "1", "u", "FINISHED", 0, 1, "active", run_name=name)
            return Run(info, RunData([Metric(key, value, 0, 0) for key, value in metrics.items()], [], []))

        class Page(list):
            token = None

        return Page(
            [
                run("a" * 32, "worse", val_top1=0.5),
                run("b" * 32, "better", val_top1=0.7, best_top1=0.9),
                run("c" * 32, "worse", val_top1=0.4),
                run("d" * 32, "crashed"),
            ]
        )

    def list_artifacts(self, run_id, folder):
        from mlflow.entities import FileInfo

        return [FileInfo("checkpoints/best.pt", False, 9)] if run_id[0] in "ab" else []

    def download_artifacts(self, run_id, name, folder):
        self.fetched.append(run_id[0])
        return shutil.copy(self.checkpoint, folder)


def test_runs_of_mlflow_are_fetched_when_they_are_chosen(timm_run, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    store = Store(timm_run / "checkpoints" / "best.pt")
    monkeypatch.setattr("serve.demo.mlflow_entries.open_client", lambda uri: store)
    uri = "http://user:secret@mlflow.example"
    entries = entries_of_experiment("mlflow:scenes", uri, Limits(), tmp_path, taken=["better"])
    assert [(entry.name, entry.note) for entry in entries] == [
        ("better (bbbbbbbb)", "top-1 90.00%"),
        ("worse (aaaaaaaa)", "top-1 50.00%"),
        ("worse (cccccccc)", "top-1 40.00%"),
    ]
    assert store.fetched == []
    for _ in range(2):
        assert entries[0].open().classifier.info.class_names[0] == "class_0"
    assert store.fetched == ["b"]  # the file is kept
    with pytest.raises(ValueError, match=r"has no checkpoints/best\.pt of this run") as caught:
        entries[2].open()
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="no experiment 'other'") as caught:
        entries_of_experiment("mlflow:other", uri, Limits(), tmp_path)
    assert "secret" not in str(caught.value)
    with pytest.raises(ValueError, match="mlflow:NAME"):
        entries_of_experiment("scenes", uri, Limits(), tmp_path)
    with pytest.raises(ValueError, match="no MLflow store"):
        entries_of_experiment("mlflow:scenes", f"sqlite:///{tmp_path}/none.db", Limits(), tmp_path)
