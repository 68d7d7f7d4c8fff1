"""A sweep as a user starts it: real trainings, a real MLflow store, Ctrl-C and the same command again."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from data_prep.manifest import Manifest
from tests.integration.launch import read_json, run, start, write_recipe
from train.run_folder import read_status
from train.sweep.trial import StopRequest, TrialStart, run_trial

# A minute of trainings; the search itself is in tests/unit/train/test_sweep.py.
pytestmark = pytest.mark.long

SEARCH = ("optimizer.peak_lr=log:0.01..0.5", "data.crop_scale.0=0.2..0.8")


def sweep_words(folder: Path, data: Path, num_trials: int, mlflow: bool = True) -> tuple[str, ...]:
    changes = {"one_cycle, epochs: 2": "one_cycle, epochs: 1"}
    if mlflow:
        changes["tracking: {mlflow: false}"] = "tracking: {mlflow: true}"
    recipe = write_recipe(folder, data, **changes)
    return ("train.sweep", str(recipe), "--trials", str(num_trials), f"run.folder={folder}/runs", *SEARCH)


@pytest.fixture(scope="module")
def swept(prepared: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two trials, then the same command with three: the sweep's folder, and what the second start said."""
    folder = tmp_path_factory.mktemp("swept")
    first = run(*sweep_words(folder, prepared[0], 2))
    assert first.returncode == 0, first.stdout + first.stderr
    second = run(*sweep_words(folder, prepared[0], 3))
    assert second.returncode == 0, second.stdout + second.stderr
    assert "2 of 3 trials are there" in second.stdout
    return folder / "runs" / "tiny-sweep", second.stdout


def test_best_is_the_best_of_the_summaries(swept: tuple[Path, str]) -> None:
    folder, said = swept
    table = read_json(folder / "sweep.json")
    summaries = [read_json(folder / "trials" / row["run"] / "summary.json") for row in table["trials"]]
    assert [row["value"] for row in table["trials"]] == [summary["final_top1"] for summary in summaries]
    assert table["best"]["value"] == max(summary["final_top1"] for summary in summaries)
    assert len(list((folder / "trials").glob("trial-*/summary.json"))) == 3
    # Only what was missing was trained the second time.
    assert "trial 3/3" in said and "trial 2/3" not in said
    page = (folder / "sweep.html").read_text()
    assert page.count("data:image/png;base64") == 3 and table["best"]["command"].split()[-1] in page


def test_trials_stand_under_their_sweep_in_mlflow(swept: tuple[Path, str]) -> None:
    from mlflow import MlflowClient

    folder, _ = swept
    assert not (folder / "trials" / "mlflow.db").exists()
    client = MlflowClient(tracking_uri=f"sqlite:///{folder.parent / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("imagenet-sprint").experiment_id])
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    assert len(parents) == 1 and len(children) == 3  # one parent over both starts
    parent = parents[0]
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert {child.data.tags["sweep.state"] for child in children} == {"complete"}
    assert parent.info.status == "FINISHED" and parent.info.run_name == "tiny-sweep"
    table = read_json(folder / "sweep.json")
    assert parent.data.metrics["sweep_best_top1"] == table["best"]["value"]
    assert parent.data.params["space.optimizer.peak_lr"] == "log:0.01..0.5"
    assert parent.data.tags["best.trial"] == table["best"]["run"]
    names = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert {"sweep.html", "sweep.json", "recipe.yaml"} <= names


def test_another_search_under_the_same_name_is_refused(
    swept: tuple[Path, str], prepared: tuple[Path, Manifest]
) -> None:
    words = sweep_words(swept[0].parent.parent, prepared[0], 3)[:-1]
    result = run(*words)
    assert result.returncode == 1 and "data.crop_scale.0: was 0.2..0.8, now fixed" in result.stderr
    result = run(*words, SEARCH[1], "model.dropout=0.2")
    assert result.returncode == 1 and "model.dropout: was 0.0, now 0.2" in result.stderr


def wait_for_rows(path: Path, process) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and path.read_text().count("\n") > 1:
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} did not come: {process.communicate()[0]}")


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_trial_is_taken_up_again(
    prepared: tuple[Path, Manifest], tmp_path: Path, number: signal.Signals
) -> None:
    words = sweep_words(tmp_path, prepared[0], 2, mlflow=False)
    words = (*words, "data.global_batch_size=4")  # long enough to be stopped in the middle
    process = start(*words)
    folder = tmp_path / "runs" / "tiny-sweep"
    wait_for_rows(folder / "trials" / "trial-0001" / "metrics.jsonl", process)
    os.kill(process.pid, number)
    said = process.communicate(timeout=60)[0]
    if number == signal.SIGINT:
        assert process.returncode == 130 and "the same command goes on" in said
        assert read_status(folder / "trials" / "trial-0001")["status"] == "restart"
    again = run(*words)
    assert again.returncode == 0, again.stdout + again.stderr
    log = (folder / "trials" / "trial-0001.log").read_text()
    if number == signal.SIGINT:
        assert "going on from step-" in log
    else:
        # The training outlived its sweep: the second one waited for it, or found it done.
        assert log.count("finished: final top-1") == 1 and "another process is writing" not in log
    table = read_json(folder / "sweep.json")
    assert [(row["number"], row["state"]) for row in table["trials"]] == [(1, "complete"), (2, "complete")]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_real_training_is_pruned_in_good_order(
    prepared: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_ranks: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Many epochs: it must not be at its end before the signal comes.
    recipe = write_recipe(tmp_path, prepared[0], **{"one_cycle, epochs: 2": "one_cycle, epochs: 200"})
    trial = TrialStart(recipe, tmp_path / "trials" / "trial-0001", [], tmp_path / "log", num_ranks)
    outcome = run_trial(trial, "top1", lambda epoch, value: epoch >= 2, StopRequest())
    assert outcome.state == "pruned", outcome.reason + trial.log.read_text()
    assert read_status(trial.folder) == {"status": "restart", "reason": "SIGTERM"}
    assert list((trial.folder / "checkpoints").glob("step-*.pt"))
